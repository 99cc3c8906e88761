"""The prologue by PyTorch's operations, any dtype and any order of derivative."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.depthwise_separable.options import Prologue


def apply_prologue(x: Tensor, prologue: Prologue) -> Tensor:
    """relu(norm(pre_relu(x)) * scale + shift) [N, C, H, W], which the convolution convolves."""
    if prologue.pre_relu:
        x = F.relu(x)
    if prologue.norm == "instance":
        # In float32 at least, as PyTorch's own norms do. In two passes: torch.var_mean takes one value at a time on a
        # CPU, 4 to 20 times as long at the shapes of the models.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(dim=(2, 3), keepdim=True)
        x = (centered * torch.rsqrt(centered.square().mean(dim=(2, 3), keepdim=True) + prologue.eps)).to(x.dtype)
    if prologue.scale is not None and prologue.shift is not None:
        x = x * prologue.scale[:, :, None, None] + prologue.shift[:, :, None, None]
    return F.relu(x) if prologue.relu else x
