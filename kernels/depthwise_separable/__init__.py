"""Depthwise-separable convolution with what stands around it in a residual block (MobileNets; Howard et al., 2017).

    y = pool(pointwise(depthwise(up(act(norm(pre(x)) * scale + shift))))) + residual

A depthwise k x k convolution and a pointwise 1 x 1 convolution, both with bias and nothing between them. norm is an
instance norm or none; scale and shift carry its condition, or a folded conditional batch norm; up is nearest, pool is
average.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels import backend
from raccgan.kernels.depthwise_separable import native, native_pointwise, reference, rewritten, triton

ACTIVATIONS = ("none", "relu")
NORMS = ("none", "instance")

IMPLEMENTATIONS: backend.Family = {
    "reference": backend.Implementation(reference.depthwise_separable, backend.always),
    "native": backend.Implementation(native.depthwise_separable, native.can_run),
    "triton": backend.Implementation(triton.depthwise_separable, triton.can_run),
    "rewritten": backend.Implementation(rewritten.depthwise_separable, backend.always),
}

_POINTWISE = {
    "reference": reference.pointwise,
    "native": native_pointwise.pointwise,
    "triton": rewritten.pointwise,
    "rewritten": rewritten.pointwise,
}


class Statistics(NamedTuple):
    """What the next layer would otherwise re-read the whole output for; each [N, C], float32 at least."""

    sum: Tensor  # next norm: mean = sum / (H * W); CBAM's average
    sum_of_squares: Tensor  # next norm: variance = sum_of_squares / (H * W) - mean^2
    max: Tensor  # CBAM's max


def depthwise_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    preactivation: str = "none",
    norm: str = "none",
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    upsample: int = 1,
    pool: int = 1,
    residual: Tensor | None = None,
    kernels: str = "fused",
    packed: Tensor | None = None,
) -> Tensor:
    """Normalise, activate, upsample, convolve depthwise then pointwise, pool and add.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        depthwise_weight: [C, 1, k, k], k odd; zero padding k // 2 keeps the size.
        depthwise_bias: [C] or None.
        pointwise_weight: [D, C, 1, 1].
        pointwise_bias: [D] or None.
        preactivation: "none" or "relu", before the norm.
        norm: "none" or "instance", which brings each channel of each sample to mean 0 and variance 1. It couples no
            samples, so it may stand in a critic under a gradient penalty.
        eps: added to the variance.
        scale, shift: [N, C] each, both or neither; after the norm.
        activation: "none" or "relu", after scale and shift.
        upsample: 1 or 2, nearest.
        pool: 1 or 2, average; odd sizes are cut as ``avg_pool2d`` cuts them.
        residual: added last, of the output's shape.
        kernels: which implementation, see :mod:`raccgan.kernels.backend`.
        packed: pointwise_weight as :func:`packed` returned it, for whom that helps: where no gradient is recorded.

    Returns:
        [N, D, H * upsample // pool, W * upsample // pool] in x's dtype (autocast's, where that is on). The memory
        format is x's or channels_last, as the implementation computes it.

    Gradients: any order, for every tensor.

    Raises:
        ValueError: shapes or options outside the above.
        raccgan.kernels.backend.KernelError: ``kernels`` names what cannot serve this call.
    """
    choice, arguments = _prepared(
        x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, preactivation, norm, eps,
        scale, shift, activation, upsample, pool, residual, kernels,
    )  # fmt: skip
    y: Tensor = choice.run(*arguments) if choice.name != "native" else choice.run(*arguments, packed)
    return y


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, kernels: str = "fused", packed: Tensor | None = None
) -> Tensor:
    """The pointwise half alone, by whoever serves a depthwise-separable convolution of 1 x 1.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        weight: [D, C, 1, 1].
        bias: [D] or None.
        kernels: which implementation, see :mod:`raccgan.kernels.backend`.
        packed: weight as :func:`packed` returned it, or None.

    Returns:
        [N, D, H, W] in x's dtype (autocast's, where that is on); x's memory format or channels_last.

    Gradients: any order, for every tensor.

    Raises:
        ValueError: shapes other than the above.
        raccgan.kernels.backend.KernelError: ``kernels`` names what cannot serve this call.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"pointwise: x must be [N, C, H, W] and weight [D, C, 1, 1], got {list(x.shape)} and {list(weight.shape)}"
        )
    choice = backend.choose("depthwise_separable", IMPLEMENTATIONS, kernels, backend.Call.of(x, weight, kind(1, 1, 1)))
    if choice.name == "native":
        return native_pointwise.pointwise(x, weight, bias, packed=packed)
    return _POINTWISE[choice.name](x, weight, bias)


def packed(pointwise_weight: Tensor, dtype: torch.dtype, *, kernels: str = "fused") -> Tensor | None:
    """A pointwise weight [D, C, 1, 1] in the order in which it is multiplied by, made once for many calls in inference.

    Args:
        dtype: of the images, or autocast's; calls with other ones are served too, as without.
        kernels: which implementation will be asked for.

    Returns:
        What :func:`depthwise_separable` and :func:`pointwise` take as ``packed``, or None where nobody makes use of it.
        It is a copy of the weight's values, for this processor's instructions.

    Gradients: none.
    """
    call = backend.Call(pointwise_weight.device, dtype, ())
    if kernels not in ("fused", "native") or native.can_run(call) is not None:
        return None
    return native_pointwise.packed(pointwise_weight, dtype)


def depthwise_separable_with_statistics(x: Tensor, *weights: Any, **options: Any) -> tuple[Tensor, Statistics]:
    """:func:`depthwise_separable` of the same arguments, and the statistics of its result.

    Where one Triton kernel makes the result, they come from its epilogue; elsewhere they are another read of it.

    Gradients: any order, through the statistics too. A tie in a max shares the gradient evenly.
    """
    choice, arguments = _prepared(x, *weights, **options)
    if choice.name != "triton":
        y = choice.run(*arguments)
        return y, statistics(y)
    found: list[Tensor] = []
    y = choice.run(*arguments, found)
    return y, Statistics(*found)


def statistics(y: Tensor) -> Statistics:
    """Per-sample, per-channel sum, sum of squares and max of y [N, C, H, W], for the layer that reads y next."""
    return Statistics(*reference.statistics(y))


def _prepared(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    preactivation: str = "none",
    norm: str = "none",
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    upsample: int = 1,
    pool: int = 1,
    residual: Tensor | None = None,
    kernels: str = "fused",
) -> tuple[backend.Choice, tuple[Any, ...]]:
    """Who serves the call, and with which arguments; raises what :func:`depthwise_separable` does."""
    _check(x, depthwise_weight, pointwise_weight, preactivation, norm, scale, shift, activation, upsample, pool)
    what = kind(depthwise_weight.shape[-1], upsample, pool)
    call = backend.Call.of(x, depthwise_weight, what, twice=norm == "instance")
    arguments = (
        x, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, preactivation, norm, eps,
        scale, shift, activation, upsample, pool, residual,
    )  # fmt: skip
    return backend.choose("depthwise_separable", IMPLEMENTATIONS, kernels, call), arguments


def kind(k: int, upsample: int, pool: int) -> str:
    """What the time depends on beside dtype and shape, as in :mod:`raccgan.kernels.measured`: 7x7 up, 1x1 pool."""
    return f"{k}x{k}{' up' if upsample == 2 else ''}{' pool' if pool == 2 else ''}"


def _check(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    preactivation: str,
    norm: str,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    upsample: int,
    pool: int,
) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"depthwise_separable: {what}")

    if x.dim() != 4:
        refuse(f"x must be [N, C, H, W], got {list(x.shape)}")
    n, c = x.shape[:2]
    k = depthwise_weight.shape[-1]
    if depthwise_weight.shape != (c, 1, k, k) or k % 2 == 0:
        refuse(f"depthwise_weight must be [{c}, 1, k, k] with odd k, got {list(depthwise_weight.shape)}")
    if pointwise_weight.shape != (pointwise_weight.shape[0], c, 1, 1):
        refuse(f"pointwise_weight must be [D, {c}, 1, 1], got {list(pointwise_weight.shape)}")
    if (scale is None) != (shift is None):
        refuse("give both scale and shift, or neither")
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and t.shape != (n, c):
            refuse(f"{name} must be [{n}, {c}], got {list(t.shape)}")
    for name, value, known in (
        ("preactivation", preactivation, ACTIVATIONS),
        ("norm", norm, NORMS),
        ("activation", activation, ACTIVATIONS),
    ):
        if value not in known:
            refuse(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if upsample not in (1, 2) or pool not in (1, 2):
        refuse(f"upsample and pool must be 1 or 2, got {upsample} and {pool}")
