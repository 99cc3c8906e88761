"""Memory formats of tensors, and the dtype in which autocast computes, for backends of several ops."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N * H * W, C]: a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(matrix: Tensor, like: Tensor) -> Tensor:
    """[N * H * W, D] as [N, D, H, W] of the other image's N, height and width, channels_last."""
    n, _, height, width = like.shape
    return matrix.view(n, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


def empty_image(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Room for [N, channels, height, width], channels_last, with the other image's N, dtype and device."""
    sizes = (like.shape[0], channels, height, width)
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_like_image(x: Tensor) -> Tensor:
    return empty_image(x, *x.shape[1:])


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which autocast computes with t: its own where that is off, or t is float64."""
    device = t.device.type
    if not torch.is_autocast_enabled(device) or t.dtype == torch.float64:
        return t.dtype
    return torch.get_autocast_dtype(device)


def in_autocast_dtype(t: Tensor) -> Tensor:
    """t in the dtype in which autocast computes. A custom backward runs outside of autocast, so the casts go first."""
    dtype = autocast_dtype(t)
    return t if t.dtype == dtype else t.to(dtype)
