"""The definition of CBAM: plain PyTorch, any dtype, any order of derivative.

A tie in a max shares the gradient evenly (``amax``), so that the result does not depend on the memory order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.cbam.options import CbamNorm, CbamWeights


def convolve(planes: Tensor, weight: Tensor) -> Tensor:
    """[N, 2, H, W] and [1, 2, k, k] to [N, 1, H, W], with zeros around the image."""
    return F.conv2d(planes, weight, padding=weight.shape[-1] // 2)


def cbam(
    x: Tensor, weights: CbamWeights, norm: CbamNorm, convolve: Callable[[Tensor, Tensor], Tensor] = convolve
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var, as of :func:`raccgan.kernels.cbam.cbam`. ``convolve`` computes what :func:`convolve` does."""

    def mlp(v: Tensor) -> Tensor:
        hidden = F.relu(F.linear(v, weights.reduce_weight, weights.reduce_bias))
        return F.linear(hidden, weights.expand_weight, weights.expand_bias)

    channel_gate = torch.sigmoid(mlp(x.mean(dim=(2, 3))) + mlp(x.amax(dim=(2, 3))))
    x = x * channel_gate[:, :, None, None]
    planes = torch.stack([x.amax(dim=1), x.mean(dim=1)], dim=1)  # [N, 2, H, W]
    s = convolve(planes, weights.spatial_weight)  # [N, 1, H, W]
    if norm.mean is not None and norm.var is not None:
        mean, var = norm.mean, norm.var
    else:
        wide = s.to(torch.promote_types(s.dtype, torch.float32))
        over = (0, 1, 2, 3) if norm.kind == "batch" else (1, 2, 3)
        var, mean = (moment.reshape(-1) for moment in torch.var_mean(wide, dim=over, correction=0))
    scale = weights.norm_weight * torch.rsqrt(var + norm.eps)  # [1] or [N]
    s = s * scale[:, None, None, None] + (weights.norm_bias - mean * scale)[:, None, None, None]
    return (x * torch.sigmoid(s)).to(x.dtype), mean, var
