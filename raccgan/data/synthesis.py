"""Synthetic pathologies: normal images with something wrong in a few soft regions.

No image of a real anomaly is used. What goes wrong is meant to be general: another image's pixels or detail (as in
CutPaste, Li et al., 2021), haze, darkening, blur, sharpening, texture, and a shift. Images are float32 [N, C, S, S] in
[-1, 1]. All random numbers of a batch are drawn at once, so that ranks can share them out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REGIONS = 3  # the most in an image
NARROWEST, WIDEST = 0.03, 0.3  # half axes of a region, as shares of the side, and a pixel at least
SHARES = (0.6, 0.4, 0.2, 0.4, 0.2, 0.3, 0.5)
"""How often an image is hazed, blurred, sharpened, pasted into, textured and shifted, each by its own; and how often
what is pasted is the other image itself instead of its detail."""
COARSE = 8  # a side of the noise that makes a region's edge uneven


class Draws(NamedTuple):
    """The random numbers of N synthetic images, uniform in [0, 1) or normal; a row is an image's."""

    regions: Tensor  # [N, REGIONS, 6]: where, how long, how wide, turned how far, how soft
    edges: Tensor  # [N, REGIONS, COARSE, COARSE], normal
    number: Tensor  # [N]: how many regions
    chance: Tensor  # [N, 7]: which kinds of fault there are
    amount: Tensor  # [N, 6]: how much of each
    moves: Tensor  # [N, 5]: how the other image lies, and which way a shift goes
    texture: Tensor  # [N, 1, S, S], normal

    @classmethod
    def of(cls, n: int, size: int, generator: torch.Generator) -> Draws:
        """The numbers of ``n`` images of ``size`` pixels a side, on the CPU."""

        def uniform(*shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=generator)

        edges = torch.randn(n, REGIONS, COARSE, COARSE, generator=generator)
        texture = torch.randn(n, 1, size, size, generator=generator)
        return cls(uniform(REGIONS, 6), edges, uniform(), uniform(len(SHARES)), uniform(6), uniform(5), texture)


def synthetic(x: Tensor, other: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Pathologies in normal images x [N, C, S, S], and their masks [N, 1, S, S] from 0 to 1.

    ``other`` are normal images of the same shape, of which parts are pasted.
    """
    size = x.shape[-1]
    mask = regions(draws, size)
    chance = draws.chance < torch.tensor(SHARES)
    chance[:, 0] |= ~chance[:, :-1].any(dim=1)  # nothing went wrong yet
    hazed, blurred, sharpened, pasted, textured, shifted, whole = _columns(chance.float())
    amount = _columns(draws.amount)
    other, coarse = _moved(other, draws.moves), max(size / 16, 0.7)
    detail = other - smooth(other, coarse) + smooth(x, coarse)
    y = x + shifted * mask * (_shifted(x, draws.moves) - x)
    y = y + pasted * mask * (torch.where(whole > 0, other, detail) - y) * (0.5 + 0.5 * amount[0])
    soft = smooth(y, max(size / 32, 0.7))
    y = y + blurred * mask * (soft - y) * (0.3 + 0.7 * amount[1])
    y = y + sharpened * mask * (y - soft) * (0.3 + 1.2 * amount[2])
    y = y + hazed * mask * (1.6 * amount[3] - 0.6 - y) * (0.15 + 0.45 * amount[4])
    y = y + textured * mask * smooth(draws.texture, 1.0) * (0.1 + 0.4 * amount[5])
    return y.clamp(-1, 1), mask


def regions(draws: Draws, size: int) -> Tensor:
    """Soft, uneven ellipses: masks [N, 1, size, size] from 0 to 1, at least one region an image."""
    line = (torch.arange(size) + 0.5) / size
    y, x = line[:, None], line[None, :]
    noise = F.interpolate(draws.edges, size=(size, size), mode="bicubic", align_corners=False)
    narrowest = max(NARROWEST, 1 / size)
    mask = torch.zeros(len(draws.number), size, size)
    for i in range(REGIONS):
        at_y, at_x, long, wide, turn, soft = (part[:, :, 0] for part in _columns(draws.regions[:, i]))
        axes = [narrowest * (WIDEST / narrowest) ** part for part in (long, wide)]
        dy, dx, angle = y - (0.1 + 0.8 * at_y), x - (0.1 + 0.8 * at_x), turn * math.pi
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        inside = 1 - (u / axes[0]).square() - (v / axes[1]).square() + 0.7 * noise[:, i]
        there = (draws.number * REGIONS >= i).float()[:, None, None]
        mask = torch.maximum(mask, there * torch.sigmoid(torch.exp(2.5 * soft) * inside))
    return mask[:, None]


def smooth(x: Tensor, deviation: float) -> Tensor:
    """Images [N, C, S, S] under a Gaussian of this deviation, in pixels, cut off at two, mirrored at the borders."""
    reach = min(x.shape[-1] - 1, math.ceil(2 * deviation))
    places = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (places / deviation).square(), dim=0)
    flat = F.pad(x.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(flat, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).view_as(x)


def _columns(numbers: Tensor) -> list[Tensor]:
    """[N, K] as K tensors [N, 1, 1, 1]."""
    return [column[:, None, None, None] for column in numbers.unbind(dim=1)]


def _moved(images: Tensor, moves: Tensor) -> Tensor:
    """Images rolled by up to a third of their side, and some of them mirrored or turned."""
    size = images.shape[-1]
    moved = []
    for image, (down, right, flip, turn, _) in zip(images, moves.tolist(), strict=True):
        image = torch.roll(image, [round((2 * by - 1) * size / 3) for by in (down, right)], (1, 2))
        image = image.flip(-1) if flip < 0.5 else image
        moved.append(torch.rot90(image, int(4 * turn), (1, 2)) if turn < 0.5 else image)
    return torch.stack(moved)


def _shifted(images: Tensor, moves: Tensor) -> Tensor:
    """Images rolled by a few pixels, in eight directions."""
    size = images.shape[-1]
    by = max(1, round(size / 20))
    angles = moves[:, 4] * 2 * math.pi
    ways = [(round(by * math.sin(a)), round(by * math.cos(a))) for a in angles.tolist()]
    return torch.stack([torch.roll(image, way, (1, 2)) for image, way in zip(images, ways, strict=True)])
