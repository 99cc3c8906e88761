"""Anomaly score: how far an image and its features are from their reconstructions.

A(x | y) = mean (x - x')^2 + kappa * mean (f(x) - f(x'))^2,   x' = G(E(x, y), y)      (f-AnoGAN, eq. 5)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import dispatch
from raccgan.kernels.anomaly_score import native, reference, triton

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(reference.anomaly_score, dispatch.always),
    "native": dispatch.Backend(native.anomaly_score, native.supports),
    "triton": dispatch.Backend(triton.anomaly_score, triton.supports),
}


class AnomalyScore(NamedTuple):
    """One score an image, the two terms it is made of, and the map of squared differences."""

    score: Tensor  # [N]
    residual: Tensor  # [N]
    feature: Tensor  # [N], zero where no features were given
    map: Tensor | None  # [N, H, W]


def anomaly_score(
    x: Tensor,
    x_hat: Tensor,
    f: Tensor | None = None,
    f_hat: Tensor | None = None,
    *,
    kappa: float = 1.0,
    want_map: bool = True,
    kernels: str = "fused",
) -> AnomalyScore:
    """Score images against their reconstructions.

    Args:
        x, x_hat: images and reconstructions, [N, C, H, W], in [-1, 1], any strides.
        f, f_hat: their features, [N, ...], both or neither.
        kappa: weight of the feature term.
        want_map: also return the per-pixel map, the mean over C of the squared difference.
        kernels: which implementation, see :mod:`raccgan.kernels.dispatch`.

    Returns:
        Scores and map in float32 (float64 for float64 inputs), accumulated in that dtype. A sample's score does
        not depend on the batch it is in.

    Gradients: to second order and beyond, for all four tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names what cannot serve this call.
    """
    _check(x, x_hat, f, f_hat)
    call = dispatch.Call.of(x)
    run = dispatch.choose("anomaly_score", BACKENDS, kernels, call).run
    residual, feature, pixels = run(x, x_hat, f, f_hat, want_map)
    return AnomalyScore(residual + kappa * feature, residual, feature, pixels if want_map else None)


def kind(want_map: bool) -> str:
    """What the time depends on beside dtype and shape, as in :mod:`raccgan.kernels.measured`."""
    return "map" if want_map else ""


def _check(x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None) -> None:
    if x.dim() != 4 or x.shape != x_hat.shape:
        raise ValueError(f"anomaly_score: x and x_hat must be [N, C, H, W] alike, got {_s(x)} and {_s(x_hat)}")
    if not x.is_floating_point():
        raise ValueError(f"anomaly_score: x must be floating point, got {x.dtype}")
    if (f is None) != (f_hat is None):
        raise ValueError("anomaly_score: give both f and f_hat, or neither")
    if f is not None and f_hat is not None and (f.dim() < 2 or f.shape != f_hat.shape or f.shape[0] != x.shape[0]):
        raise ValueError(
            f"anomaly_score: f and f_hat must be [N, ...] alike with N={x.shape[0]}, got {_s(f)} and {_s(f_hat)}"
        )
    for name, t in (("x_hat", x_hat), ("f", f), ("f_hat", f_hat)):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            raise ValueError(
                f"anomaly_score: {name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}; they must match"
            )


def _s(t: Tensor) -> list[int]:
    return list(t.shape)
