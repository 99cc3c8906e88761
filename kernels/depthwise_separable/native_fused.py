"""The compiled kernel of all of it on a GPU with tensor cores: csrc/cuda/depthwise_separable_fused.cu.

    y = pool(pointwise(depthwise(up(act(norm(pre(x)) * scale + shift))))) + residual

Only the forward pass is fused. Its derivatives are those of the depthwise half (:mod:`native`) and of the pointwise
convolution (:mod:`rewritten`), so every order follows. Not run on a GPU yet: the tests run the kernel in emulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.autograd import register, wanted
from raccgan.kernels.depthwise_separable import native_pointwise
from raccgan.kernels.depthwise_separable.rewritten import PointwiseProduct, PointwiseTransposed

_OP = "raccgan::depthwise_native_fused"
_OPTIONS = 6  # upsample, pool, pre_relu, normalise, relu, eps; tf32 follows

# Settled once, at import, so that torch.compile sees constants. On a CPU only in emulation.
_MISSING = library.why_not()
DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if _MISSING is None and torch._C._dispatch_has_kernel_for_dispatch_key(_OP, key)
)

OUTPUT_BLOCK = 128
"""Channels of y that a block of threads computes; another block computes their depthwise results anew."""

_MULTIPLY_ADDS_A_BYTE = 10
"""By an H100's data sheet: 33.5 T float32 multiply-adds a second against 3.35 TB/s."""


def fuses(x: Tensor, pointwise_weight: Tensor, k: int, upsample: int, pool: int) -> bool:
    """Whether one kernel serves, and is less work than two, by counting; no GPU has been asked.

    It saves writing each depthwise result and reading it, and computes it anew for each block of output channels but
    the first. Beyond two blocks the matrix product decides, and a library's is better than one whose operand is
    computed between its steps. A gradient of the pointwise weight needs the depthwise result in memory again, which
    then saves nothing. What is not channels_last goes the way it went.
    """
    if x.device.type not in DEVICES or upsample * pool > 2:
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if torch.is_grad_enabled() and pointwise_weight.requires_grad:
        return False
    taps = k if upsample * pool == 1 else (k + 1) // upsample
    again = (pointwise_weight.shape[0] - 1) // OUTPUT_BLOCK
    return again <= 1 and again * taps * taps <= 2 * x.element_size() * _MULTIPLY_ADDS_A_BYTE


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
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`, where :func:`fuses`; any order of derivative."""
    alike = residual is None or residual.dtype == x.dtype
    y = fused(
        x, depthwise_weight, pointwise_weight.flatten(1).to(x.dtype),
        _bias(depthwise_bias, pointwise_weight, pointwise_bias), scale, shift, residual if alike else None,
        upsample, pool, preactivation, norm, activation, eps,
    )  # fmt: skip
    return y if residual is None or alike else y + residual


def fused(
    x: Tensor,
    w: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: int = 1,
    pool: int = 1,
    preactivation: str = "none",
    norm: str = "none",
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """pointwise pool(depthwise(up(act(norm(pre(x)) * scale + shift)))) + bias + residual.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; read in place where it is channels_last, copied otherwise.
        pointwise: [D, C] of x's dtype.
        bias: [D] float32, or None.
        residual: of the output's shape and x's dtype, or None.
        The others: as of :func:`native.depthwise`.

    Returns:
        y [N, D, H * upsample // pool, W * upsample // pool], channels_last, of x's dtype. The products add in float32;
        of float32 they are of tf32 where PyTorch lets its convolutions round to that, and else of three tf32 numbers,
        near float32. The same bits every time.

    Gradients: every order, for all seven tensors. The depthwise result is not kept for them, but computed again where
        pointwise's is asked for.

    Raises:
        RuntimeError: shapes, dtypes or devices other than the above, or no compiled kernel.
    """
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    y: Tensor = torch.ops.raccgan.depthwise_native_fused(
        x, w, pointwise, bias, scale, shift, residual, upsample, pool, preactivation == "relu", norm == "instance",
        activation == "relu", eps, _tf32(x),
    )  # fmt: skip
    return y


def _tf32(x: Tensor) -> bool:
    """Whether float32 may be multiplied as tf32: by the flag of the convolution in whose place the product stands."""
    if not x.is_cuda or torch.compiler.is_compiling():  # a CPU's convolutions do not round; a graph has no flags
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # PyTorch declares none


def _bias(depthwise_bias: Tensor | None, pointwise_weight: Tensor, pointwise_bias: Tensor | None) -> Tensor | None:
    """Both biases as one of the result, [D] float32."""
    bias = None if pointwise_bias is None else pointwise_bias.float()
    if depthwise_bias is None:
        return bias
    through = pointwise_weight.flatten(1).float() @ depthwise_bias.float()
    return through if bias is None else bias + through


# ---- shapes and gradients ------------------------------------------------------------------------------------------


def _shape(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Any, scale: Any, shift: Any, residual: Any, upsample: int, pool: int,
    *flags: Any,
) -> Tensor:  # fmt: skip
    return native_pointwise.image(x, pointwise.shape[0], upsample, pool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7 : 7 + _OPTIONS]


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    x, w, pointwise, _, scale, shift, _ = inputs
    need_x, need_w, need_matrix, need_bias, need_scale, need_shift, need_residual = (
        wanted(ctx, i, inputs) for i in range(7)
    )
    matrix = pointwise[:, :, None, None]
    affine = need_scale or need_shift
    grad_x = grad_w = grad_scale = grad_shift = grad_matrix = None
    if need_x or need_w or affine:
        grad_x, grad_w, grad_scale, grad_shift = torch.ops.raccgan.depthwise_native_backward(
            PointwiseTransposed.apply(g, matrix), x, w, scale, shift, *ctx.options, need_x, need_w, affine
        )
    if need_matrix:
        u = torch.ops.raccgan.depthwise_native(x, w, scale, shift, *ctx.options)
        grad_matrix = PointwiseProduct.apply(u, g).flatten(1)
    return (
        grad_x if need_x else None,
        grad_w.to(w.dtype) if grad_w is not None and need_w else None,
        grad_matrix,
        g.sum(dim=(0, 2, 3), dtype=torch.float32) if need_bias else None,
        grad_scale.to(scale.dtype) if grad_scale is not None and need_scale else None,
        grad_shift.to(shift.dtype) if grad_shift is not None and need_shift else None,
        g if need_residual else None,
        *[None] * (1 + _OPTIONS),
    )


if _MISSING is None:
    register(_OP, _shape, _backward, _save)
