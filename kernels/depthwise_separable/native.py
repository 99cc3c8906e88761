"""The rewritten op around a compiled depthwise convolution: C++ on a CPU.

    D(x, w)[n, c, h, v] = sum over i,j   of w[c, 0, i, j] x[n, c, h + i - k//2, v + j - k//2]
    C(x, g)[c, 0, i, j] = sum over n,h,v of x[n, c, h + i - k//2, v + j - k//2] g[n, c, h, v]

D and C are closed under differentiation, see rewritten.py: each one's gradients are D and C again. What the kernels
are for is C, the weight gradient: at k = 7 in channels_last PyTorch takes 8 to 17 times as long on one core, and for D
1.2 to 1.5 times.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import library
from raccgan.kernels.backend import Call
from raccgan.kernels.depthwise_separable import rewritten

DTYPES = (torch.float32, torch.bfloat16)
KERNEL_SIZES = (3, 5, 7)

_CONVOLUTION = "raccgan::depthwise_native"
_CORRELATION = "raccgan::depthwise_correlation_native"
# Settled once, at import, so that torch.compile sees a constant.
_MISSING = library.why_not()


def can_run(call: Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    if _MISSING is not None:
        return _MISSING
    if call.device.type != "cpu":
        return f"there are no compiled depthwise kernels for {call.device.type}"
    if call.dtype not in DTYPES:
        return f"the compiled depthwise kernels add in float32 and take float32 and bfloat16, not {call.dtype}"
    return None


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
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`; any order of derivative, for every tensor.

    The result is channels_last wherever the compiled kernels run, for any x: that is how PyTorch's own convolutions
    answer channels_last weights too, and going back to NCHW would slow down every layer after this one.
    """
    return rewritten.compose(
        _best_depthwise, x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
        scale, shift, activation, upsample, pool, residual,
    )  # fmt: skip


def _best_depthwise(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """D(x, w) + b by the compiled kernels, or by PyTorch's with the same closed family of gradients.

    PyTorch's serve kernel sizes above 7 and autocast to float16, which no model here has, and the shapes at which they
    are as fast or faster, all three passes taken together on one core: k = 3 on large tensors of many channels. For
    float32 [64, 64, 16, 16] they take 1.04 ms and the compiled ones 1.33, for [64, 256, 8, 8] 1.02 and 1.35, for
    [64, 64, 32, 32] 10.9 and 11.5. The other way round it is for [32, 64, 8, 8], 0.26 and 0.19, and for the few
    channels of an image, [64, 3, 32, 32], 1.36 and 0.88.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    k = w.shape[-1]
    compiled = dtype in DTYPES and k in KERNEL_SIZES
    large = k == 3 and x.shape[1] >= 16 and x.numel() >= 2**18
    return depthwise(x, w, b) if compiled and not large else rewritten.depthwise(x, w, b)


def depthwise(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """D(x, w) + b: depthwise convolution of stride 1 with zero padding k // 2.

    Args:
        x: [N, C, H, W] of one dtype of :data:`DTYPES`; read in place where it is channels_last, copied otherwise.
        w: [C, 1, k, k], k one of :data:`KERNEL_SIZES`.
        b: [C] or None.

    Returns:
        [N, C, H, W], channels_last, in autocast's dtype where autocast is on and in x's otherwise. The same bits
        whatever the number of threads, like all gradients; another processor may round differently.

    Gradients: every order, for all three tensors.

    Raises:
        RuntimeError: shapes, dtypes or devices other than the above, or no compiled kernel (see :func:`can_run`).
    """
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    y: Tensor = torch.ops.raccgan.depthwise_native(*rewritten.in_autocast_dtype(x, w, b))
    return y


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _convolution_shape(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _save_convolution(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolution_backward(ctx: _Context, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, w = ctx.saved_tensors
    need_x, need_w, need_b = ctx.needs_input_grad
    ops = torch.ops.raccgan
    return (
        ops.depthwise_native(g, w.flip(2, 3), None) if need_x else None,
        ops.depthwise_correlation_native(x, g, w.shape[-1]) if need_w else None,
        g.sum(dim=(0, 2, 3)) if need_b else None,
    )


def _correlation_shape(x: Tensor, g: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, k, k)


def _save_correlation(ctx: _Context, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _correlation_backward(ctx: _Context, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, g = ctx.saved_tensors
    need_x, need_g, _ = ctx.needs_input_grad
    convolution = torch.ops.raccgan.depthwise_native
    return (
        convolution(g, v.flip(2, 3), None) if need_x else None,
        convolution(x, v, None) if need_g else None,
        None,
    )


if _MISSING is None:
    torch.library.register_fake(_CONVOLUTION)(_convolution_shape)
    torch.library.register_autograd(_CONVOLUTION, _convolution_backward, setup_context=_save_convolution)
    torch.library.register_fake(_CORRELATION)(_correlation_shape)
    torch.library.register_autograd(_CORRELATION, _correlation_backward, setup_context=_save_correlation)
