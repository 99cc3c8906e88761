"""Error maps: where an image differs from what a model, or a control, makes of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1 / 32  # standard deviation of the Gaussian that smooths a map, as a share of the image's side


def smoothed(map: Tensor) -> Tensor:
    """Maps [N, S, S] under a Gaussian, mirrored at the borders, cut off at three deviations.

    A reconstruction that is a pixel off differs along the lines of edges, a defect over an area: smoothing keeps areas.
    """
    size = map.shape[-1]
    deviation = SMOOTHING * size
    reach = math.ceil(3 * deviation)
    places = torch.arange(-reach, reach + 1, device=map.device, dtype=map.dtype)
    kernel = torch.softmax(-0.5 * (places / deviation).square(), dim=0)
    padded = F.pad(map[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]
