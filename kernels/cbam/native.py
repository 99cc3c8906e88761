"""CBAM in compiled code: C++ on a CPU, CUDA C++ on a GPU. Three sweeps over x forward; only the first leaves the cache.

The kernels are the forward pass and its gradients, all of them in one call (cbam.cpp and cbam_backward.cpp in csrc/cpu,
.cu in csrc/cuda), and what a gradient penalty in a critic asks of these gradients (cbam_double_backward.cpp, on a CPU).
Other gradients of gradients are the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import dispatch, library
from raccgan.kernels.autograd import register, wanted
from raccgan.kernels.cbam.second_order import TENSORS, gradients_of_gradients

_FORWARD = "raccgan::cbam_native"
_BACKWARD = "raccgan::cbam_native_backward"
_DOUBLE_BACKWARD = "raccgan::cbam_native_double_backward"
# Settled once, at import, so that torch.compile sees constants.
_MISSING = library.why_not()


def supports(call: dispatch.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return dispatch.compiled(call, "CBAM") or _too_large(call)


def _too_large(call: dispatch.Call) -> str | None:
    """The CUDA kernels count an image's pixels in 32 bits (csrc/cuda/cbam_pixels.h)."""
    if call.device.type != "cuda" or len(call.shape) != 4:
        return None
    pixels = call.shape[2] * call.shape[3]
    return None if pixels < 2**31 else f"the CUDA CBAM kernels take images of fewer than 2^31 pixels, not {pixels}"


def cbam(
    x: Tensor,
    average: Tensor | None,
    maximum: Tensor | None,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and the three returned tensors as in :func:`raccgan.kernels.cbam.cbam`.

    Args:
        x: float32, bfloat16 or, on a GPU, float16; read in place where it is channels_last, copied otherwise.
        the others: of any floating dtype; used as float32.

    Returns:
        y in x's dtype, channels_last, with or without autocast. The same bits whatever the number of threads, like all
        gradients; another processor may round differently.

    Gradients: every order, for every tensor. The second order is a kernel's on a CPU for norm "instance", where it is
    of the gradients of x, average and maximum and not differentiated again; otherwise the reference's in float32.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not match, or no compiled kernel (see :func:`supports`).
    """
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    y, own_mean, own_var, _ = torch.ops.raccgan.cbam_native(
        x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
        norm_weight, norm_bias, mean, var, norm == "batch", eps,
    )  # fmt: skip
    return y, own_mean if mean is None else mean, own_var if var is None else var


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    batch: bool
    eps: float
    mask: int


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# ---- the forward op -------------------------------------------------------------------------------------------------


def _forward_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the moments (empty where they were given), and all that the backward op needs, in one float32 tensor."""
    x, reduce_weight, mean, batch = inputs[0], inputs[3], inputs[10], inputs[12]
    n, c, h, w = x.shape
    moments = 1 if batch or mean is not None else n

    def floats(count: int) -> Tensor:
        return x.new_empty(count, dtype=torch.float32)

    returned = moments if mean is None else 0
    saved = n * (3 * c + 3 * reduce_weight.shape[0] + 3 * h * w) + 2 * moments
    return _channels_last(x), floats(returned), floats(returned), floats(saved)


def _save_forward(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved = output[-1]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(*inputs[:TENSORS], saved)
    ctx.set_materialize_grads(False)
    ctx.batch, ctx.eps = inputs[TENSORS:]


def _forward_backward(
    ctx: _Context, g_y: Tensor | None, g_mean: Tensor | None, g_var: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    x = tensors[0]
    assert x is not None
    asked = [i for i in range(TENSORS) if wanted(ctx, i, tensors)]
    if g_y is None:
        g_y = torch.zeros_like(x)
    gradients = torch.ops.raccgan.cbam_native_backward(
        g_y, g_mean, g_var, *tensors, ctx.batch, ctx.eps, saved, sum(1 << i for i in asked)
    )
    return *(gradients[i] if i in asked else None for i in range(TENSORS)), None, None


# ---- the backward op: the gradients of the first 12 arguments of the forward op, empty where they are not wanted ----


def _backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, mask = inputs[3 : 3 + TENSORS], inputs[-1]

    def empty(i: int, t: Tensor | None) -> Tensor:
        if t is None or not mask >> i & 1:
            return inputs[0].new_empty(0, dtype=torch.float32 if t is None or i == 0 else t.dtype)
        return _channels_last(t) if i == 0 else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return tuple(empty(i, t) for i, t in enumerate(tensors))


def _save_backward(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved = inputs[-2]
    ctx.save_for_backward(*inputs[: 3 + TENSORS], saved)
    ctx.set_materialize_grads(False)
    ctx.batch, ctx.eps, _, ctx.mask = inputs[3 + TENSORS :]


def _backward_backward(ctx: _Context, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, saved = ctx.saved_tensors
    needed = [wanted(ctx, i, inputs) for i in range(3 + TENSORS)]
    if _of_a_penalty(inputs, cotangents, batch=ctx.batch):
        found = _double_backward(inputs, cotangents, ctx.eps, saved, needed)
    else:
        found = gradients_of_gradients(inputs, cotangents, ctx.mask, needed, batch=ctx.batch, eps=ctx.eps)
    return *found, None, None, None, None


# ---- the double backward op: the gradients of <v, gradient of x>, and of average's and maximum's where given ---------


def _of_a_penalty(inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], *, batch: bool) -> bool:
    """Whether the kernel computes these gradients of gradients."""
    _, g_mean, g_var, x, *_, mean, _ = inputs
    v, _, _, *of_weights = cotangents
    alone = v is not None and all(t is None for t in (g_mean, g_var, mean, *of_weights))
    return alone and x is not None and x.device.type == "cpu" and not batch and not torch.is_grad_enabled()


def _double_backward(
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    eps: float,
    saved: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    g_y, _, _, x, *others, _, _ = inputs
    assert x is not None
    if g_y is None:
        g_y = torch.zeros_like(x)
    of_g_y, *of_others = torch.ops.raccgan.cbam_native_double_backward(*cotangents[:3], g_y, x, *others, eps, saved)
    found = [of_g_y, None, None, *of_others]
    return [one if need else None for one, need in zip(found, needed, strict=True)]


def _double_backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    g_y, x, average, maximum, *weights = inputs[3:-2]
    n, c = x.shape[:2]

    def pooled(given: Tensor | None) -> Tensor:
        return x.new_empty((n, c), dtype=torch.float32 if given is None else given.dtype)

    alike = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in weights)
    mean, var = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    return _channels_last(g_y), _channels_last(x), pooled(average), pooled(maximum), *alike, mean, var


if _MISSING is None:
    register(_FORWARD, _forward_shapes, _forward_backward, _save_forward)
    register(_BACKWARD, _backward_shapes, _backward_backward, _save_backward)
    torch.library.register_fake(_DOUBLE_BACKWARD)(_double_backward_shapes)
