"""The native backend on a GPU with tensor cores, in one kernel: csrc/cuda/depthwise/fused.cu.

Only the forward pass is fused. Its derivatives are those of the depthwise half (:mod:`depthwise`) and of the pointwise
convolution (:mod:`convolutions`), so every order follows. The kernel has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import library, torch_internals
from raccgan.kernels.autograd import inputs_of, register
from raccgan.kernels.depthwise_separable.convolutions import PointwiseProduct, PointwiseTransposed
from raccgan.kernels.depthwise_separable.native.depthwise import Options
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, SAME_SIZE, Prologue, Resize, Weights
from raccgan.kernels.layout import empty_image

_OP = "raccgan::depthwise_native_fused"
_TENSORS = 7

# Settled once, at import, so that torch.compile sees constants. The op has a CPU kernel only in the tests' build.
DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if library.load() and torch_internals.has_kernel(_OP, key)
)

OUTPUT_BLOCK = 128
"""Channels of y that a block of threads computes; another block computes their depthwise results anew."""

_MULTIPLY_ADDS_A_BYTE = 10
"""By an H100's data sheet: 33.5 T float32 multiply-adds a second against 3.35 TB/s."""


def fuses(x: Tensor, weights: Weights, resize: Resize) -> bool:
    """Whether one kernel serves, and is less work than two, by counting; no GPU has been asked.

    It saves writing each depthwise result and reading it, and computes it anew for each block of output channels but
    the first. Beyond two blocks the matrix product decides, and a library's is better than one whose operand is
    computed between its steps. A gradient of the pointwise weight needs the depthwise result in memory again, which
    then saves nothing. What is not channels_last goes the way it went.
    """
    factor = resize.upsample * resize.pool
    if x.device.type not in DEVICES or factor > 2 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if torch.is_grad_enabled() and weights.pointwise.requires_grad:
        return False
    taps = weights.kernel_size if factor == 1 else (weights.kernel_size + 1) // resize.upsample
    again = (weights.pointwise.shape[0] - 1) // OUTPUT_BLOCK
    return again <= 1 and again * taps * taps <= 2 * x.element_size() * _MULTIPLY_ADDS_A_BYTE


def fused(
    x: Tensor,
    w: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue = NO_PROLOGUE,
    resize: Resize = SAME_SIZE,
) -> Tensor:
    """y for pointwise [D, C] of x's dtype, bias [D] float32 and a residual of x's dtype; else as :func:`depthwise`.

    Products add in float32. Those of float32 are of tf32 where PyTorch lets its convolutions round to that, and else of
    three tf32 numbers, near float32. The same bits every time.

    Gradients: every order, for all tensors. The depthwise result is not kept for them, but computed again where
        pointwise's is needed.
    """
    y: Tensor = torch.ops.raccgan.depthwise_native_fused(
        x, w, pointwise, bias, prologue.scale, prologue.shift, residual, *Options.of(prologue, resize), _tf32(x)
    )
    return y


def _tf32(x: Tensor) -> bool:
    """Whether float32 may be multiplied as tf32: by the flag of the convolution in whose place the product stands."""
    if not x.is_cuda or torch.compiler.is_compiling():  # a CPU's convolutions do not round; a graph has no flags
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # PyTorch declares none


def _shape(x: Tensor, w: Tensor, pointwise: Tensor, *others: Any) -> Tensor:
    upsample, pool = others[_TENSORS - 3 : _TENSORS - 1]
    resize = Resize(upsample, pool)
    return empty_image(x, pointwise.shape[0], resize.size(x.shape[2]), resize.size(x.shape[3]))


def _backward(ctx: Any, needs: Sequence[bool], grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, w, pointwise, _, scale, shift, _, *options, _ = inputs_of(ctx)
    needs_x, needs_w, needs_matrix, needs_bias, *needs_affine = needs[: _TENSORS - 1]
    grad_x = grad_w = grad_scale = grad_shift = grad_matrix = None
    if needs_x or needs_w or any(needs_affine):
        through = PointwiseTransposed.apply(grad_y, pointwise[:, :, None, None])
        grad_x, grad_w, grad_scale, grad_shift = torch.ops.raccgan.depthwise_native_backward(
            through, x, w, scale, shift, *options, needs_x, needs_w, any(needs_affine)
        )
    if needs_matrix:
        u = torch.ops.raccgan.depthwise_native(x, w, scale, shift, *options)
        grad_matrix = PointwiseProduct.apply(u, grad_y).flatten(1)
    grad_bias = grad_y.sum(dim=(0, 2, 3), dtype=torch.float32) if needs_bias else None
    return grad_x, grad_w, grad_matrix, grad_bias, grad_scale, grad_shift, grad_y


if library.load():
    register(_OP, _shape, _backward)
