"""Depthwise-separable convolution with what stands around it in a residual block (MobileNets; Howard et al., 2017).

    y = pool(pointwise(depthwise(upsample(relu(norm(pre_relu(x)) * scale + shift))))) + residual

The depthwise convolution is k x k, the pointwise one 1 x 1; both have a bias, and nothing stands between them. norm is
an instance norm or none. scale and shift carry its condition, or a folded conditional batch norm. Upsampling is
nearest, and the pool is average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raccgan.kernels import dispatch, layout, triton_runtime
from raccgan.kernels.depthwise_separable import native, pytorch, reference, triton
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, NORMS, SAME_SIZE, Prologue, Resize, Weights

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(dispatch.always, reference.depthwise_separable),
    "pytorch": dispatch.Backend(dispatch.always, pytorch.depthwise_separable),
    "native": dispatch.Backend(native.supports, native.depthwise_separable),
    "triton": dispatch.Backend(triton_runtime.supports, triton.depthwise_separable),
}

POINTWISE: dispatch.Backends = {
    "reference": dispatch.Backend(dispatch.always, reference.pointwise),
    "pytorch": dispatch.Backend(dispatch.always, pytorch.pointwise),
    "native": dispatch.Backend(native.supports, native.pointwise),
    # One matrix product, and the library's is the one that goes with the Triton kernels.
    "triton": dispatch.Backend(triton_runtime.supports, pytorch.pointwise),
}


def depthwise_separable(
    x: Tensor,
    weights: Weights,
    prologue: Prologue = NO_PROLOGUE,
    resize: Resize = SAME_SIZE,
    *,
    residual: Tensor | None = None,
    packed: Tensor | None = None,
    kernels: str = "fused",
) -> Tensor:
    """Normalise, upsample, convolve depthwise then pointwise, pool and add.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        weights: of both convolutions, in x's dtype; in any dtype but float64 where autocast is on.
        prologue: what happens to x before the convolution; its tensors have x's dtype, as the weights.
        resize: nearest upsampling before the convolution, average pool after it.
        residual: added last, of the result's shape.
        packed: ``weights.pointwise`` as :func:`packed` returned it.
        kernels: which backend, see :mod:`raccgan.kernels.dispatch`.

    Returns:
        [N, D, H * upsample // pool, W * upsample // pool] in x's dtype (autocast's, where that is on). The memory
        format is x's or channels_last, as the backend computes it.

    Gradients: any order, for every tensor but ``packed``. By ``torch.func`` and in forward mode too where
        ``kernels`` is "reference" or "fused".

    Raises:
        ValueError: shapes, dtypes or options outside the above.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names a backend that cannot serve this call.
    """
    dtype = _check(x, weights, prologue, resize, residual)
    call = dispatch.Call.of(x, weights.kernel_size, dtype)
    run = dispatch.choose("depthwise_separable", BACKENDS, kernels, call).run
    return run(x, weights, prologue, resize, residual, packed)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, kernels: str = "fused", packed: Tensor | None = None
) -> Tensor:
    """The pointwise half alone, a 1 x 1 convolution: [N, D, H, W] for weight [D, C, 1, 1] and bias [D].

    Dtypes, memory formats, gradients, errors and the other arguments are those of :func:`depthwise_separable`.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"pointwise: x must be [N, C, H, W] and weight [D, C, 1, 1], got {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"pointwise: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    dtype = layout.autocast_dtype(x)
    _check_dtype("pointwise", dtype, "weight", weight)
    _check_dtype("pointwise", dtype, "bias", bias)
    run = dispatch.choose("pointwise", POINTWISE, kernels, dispatch.Call.of(x, 1, dtype)).run
    return run(x, weight, bias, packed)


def packed(pointwise_weight: Tensor, dtype: torch.dtype, *, kernels: str = "fused") -> Tensor | None:
    """A pointwise weight [D, C, 1, 1] in the order in which it is multiplied by, made once for many calls in inference.

    Args:
        dtype: of the images, or autocast's; calls with other ones are served too, as without.
        kernels: which backend will be asked for.

    Returns:
        A copy of the values for this processor's instructions, without a gradient; None where no backend uses it.
    """
    call = dispatch.Call(pointwise_weight.device, dtype)
    if kernels not in ("fused", "native") or native.supports(call) is not None:
        return None
    return native.packed(pointwise_weight, dtype)


def _check(x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None) -> torch.dtype:
    """The dtype that the call computes in."""
    if x.dim() != 4:
        raise _refused(f"x must be [N, C, H, W], got {list(x.shape)}")
    dtype = layout.autocast_dtype(x)
    n, c, height, width = x.shape
    _check_weights(c, weights, dtype)
    _check_prologue(n, c, prologue, dtype)
    upsample, pool = resize
    if upsample not in (1, 2) or pool not in (1, 2):
        raise _refused(f"upsample and pool must be 1 or 2, got {upsample} and {pool}")
    least = 1 if pool <= upsample else 2
    if height < least or width < least:
        raise _refused(f"of {height} x {width} pixels nothing is left after the pool of {pool}")
    if residual is not None:
        wanted = (n, weights.pointwise.shape[0], resize.size(height), resize.size(width))
        if residual.shape != wanted:
            raise _refused(f"residual must be {list(wanted)}, got {list(residual.shape)}")
    return dtype


def _check_weights(c: int, weights: Weights, dtype: torch.dtype) -> None:
    depthwise, depthwise_bias, pointwise, pointwise_bias = weights
    taps, matrix = depthwise.shape, pointwise.shape
    k, d = taps[-1], matrix[0]
    if taps != (c, 1, k, k) or k % 2 == 0:
        raise _refused(f"weights.depthwise must be [{c}, 1, k, k] with odd k, got {list(taps)}")
    if matrix != (d, c, 1, 1):
        raise _refused(f"weights.pointwise must be [D, {c}, 1, 1], got {list(matrix)}")
    for name, bias, size in (("depthwise_bias", depthwise_bias, c), ("pointwise_bias", pointwise_bias, d)):
        if bias is not None and bias.shape != (size,):
            raise _refused(f"weights.{name} must be [{size}], got {list(bias.shape)}")
    for name, t in zip(Weights._fields, weights, strict=True):
        if t is not None and t.dtype != dtype:
            _check_dtype("depthwise_separable", dtype, f"weights.{name}", t)


def _check_prologue(n: int, c: int, prologue: Prologue, dtype: torch.dtype) -> None:
    if prologue.norm not in NORMS:
        raise _refused(f"norm must be one of {', '.join(NORMS)}, got {prologue.norm!r}")
    scale, shift = prologue.scale, prologue.shift
    if scale is None and shift is None:
        return
    if scale is None or shift is None:
        raise _refused("give both scale and shift, or neither")
    for name, t in (("scale", scale), ("shift", shift)):
        if t.shape != (n, c):
            raise _refused(f"{name} must be [{n}, {c}], got {list(t.shape)}")
        _check_dtype("depthwise_separable", dtype, name, t)


def _check_dtype(op: str, dtype: torch.dtype, name: str, t: Tensor | None) -> None:
    if t is not None and t.dtype != dtype and layout.autocast_dtype(t) != dtype:
        raise ValueError(
            f"{op}: x is computed in {dtype}, {name} is {t.dtype}: give both in one dtype, or use autocast"
        )


def _refused(what: str) -> ValueError:
    return ValueError(f"depthwise_separable: {what}")
