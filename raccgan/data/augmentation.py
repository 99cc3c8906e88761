"""Augmentation: images mirrored, and parts of them enlarged to the whole, as the authors of the method trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.5  # of an image's area that a part has
ASPECT = 4 / 3  # of a part at most, width to height or height to width


def placements(kind: str, count: int, draw: torch.Generator) -> Tensor:
    """What ``count`` images become: [count, 2, 3] from places in the result to places in the image, both from -1 to 1.

    "flip" mirrors left to right with probability one half. "crop" takes a rectangle of random area and aspect at a
    random place. "both" does both.
    """
    ones = torch.ones(count)
    width, height, left, top, mirrored = ones, ones, 0 * ones, 0 * ones, ones
    if kind in ("crop", "both"):
        area = LEAST + (1 - LEAST) * torch.rand(count, generator=draw)
        aspect = torch.exp((2 * torch.rand(count, generator=draw) - 1) * math.log(ASPECT))
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        left, top = (torch.rand(count, generator=draw) * (1 - side) for side in (width, height))
    if kind in ("flip", "both"):
        mirrored = 1 - 2 * (torch.rand(count, generator=draw) < 0.5).float()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirrored, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    return theta


def placed(x: Tensor, theta: Tensor) -> Tensor:
    """Images x [N, C, S, S] as :func:`placements` [N, 2, 3] has it, sampled bilinearly."""
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
