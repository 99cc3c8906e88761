"""Anomaly score: how far an image and its features are from their reconstructions.

A(x | y) = mean (x - x')^2 + kappa * mean (f(x) - f(x'))^2,   x' = G(E(x, y), y)      (f-AnoGAN, eq. 5)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import dispatch, triton_runtime
from raccgan.kernels.anomaly_score import native, reference, triton

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(dispatch.always, reference.anomaly_score),
    "native": dispatch.Backend(native.supports, native.anomaly_score),
    "triton": dispatch.Backend(triton_runtime.supports, triton.anomaly_score),
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
        x: images, [N, C, H, W], in [-1, 1], any strides, any floating dtype.
        x_hat: their reconstructions, of x's shape and dtype.
        f: features of x, [N, ...], of x's dtype; both features or neither.
        f_hat: features of x_hat, of f's shape and dtype.
        kappa: weight of the feature term.
        want_map: also return the per-pixel map, the mean over C of the squared difference.
        kernels: which backend, see :mod:`raccgan.kernels.dispatch`.

    Returns:
        Scores and map in float32 (float64 for float64 inputs), accumulated in that dtype. A sample's score does
        not depend on the batch it is in.

    Gradients: any order, for all four tensors. By ``torch.func`` and in forward mode where ``kernels`` is "reference"
        or "fused".

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names a backend that cannot serve this call.
    """
    if fault := _fault(x, x_hat, f, f_hat):
        raise ValueError(f"anomaly_score: {fault}")
    run = dispatch.choose("anomaly_score", BACKENDS, kernels, dispatch.Call.of(x_hat)).run
    residual, feature, squared = run(x, x_hat, f, f_hat, want_map)
    return AnomalyScore(residual + kappa * feature, residual, feature, squared if want_map else None)


def _fault(x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None) -> str | None:
    if x.dim() != 4 or x.shape != x_hat.shape:
        return f"x and x_hat must be [N, C, H, W] alike, got {list(x.shape)} and {list(x_hat.shape)}"
    if not x.is_floating_point():
        return f"x must be floating point, got {x.dtype}"
    if (f is None) != (f_hat is None):
        return "give both f and f_hat, or neither"
    if f is not None and f_hat is not None and (f.dim() < 2 or f.shape != f_hat.shape or f.shape[0] != x.shape[0]):
        shapes = f"{list(f.shape)} and {list(f_hat.shape)}"
        return f"f and f_hat must be [N, ...] alike with N={x.shape[0]}, got {shapes}"
    for name, t in (("x_hat", x_hat), ("f", f), ("f_hat", f_hat)):
        if t is not None and (t.device != x.device or t.dtype != x.dtype):
            return f"{name} is {t.dtype} on {t.device}, x is {x.dtype} on {x.device}; they must match"
    return None
