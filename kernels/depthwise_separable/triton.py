"""The Triton kernels around PyTorch's matrix product, or all of it in one kernel where that is less work.

    y = pool(pointwise(depthwise(up(act(norm(pre(x)) * scale + shift))))) + residual

The norm folds into scale and shift of x - mean, its moments being one read of x. Upsampling and pool fold into the
depthwise convolution's weights. Then either

- one kernel, :func:`triton_separable.separable`: the depthwise tile is the left operand of a matrix product and never
  leaves the chip; or
- two: :func:`triton_ops.depthwise`, and a matrix product of PyTorch's.

:func:`fuses` says which. Both have the same derivatives, those of the closed family in :mod:`triton_ops`. Not run on a
GPU yet: the tests interpret the kernels and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raccgan.kernels import backend
from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable import reference, rewritten, triton_launch, triton_ops, triton_separable
from raccgan.kernels.depthwise_separable.triton_ahead import compilations
from raccgan.kernels.depthwise_separable.triton_ops import PLAIN, Geometry, Prologue

__all__ = ["can_run", "compilations", "depthwise_separable", "fuses"]


def can_run(call: backend.Call) -> str | None:
    """Why the Triton kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return runtime.why_not(call)


def depthwise_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    preactivation: str,
    norm: str,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    upsample: int,
    pool: int,
    residual: Tensor | None,
    statistics: list[Tensor] | None = None,
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`; any order of derivative, for every tensor.

    The result is channels_last, for any x, but where PyTorch serves: a 1 x 1 depthwise convolution that is not fused.

    Args:
        statistics: a list to which the result's sum, sum of squares and max are added, [N, D] float32 each and
            differentiable: from the kernel's epilogue where one kernel makes the result, else from another read of it.
    """
    (x,) = rewritten.in_autocast_dtype(x)
    geometry = Geometry(stride=pool if upsample == 1 else 1, up=upsample)
    k, d = depthwise_weight.shape[-1], pointwise_weight.shape[0]
    if upsample * pool < 4 and fuses(x, pointwise_weight, k, d, geometry):
        prologue = _prologue(preactivation, scale, shift, activation)
        if norm == "instance":
            prologue = _normalising(prologue, x, eps)
        w, h, v = _fold(depthwise_weight, geometry, x)
        matrix, bias = pointwise_weight.flatten(1).to(x.dtype), _bias(depthwise_bias, pointwise_weight, pointwise_bias)
        alike = residual is None or residual.dtype == x.dtype
        found = triton_separable.separable(
            x, w, matrix, bias, residual if alike else None, geometry, h, v, prologue, alike and statistics is not None
        )
        y = found[0]
        if alike:
            if statistics is not None:
                statistics += found[1:]
            return y
    elif k == 1:  # the depthwise weight is part of the matrix
        y = rewritten.depthwise_separable(
            x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, preactivation, norm, eps,
            scale, shift, activation, upsample, pool, None,
        )  # fmt: skip
    else:
        w, h, v = _fold(depthwise_weight, geometry, x)
        prologue = _prologue(preactivation, scale, shift, activation)
        if norm == "instance":
            u = triton_separable.normalised(x, w, geometry, h, v, prologue, eps)
        else:
            u = triton_ops.depthwise(x, w, geometry, h, v, prologue)
        u = rewritten.resized(u, 1, pool // geometry.stride)
        y = _multiplied(u, pointwise_weight.to(x.dtype), _bias(depthwise_bias, pointwise_weight, pointwise_bias))
    y = y if residual is None else y + residual
    if statistics is not None:
        statistics += reference.statistics(y)
    return y


def _fold(w: Tensor, geometry: Geometry, x: Tensor) -> tuple[Tensor, int, int]:
    """The weights with resizing folded in, and the sides of what they make of x."""
    h, v = (side * geometry.up // geometry.stride for side in x.shape[2:])
    return triton_ops.resized(w.float(), geometry), h, v


def _multiplied(u: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The pointwise convolution of u as a matrix product, whose derivatives PyTorch makes of such products again."""
    rows, matrix = triton_separable.rows(u), w.flatten(1).t()
    product = rows @ matrix if bias is None else torch.addmm(bias.to(u.dtype), rows, matrix)
    return triton_separable.images(product, u.shape[0], u.shape[2], u.shape[3])


def _prologue(preactivation: str, scale: Tensor | None, shift: Tensor | None, activation: str) -> Prologue:
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    return Prologue(scale, shift, None, preactivation == "relu", activation == "relu")


def _normalising(prologue: Prologue, x: Tensor, eps: float) -> Prologue:
    """The prologue with an instance norm of x folded into its scale and shift."""
    mean, var = triton_ops.moments(x, prologue.rectify_first)
    centre, inverse = mean.detach(), torch.rsqrt(var + eps)
    scale, shift = triton_separable.normalising(mean - centre, inverse, prologue.scale, prologue.shift)
    return prologue._replace(scale=scale, shift=shift, centre=centre)


def _bias(depthwise_bias: Tensor | None, pointwise_weight: Tensor, pointwise_bias: Tensor | None) -> Tensor | None:
    """Both biases as one of the result, [D] float32."""
    bias = None if pointwise_bias is None else pointwise_bias.float()
    if depthwise_bias is None:
        return bias
    through = pointwise_weight.flatten(1).float() @ depthwise_bias.float()
    return through if bias is None else bias + through


def fuses(x: Tensor, pointwise_weight: Tensor, k: int, d: int, geometry: Geometry) -> bool:
    """Whether one kernel is less work than two, by counting; no GPU has been asked.

    It saves writing the depthwise result and reading it, 2 transfers of each value to and from memory, and computes
    that result anew for each block of output channels. Reads of x again come from the first-level cache, by the data
    sheets about eight times as fast as memory (on an H100 128 bytes a clock from each of 132, against 3.35 TB/s), so a
    block more pays where it costs fewer than 16 of them. Beyond two blocks the matrix product decides, and a library's
    is better than one whose operand is computed between its steps.

    A gradient of the pointwise weight needs the depthwise result in memory again, which then saves nothing; and float32
    that may not be rounded to tf32 is not multiplied on tensor cores at all: torch.compile cannot read that flag.
    """
    if torch.is_grad_enabled() and pointwise_weight.requires_grad:
        return False
    if x.dtype == torch.float32 and (torch.compiler.is_compiling() or triton_launch.precision() != "tf32"):
        return False
    again = runtime.cdiv(d, triton_launch.output_block(x.shape[1], d)) - 1
    return again <= 1 and again * reads(k, geometry) <= 16


def reads(k: int, geometry: Geometry) -> float:
    """How often a value of x is read for one of the depthwise convolution, in strips of four rows."""
    side = k if geometry == PLAIN else k + 1
    taps = side // geometry.up
    return taps * (geometry.stride * 3 + taps) / 4
