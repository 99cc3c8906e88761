"""The definition of the anomaly score: plain PyTorch, any dtype, any order of derivative.

Its gradients, for backends whose kernels end there:

dL/dx = 2 (x - x_hat) (grad_residual / CHW + grad_map / C) = -dL/dx_hat,    f and f_hat likewise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


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


def output_shapes(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, ...]:
    """Empty outputs of an op: residual, feature and map, the map without elements unless wanted; float32."""
    n, _, h, w = x.shape
    shapes = ((n,), (n,), (n, h, w) if want_map else (0,))
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def gradients(tensors: Tensors, grads: Tensors, needs: Sequence[bool] = (True,) * 4) -> list[Tensor | None]:
    """The gradients of x, x_hat, f and f_hat that are needed, of those of the outputs; float32, differentiable."""
    x, x_hat, f, f_hat = tensors
    of_residual, of_feature, of_map = grads
    assert x is not None
    n, c, h, w = x.shape
    weight: Tensor | None = None  # [N, 1, H, W] or [N, 1, 1, 1]
    if of_residual is not None:
        weight = (of_residual / (c * h * w)).view(n, 1, 1, 1)
    if of_map is not None and of_map.dim() == 3:  # no elements, [0], where no map was wanted
        of_pixel = (of_map / c).unsqueeze(1)
        weight = of_pixel if weight is None else weight + of_pixel
    found = _weighed(x, x_hat, weight, needs[:2])
    weight = None
    if f is not None and of_feature is not None:
        weight = (of_feature / (f[0].numel() if n else 0)).view(n, *(1 for _ in f.shape[1:]))
    return [*found, *_weighed(f, f_hat, weight, needs[2:4])]


def _weighed(a: Tensor | None, b: Tensor | None, weight: Tensor | None, needs: Sequence[bool]) -> Tensors:
    """Gradients of sum(weight * (a - b)^2) for a and b."""
    if a is None or b is None or weight is None or not any(needs):
        return None, None
    grad = 2 * weight * (a.float() - b.float())
    return grad, -grad if needs[1] else None
