"""Pathology head: how much an image looks like a synthetic pathology, and what its trunk sees on the way.

The head belongs to no gradient penalty: a critic under one does not learn to tell its conditions apart. As in an
auxiliary-classifier GAN (Odena et al., 2017) it is a classifier; unlike there it has a trunk of its own, since one that
is shared with the critic learns it more slowly and less.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raccgan.config import Config
from raccgan.models.blocks import ResidualDown, initialise
from raccgan.models.maps import contrasts

PLACES = 8
"""Places on each side of an image of 32 px and more; below, places are at least four pixels wide."""
GRIDS = (4, 8, 16)
"""Regions on each side of an image in which its contrast is taken; they are at least two pixels wide."""
DEPTH = 3
"""The most blocks, counted from the image, whose features are compared place by place."""


class Observed(NamedTuple):
    """What is seen of N images, under no class."""

    logit: Tensor  # [N]: of being a synthetic pathology
    features: Tensor  # [N, 2 P]: mean and deviation of the P channels of all blocks
    places: Tensor  # [N, L, Q]: mean of the Q channels of the first blocks at each of L places
    contrast_4: Tensor  # [N, 32]: logarithms of the contrast of image and detail, in 4 x 4 regions
    contrast_8: Tensor  # [N, 128]: likewise; images of few pixels have fewer regions
    contrast_16: Tensor  # [N, 512]


class Pathology(nn.Module):
    """A trunk of the discriminator's form, and a linear head over the mean of its last features.

    Its widths are its own: ``config.pathology_width`` after the first block, twice that after the second, four times
    that after all others. It trains without a penalty, in about a minute.

    Args:
        config, channels: as of :class:`raccgan.models.generator.Generator`.
    """

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        last = len(config.widths) - 1
        widths = [config.pathology_width * min(4, 2**i) for i in range(last + 1)]
        self.blocks = nn.ModuleList(
            ResidualDown(config, c, d, pre_relu=i > 0, down=i < last, attention=False)
            for i, (c, d) in enumerate(pairwise((channels, *widths)))
        )
        self.linear = nn.Linear(widths[-1], 1)
        self.places = min(PLACES, config.image_size // 4)
        sides = [max(4, config.image_size >> (i + 1)) for i in range(len(widths))]
        self.placed = min(DEPTH, sum(side >= self.places for side in sides))
        self.sizes = {
            "features": 2 * sum(widths),
            "places": sum(widths[: self.placed]),
            **{f"contrast_{grid}": 2 * min(grid, config.image_size // 2) ** 2 for grid in GRIDS},
        }
        """Coordinates of each vector of :class:`Observed`."""
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N] of images x [N, C, H, W] in [-1, 1]; higher is more like a pathology."""
        return self._logit(self._trunk(x)[-1])

    def observe(self, x: Tensor) -> Observed:
        """All of :class:`Observed` of images x [N, C, H, W] in [-1, 1]."""
        outputs = self._trunk(x)
        means = [h.mean(dim=(2, 3)) for h in outputs]
        centred = (h - mean[:, :, None, None] for h, mean in zip(outputs, means, strict=True))
        deviations = [h.square().mean(dim=(2, 3)).sqrt() for h in centred]
        at = [F.avg_pool2d(h, h.shape[-1] // self.places).flatten(2) for h in outputs[: self.placed]]
        grids = (contrasts(x, min(grid, x.shape[-1] // 2)) for grid in GRIDS)
        return Observed(
            self._logit(outputs[-1]), torch.cat([*means, *deviations], dim=1), torch.cat(at, dim=1).mT, *grids
        )

    def _trunk(self, x: Tensor) -> list[Tensor]:
        """The output of each block."""
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def _logit(self, h: Tensor) -> Tensor:
        logit: Tensor = self.linear(F.relu(h).mean(dim=(2, 3))).squeeze(1)
        return logit
