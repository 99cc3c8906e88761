"""The same op by less arithmetic, with PyTorch's own convolutions inside. Exact up to rounding.

native.py composes the same rewrites around another depthwise convolution, see :func:`compose`.

1. Depthwise convolution as a family closed under differentiation. With stride 1 and "same" padding

       D(x, w)          the convolution
       dD/dx . g        = D(g, flip(w))
       dD/dw . g        = C(x, g), the correlation of x and g over the batch

   and C's own gradients are D(g, flip(v)) in x and D(x, v) in g for a cotangent v. So every order of derivative is
   made of D and C. Eager PyTorch differentiates its weight gradient with one small convolution per channel.
2. Pointwise and average pool commute, biases included: pooling first leaves a quarter of the matrix product.
3. A 1 x 1 depthwise convolution folds into the pointwise one: W = Wp diag(wd), b = bp + Wp bd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    upsample: int,
    pool: int,
    residual: Tensor | None,
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`; any order of derivative, for every tensor."""
    return compose(
        depthwise, x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
        scale, shift, activation, upsample, pool, residual,
    )  # fmt: skip


def compose(
    depthwise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    upsample: int,
    pool: int,
    residual: Tensor | None,
) -> Tensor:
    """The op around ``depthwise(x, w, b)``, which is D(x, w) + b for x [N, C, H, W], w [C, 1, k, k] and k above 1."""
    if scale is not None and shift is not None:
        x = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
    if activation == "relu":
        x = F.relu(x)
    if upsample > 1:
        x = F.interpolate(x, scale_factor=upsample, mode="nearest")
    if depthwise_weight.shape[-1] == 1:
        if depthwise_bias is not None:
            extra = pointwise_weight.flatten(1) @ depthwise_bias
            pointwise_bias = extra if pointwise_bias is None else pointwise_bias + extra
        pointwise_weight = pointwise_weight * depthwise_weight.view(1, -1, 1, 1)
    else:
        x = depthwise(x, depthwise_weight, depthwise_bias)
    if pool > 1:
        x = F.avg_pool2d(x, pool)
    x = F.conv2d(x, pointwise_weight, pointwise_bias)
    return x if residual is None else x + residual


def depthwise(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y: Tensor = Depthwise.apply(*in_autocast_dtype(x, w, b))
    return y


def in_autocast_dtype(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, w and b in autocast's dtype where that is on: a custom backward runs outside of it, so the casts go first."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, w, b
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)


class Depthwise(torch.autograd.Function):
    """D(x, w) + b for x [N, C, H, W], w [C, 1, k, k] with k odd, b [C] or None; stride 1, zero padding k // 2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, b, padding=w.shape[-1] // 2, groups=w.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        return (
            Depthwise.apply(g, w.flip(2, 3), None) if need_x else None,
            Correlation.apply(x, g, w.shape[-1]) if need_w else None,
            g.sum(dim=(0, 2, 3)) if need_b else None,
        )


class Correlation(torch.autograd.Function):
    """C(x, g) [C, 1, k, k]: sum over n,h,w of x[n, c, h + i - k//2, w + j - k//2] * g[n, c, h, w]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, g)
        c, p = x.shape[1], k // 2
        w = x.new_empty(c, 1, k, k)  # convolution_backward reads only its shape
        grad: Tensor = torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], [p, p], [1, 1], False, [0, 0], c, [False, True, False]
        )[1]
        return grad

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, g = ctx.saved_tensors
        need_x, need_g, _ = ctx.needs_input_grad
        return (
            Depthwise.apply(g, v.flip(2, 3), None) if need_x else None,
            Depthwise.apply(x, v, None) if need_g else None,
            None,
        )
