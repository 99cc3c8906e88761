"""Maps of an image: where it differs from what a model makes of it, and how much contrast its regions have."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1 / 32  # standard deviation of the Gaussian that smooths a map, as a share of the image's side
FAINT = 1e-3  # added to a contrast before its logarithm: an eighth of a grey level of 256, in [-1, 1]


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


def contrasts(x: Tensor, grid: int) -> Tensor:
    """Logarithms of the contrast of images [N, C, S, S] and of their detail, in ``grid`` x ``grid`` regions.

    [N, 2 grid²]: the deviation within a region, mean over channels. The detail is what a blur of one pixel takes away.
    """
    side = x.shape[-1] // grid
    weights = torch.softmax(-0.5 * torch.arange(-2, 3, device=x.device, dtype=x.dtype).square(), dim=0)
    flat = F.pad(x.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="reflect")
    blurred = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1)).view_as(x)
    both = torch.cat([x, x - blurred], dim=1)  # in four dimensions, which every runtime of exports has
    centred = both - F.interpolate(F.avg_pool2d(both, side), scale_factor=float(side), mode="nearest")
    deviation = F.avg_pool2d(centred.square(), side).sqrt().unflatten(1, (2, -1)).mean(dim=2)
    return torch.log(deviation.flatten(1) + FAINT)
