"""The definition of CBAM: plain PyTorch, any dtype, any order of derivative.

    channel gate  g_c = sigmoid(MLP(average over h,w of x) + MLP(max over h,w of x))            [N, C]
    spatial gate  g_s = sigmoid(norm(conv_kxk([max over c, mean over c] of x * g_c)))           [N, 1, H, W]
    y = x * g_c * g_s

A tie in a max shares the gradient evenly (``amax``), so that the result does not depend on the memory order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(planes: Tensor, weight: Tensor) -> Tensor:
    """[N, 2, H, W] and [1, 2, k, k] to [N, 1, H, W], with zeros around the image."""
    return F.conv2d(planes, weight, padding=weight.shape[-1] // 2)


def cbam(
    x: Tensor,
    average: Tensor | None,
    maximum: Tensor | None,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    convolve: Callable[[Tensor, Tensor], Tensor] = convolve,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and the three returned tensors as in :func:`raccgan.kernels.cbam`."""

    def mlp(v: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(v, reduce_weight, reduce_bias)), expand_weight, expand_bias)

    average = x.mean(dim=(2, 3)) if average is None else average
    maximum = x.amax(dim=(2, 3)) if maximum is None else maximum
    channel_gate = torch.sigmoid(mlp(average) + mlp(maximum))
    x = x * channel_gate[:, :, None, None]
    planes = torch.stack([x.amax(dim=1), x.mean(dim=1)], dim=1)  # [N, 2, H, W]
    s = convolve(planes, spatial_weight)  # [N, 1, H, W]
    if norm != "fixed":
        wide = s.to(torch.promote_types(s.dtype, torch.float32))
        over = (0, 1, 2, 3) if norm == "batch" else (1, 2, 3)
        var, mean = (moment.reshape(-1) for moment in torch.var_mean(wide, dim=over, correction=0))
    assert mean is not None  # the public function has checked
    assert var is not None
    scale = norm_weight * torch.rsqrt(var + eps)  # [1] or [N]
    s = s * scale[:, None, None, None] + (norm_bias - mean * scale)[:, None, None, None]
    return (x * torch.sigmoid(s)).to(x.dtype), mean, var
