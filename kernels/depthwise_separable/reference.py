"""The definition of the depthwise-separable convolution: plain PyTorch, any dtype, any order of derivative."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.depthwise_separable.around import apply_prologue
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights


def depthwise_separable(
    x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None, *_: Tensor | None
) -> Tensor:
    """As :func:`raccgan.kernels.depthwise_separable.depthwise_separable`."""
    x = apply_prologue(x, prologue)
    if resize.upsample > 1:
        x = F.interpolate(x, scale_factor=resize.upsample, mode="nearest")
    padding, groups = weights.kernel_size // 2, weights.depthwise.shape[0]
    x = F.conv2d(x, weights.depthwise, weights.depthwise_bias, padding=padding, groups=groups)
    x = pointwise(x, weights.pointwise, weights.pointwise_bias)
    if resize.pool > 1:
        x = F.avg_pool2d(x, resize.pool)
    return x if residual is None else x + residual


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias)
