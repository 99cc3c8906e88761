"""The compiled kernels: everything up to the matrix product is one pass over x in C++, and so are its derivatives.

    u = depthwise(up(act(norm(pre(x)) * scale + shift))), averaged where y is           csrc/cpu/depthwise_separable.cpp
    y = pointwise(u) + residual                                                                   csrc/cpu/pointwise.cpp

All of u is a function of one sample's channel, so a channel stays in the cache through norm, activation, resizing and
convolution, and again through their first and their second derivative: a gradient penalty is one pass more, not some
forty of PyTorch's operations. There are no statistics of y from an epilogue: an instance norm takes its own from the x
that it reads anyway, and the two sweeps left, moments and CBAM's pooling, are 1.6% of a training step at 32 px.

Where no gradient is recorded one op on a CPU does both, and adds the depthwise bias as it writes u. Each thread takes
parts of the batch through both, so that a tile of u is the product's left operand while it is in the cache, and never
travels. Within one run on two cores of an AMD EPYC, 16 images' scores took 0.91 (32 px) and 0.94 (128 px) of the time,
in bfloat16 0.95 and 0.95, one image's 0.97 to 0.98. Not in training, where u is kept for the gradient of the pointwise
weights: cut by samples, the same layers took 0.98 to 1.02 of the time. On a GPU one kernel makes y of x where
:func:`native_fused.fuses`; elsewhere the product there is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import backend, library
from raccgan.kernels.autograd import differentiate, register, wanted
from raccgan.kernels.depthwise_separable import native_fused, native_pointwise, rewritten
from raccgan.kernels.depthwise_separable.reference import activated

KERNEL_SIZES = (3, 5, 7)
_A_ROW = 2**24

_FORWARD = "raccgan::depthwise_native"
_BACKWARD = "raccgan::depthwise_native_backward"
_DOUBLE_BACKWARD = "raccgan::depthwise_native_double_backward"
_SEPARABLE = "raccgan::depthwise_separable_native"
# Settled once, at import, so that torch.compile sees constants.
_MISSING = library.why_not()
_CUDA = library.cuda()


def can_run(call: backend.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return _MISSING or backend.not_compiled(call, "depthwise", _CUDA) or _too_wide(call)


def _too_wide(call: backend.Call) -> str | None:
    """The CUDA kernels count a value's place in a window of an image in 32 bits (csrc/cuda/depthwise_images.h)."""
    if call.device.type != "cuda" or len(call.shape) != 4:
        return None
    values = call.shape[1] * call.shape[3]
    if values < _A_ROW:
        return None
    return f"the CUDA depthwise kernels take rows of fewer than {_A_ROW} values, not {values} (channels times width)"


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
    packed: Tensor | None = None,
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`; any order of derivative, for every tensor.

    The result is channels_last wherever the compiled kernels run, for any x: that is how PyTorch's own convolutions
    answer channels_last weights too, and going back to NCHW would slow down every layer after this one.
    """
    (x,) = rewritten.in_autocast_dtype(x)
    if x.dtype not in backend.compiled_dtypes(x.device) or depthwise_weight.shape[-1] not in KERNEL_SIZES:
        # A 1 x 1 depthwise convolution is part of the matrix product; the others no model here has.
        return rewritten.depthwise_separable(
            x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, preactivation, norm, eps,
            scale, shift, activation, upsample, pool, residual, native_pointwise.pointwise,
        )  # fmt: skip
    if native_fused.fuses(x, pointwise_weight, depthwise_weight.shape[-1], upsample, pool):
        return native_fused.depthwise_separable(
            x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, preactivation, norm, eps,
            scale, shift, activation, upsample, pool, residual,
        )  # fmt: skip
    weights = (depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias)
    if upsample * pool <= 2 and _in_one_call(x, residual, *weights, scale, shift):
        y: Tensor = torch.ops.raccgan.depthwise_separable_native(
            x, *(None if t is None else t.float() for t in weights), scale, shift, residual, packed,
            upsample, pool, preactivation == "relu", norm == "instance", activation == "relu", eps,
        )  # fmt: skip
        return y
    inside = pool if upsample == 1 else 1
    u = depthwise(x, depthwise_weight, scale, shift, upsample, inside, preactivation, norm, activation, eps)
    u = rewritten.resized(u, 1, pool // inside)
    return rewritten.separable(
        u, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual, native_pointwise.pointwise
    )


def _in_one_call(x: Tensor, residual: Tensor | None, *others: Tensor | None) -> bool:
    """Whether the op that makes y of x without gradients serves: of one small image, calls take as long as the work."""
    if x.device.type != "cpu" or x.dtype not in native_pointwise.DTYPES:
        return False
    if residual is not None and residual.dtype != x.dtype:
        return False
    recorded = any(t is not None and t.requires_grad for t in (x, residual, *others))
    return not (recorded and torch.is_grad_enabled())


def depthwise(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    upsample: int = 1,
    pool: int = 1,
    preactivation: str = "none",
    norm: str = "none",
    activation: str = "none",
    eps: float = 1e-5,
) -> Tensor:
    """pool(depthwise(up(act(norm(pre(x)) * scale + shift)))), without bias, by the compiled kernels.

    Args:
        x: [N, C, H, W], float32, bfloat16 or, on a GPU, float16; read in place where it is channels_last, copied
            otherwise.
        w: [C, 1, k, k], k one of :data:`KERNEL_SIZES`; stride 1 and zero padding k // 2.
        scale, shift: [N, C] each, or neither.
        upsample, pool: 1 or 2, not both 2.
        preactivation, norm, activation, eps: as in :func:`raccgan.kernels.depthwise_separable`.

    Returns:
        [N, C, H * upsample // pool, W * upsample // pool], channels_last, of x's dtype. The same bits whatever the
        number of threads, like all gradients; another processor may round differently.

    Gradients: every order, for all four tensors. Compiled are the first and, of x's gradient, the second, which is what
    a gradient penalty asks for; the gradients of the other gradients, and third ones, are PyTorch's operations.

    Raises:
        RuntimeError: shapes, dtypes or devices other than the above, or no compiled kernel (see :func:`can_run`).
    """
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    y: Tensor = torch.ops.raccgan.depthwise_native(
        x, w, scale, shift, upsample, pool, preactivation == "relu", norm == "instance", activation == "relu", eps
    )
    return y


def _composed(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    upsample: int,
    pool: int,
    rectify_first: bool,
    normalise: bool,
    rectify: bool,
    eps: float,
) -> Tensor:
    """What depthwise_native computes, of operations that any order of derivative goes through."""
    relu = {True: "relu", False: "none"}
    norm = "instance" if normalise else "none"
    scale, shift = (None if t is None else t.to(x.dtype) for t in (scale, shift))
    x = activated(x, relu[rectify_first], norm, eps, scale, shift, relu[rectify])
    y = rewritten.Depthwise.apply(rewritten.resized(x, upsample, 1), w.to(x.dtype))
    return rewritten.resized(y, 1, pool)


# ---- forward -------------------------------------------------------------------------------------------------------

_OPTIONS = 6  # upsample, pool, rectify_first, normalise, rectify, eps: after the tensors of every op


def _forward_shape(x: Tensor, w: Tensor, scale: Any, shift: Any, upsample: int, pool: int, *flags: Any) -> Tensor:
    return native_pointwise.image(x, x.shape[1], upsample, pool)


def _separable_shape(
    x: Tensor, w: Tensor, bias: Any, pointwise: Tensor, pointwise_bias: Any, scale: Any, shift: Any, residual: Any,
    packed: Any, upsample: int, pool: int, *flags: Any
) -> Tensor:  # fmt: skip
    return native_pointwise.image(x, pointwise.shape[0], upsample, pool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep all tensors and all options; they come in this order in every op."""
    ctx.tensors = sum(1 for value in inputs if value is None or isinstance(value, Tensor))
    ctx.save_for_backward(*inputs[: ctx.tensors])
    ctx.options = inputs[ctx.tensors : ctx.tensors + _OPTIONS]
    ctx.flags = inputs[ctx.tensors + _OPTIONS :]
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * (4 + _OPTIONS)
    if g is None:
        return tuple(nothing)
    x, w, scale, shift = ctx.saved_tensors
    affine = wanted(ctx, 2) or wanted(ctx, 3)
    grad_x, grad_w, grad_scale, grad_shift = torch.ops.raccgan.depthwise_native_backward(
        g, x, w, scale, shift, *ctx.options, wanted(ctx, 0), wanted(ctx, 1), affine
    )
    return (
        grad_x if wanted(ctx, 0) else None,
        grad_w.to(w.dtype) if wanted(ctx, 1) else None,
        grad_scale.to(scale.dtype) if affine else None,
        grad_shift.to(shift.dtype) if affine else None,
        *nothing[4:],
    )


# ---- backward ------------------------------------------------------------------------------------------------------


def _backward_shape(
    g: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_x, want_w, want_affine = options[_OPTIONS:]
    return (
        _like(x, want_x),
        _float(x, w.shape, want_w),
        _float(x, x.shape[:2], want_affine),
        _float(x, x.shape[:2], want_affine),
    )


def _backward_backward(ctx: Any, t: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    needed = [wanted(ctx, i) for i in range(5)]
    g, x, w, scale, shift = ctx.saved_tensors
    if any(other is not None for other in others):
        found = differentiate(
            lambda *tensors: _gradients(tensors, ctx.options, ctx.flags), ctx.saved_tensors, (t, *others), needed
        )
    elif t is None:
        found = [None] * 5
    else:
        _, normalise, _, _ = ctx.options[2:]
        grad_g, grad_x, grad_w, grad_scale = torch.ops.raccgan.depthwise_native_double_backward(
            t, g, x, w, scale, shift, *ctx.options,
            needed[0], needed[1] and normalise, needed[2], needed[3] and scale is not None,
        )  # fmt: skip
        found = [
            grad_g if needed[0] else None,
            grad_x if needed[1] and normalise else None,
            grad_w.to(w.dtype) if needed[2] else None,
            grad_scale.to(scale.dtype) if needed[3] else None,
            None,
        ]
    return (*found, *[None] * (_OPTIONS + 3))


def _gradients(
    tensors: Sequence[Tensor | None], options: Sequence[Any], want: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What depthwise_native_backward computes for (g, x, w, scale, shift), differentiable."""
    g, *inputs = tensors
    leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in inputs]
    assert leaves[0] is not None
    assert leaves[1] is not None
    y = _composed(leaves[0], leaves[1], leaves[2], leaves[3], *options)
    found = torch.autograd.grad(
        y, [t for t in leaves if t is not None], g, create_graph=True, allow_unused=True, materialize_grads=True
    )
    by_input = iter(found)
    gradients = [None if t is None else next(by_input) for t in leaves]
    asked = (want[0], want[1], want[2], want[2])
    return tuple(gradient if one else None for gradient, one in zip(gradients, asked, strict=True))


# ---- double backward -----------------------------------------------------------------------------------------------


def _double_backward_shape(
    t: Tensor, g: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_g, want_x, want_w, want_scale = options[_OPTIONS:]
    return _like(g, want_g), _like(x, want_x), _float(x, w.shape, want_w), _float(x, x.shape[:2], want_scale)


def _double_backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    needed = [wanted(ctx, i) for i in range(6)]
    want_g, want_x, want_w, want_scale = ctx.flags

    def run(t: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_x, *_) = _gradients(tensors, ctx.options, (True, False, False))
        asked = (want_g, want_x, want_w, want_scale, False)
        return tuple(differentiate(lambda *_: (grad_x,), tensors, (t,), asked)[:4])

    found = differentiate(run, ctx.saved_tensors, cotangents, needed)
    return (*found, *[None] * (_OPTIONS + 4))


def _like(t: Tensor, want: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last) if want else t.new_empty(0)


def _float(t: Tensor, shape: Sequence[int], want: bool) -> Tensor:
    return t.new_empty(shape, dtype=torch.float32) if want else t.new_empty(0)


if _MISSING is None:
    register(_FORWARD, _forward_shape, _forward_backward, _save)
    register(_BACKWARD, _backward_shape, _backward_backward, _save)
    register(_DOUBLE_BACKWARD, _double_backward_shape, _double_backward_backward, _save)
    torch.library.register_fake(_SEPARABLE)(_separable_shape)  # which is called where no gradient is recorded
