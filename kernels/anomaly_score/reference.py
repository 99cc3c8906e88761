"""The definition of the anomaly score: plain PyTorch, any dtype, any order of derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, feature and map of :func:`raccgan.kernels.anomaly_score.anomaly_score`; no map, [0], unless wanted."""
    squared = _widened(x).sub(_widened(x_hat)).square()  # [N, C, H, W]
    residual = squared.mean(dim=(1, 2, 3))
    if f is None or f_hat is None:
        feature = torch.zeros_like(residual)
    else:
        feature = _widened(f).sub(_widened(f_hat)).square().flatten(1).mean(dim=1)
    return residual, feature, squared.mean(dim=1) if want_map else squared.new_empty(0)


def _widened(t: Tensor) -> Tensor:
    """float32 at least: half-precision inputs are subtracted and summed in float32."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
