"""The outputs and the gradients that the native and the triton backend of the anomaly score share.

PyTorch's operations compute the gradients:

dL/dx = 2 (x - x_hat) (grad_residual / CHW + grad_map / C) = -dL/dx_hat,    f and f_hat likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ScoreTensors(NamedTuple):
    """The tensor arguments of the ops, or the gradient of each."""

    x: Tensor | None
    x_hat: Tensor | None
    f: Tensor | None
    f_hat: Tensor | None


class ScoreGrads(NamedTuple):
    """The gradients of the ops' outputs."""

    residual: Tensor | None  # [N]
    feature: Tensor | None  # [N]
    map: Tensor | None  # [N, H, W]


def output_shapes(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of an op: residual, feature and map, the map without elements unless wanted; float32."""
    n, _, h, w = x.shape

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return empty(n), empty(n), empty(n, h, w) if want_map else empty(0)


def gradients(
    x: Tensor,
    x_hat: Tensor,
    f: Tensor | None,
    f_hat: Tensor | None,
    grads: ScoreGrads,
    needs: Sequence[bool] = (True,) * 4,
) -> ScoreTensors:
    """The gradients that are needed, float32, by differentiable operations."""
    n, c, h, w = x.shape
    weight: Tensor | None = None  # [N, 1, H, W] or [N, 1, 1, 1]
    if grads.residual is not None:
        weight = (grads.residual / (c * h * w)).view(n, 1, 1, 1)
    if grads.map is not None and grads.map.dim() == 3:  # no elements, [0], where no map was wanted
        of_pixel = (grads.map / c).unsqueeze(1)
        weight = of_pixel if weight is None else weight + of_pixel
    of_images = _weighed(x, x_hat, weight, *needs[:2])
    if f is None or f_hat is None or grads.feature is None:
        return ScoreTensors(*of_images, None, None)
    size = f[0].numel() if n else 0
    weight = (grads.feature / size).view(n, *(1 for _ in f.shape[1:]))
    return ScoreTensors(*of_images, *_weighed(f, f_hat, weight, *needs[2:4]))


def _weighed(
    a: Tensor, b: Tensor, weight: Tensor | None, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum(weight * (a - b)^2) for a and b."""
    if weight is None or not (needs_a or needs_b):
        return None, None
    grad = 2 * weight * (a.float() - b.float())
    return grad, -grad if needs_b else None
