"""The definition of the fused depthwise-separable convolution: plain PyTorch, any dtype, any order of derivative.

y = pool(pointwise(depthwise(up(act(x * scale + shift))))) + residual
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    upsample: int,
    pool: int,
    residual: Tensor | None,
) -> Tensor:
    """Shapes as in :func:`raccgan.kernels.depthwise_separable`."""
    if scale is not None and shift is not None:
        x = x * scale[:, :, None, None] + shift[:, :, None, None]
    if activation == "relu":
        x = F.relu(x)
    if upsample > 1:
        x = F.interpolate(x, scale_factor=upsample, mode="nearest")
    k = depthwise_weight.shape[-1]
    x = F.conv2d(x, depthwise_weight, depthwise_bias, padding=k // 2, groups=depthwise_weight.shape[0])
    x = F.conv2d(x, pointwise_weight, pointwise_bias)
    if pool > 1:
        x = F.avg_pool2d(x, pool)
    return x if residual is None else x + residual
