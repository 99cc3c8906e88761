"""The definition of the fused depthwise-separable convolution: plain PyTorch, any dtype, any order of derivative.

y = pool(pointwise(depthwise(up(act(norm(pre(x)) * scale + shift))))) + residual
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`."""
    x = activated(x, preactivation, norm, eps, scale, shift, activation)
    if upsample > 1:
        x = F.interpolate(x, scale_factor=upsample, mode="nearest")
    k = depthwise_weight.shape[-1]
    x = F.conv2d(x, depthwise_weight, depthwise_bias, padding=k // 2, groups=depthwise_weight.shape[0])
    x = pointwise(x, pointwise_weight, pointwise_bias)
    if pool > 1:
        x = F.avg_pool2d(x, pool)
    return x if residual is None else x + residual


def pointwise(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The 1 x 1 convolution of x [N, C, H, W] by w [D, C, 1, 1], plus b [D]."""
    return F.conv2d(x, w, b)


def activated(
    x: Tensor, preactivation: str, norm: str, eps: float, scale: Tensor | None, shift: Tensor | None, activation: str
) -> Tensor:
    """act(norm(pre(x)) * scale + shift), what the convolution convolves."""
    if preactivation == "relu":
        x = F.relu(x)
    if norm == "instance":
        # In float32 at least, as PyTorch's own norms do. In two passes: torch.var_mean takes one value at a time on a
        # CPU, 4 to 20 times as long at the shapes of the models.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=(2, 3), keepdim=True)
        x = (centred * torch.rsqrt(centred.square().mean(dim=(2, 3), keepdim=True) + eps)).to(x.dtype)
    if scale is not None and shift is not None:
        x = x * scale[:, :, None, None] + shift[:, :, None, None]
    return F.relu(x) if activation == "relu" else x


def statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and max of y [N, C, H, W] over the pixels, each [N, C] in float32 at least."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return wide.sum(dim=(2, 3)), wide.square().sum(dim=(2, 3)), wide.amax(dim=(2, 3))
