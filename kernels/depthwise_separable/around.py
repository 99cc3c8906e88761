"""Prologue, nearest upsampling and average pool with PyTorch's operations, any dtype, any order of derivative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.depthwise_separable.options import Prologue


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """relu(norm(pre_relu(x)) * scale + shift) [N, C, H, W], which the convolution convolves."""
    if prologue.pre_relu:
        x = F.relu(x)
    if prologue.norm == "instance":
        # In float32 at least, as PyTorch's own norms do. In two passes: torch.var_mean takes one value at a time on a
        # CPU, 4 to 20 times as long at the shapes of the models.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(dim=(2, 3), keepdim=True)
        x = (centered * torch.rsqrt(centered.square().mean(dim=(2, 3), keepdim=True) + prologue.eps)).to(x.dtype)
    if prologue.scale is not None and prologue.shift is not None:
        x = x * prologue.scale[:, :, None, None] + prologue.shift[:, :, None, None]
    return F.relu(x) if prologue.relu else x


def upsampled(x: Tensor, size: int) -> Tensor:
    """Each pixel size x size times, [N, C, H * size, W * size]."""
    return F.interpolate(x, scale_factor=size, mode="nearest") if size > 1 else x


def pooled(x: Tensor, size: int) -> Tensor:
    """The mean of size x size pixels each, [N, C, H // size, W // size].

    Average pool and its transpose are a family closed under differentiation. PyTorch's pool gives x a second gradient
    of zeros, in NCHW, and what is added to them is in NCHW from there on.
    """
    if size == 1:
        return x
    if not torch.is_grad_enabled():
        return F.avg_pool2d(x, size)
    return AveragePool.apply(x, size)


class AveragePool(torch.autograd.Function):
    """The average pool of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.sizes, ctx.size = x.shape[2:], size
        return F.avg_pool2d(x, size)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return AveragePoolTransposed.apply(grad_y, *ctx.sizes, ctx.size), None


class AveragePoolTransposed(torch.autograd.Function):
    """The pool's gradient in x [N, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, grad_y: Tensor, height: int, width: int, size: int) -> Tensor:
        ctx.size = size
        sizes = (*grad_y.shape[:2], height, width)
        # avg_pool2d_backward reads only its shape and memory format
        x = torch.empty(sizes, dtype=grad_y.dtype, device=grad_y.device, memory_format=torch.channels_last)
        return torch.ops.aten.avg_pool2d_backward(grad_y, x, [size] * 2, [size] * 2, [0, 0], False, True, None)

    @staticmethod
    def backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor, None, None, None]:
        return AveragePool.apply(grad_grad_x, ctx.size), None, None, None
