"""Discriminator: how real an image is as a member of its class (a projection critic, Miyato and Koyama, 2018)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.config import Config
from raccgan.models.blocks import ResidualDown, flattened, initialise


class Discriminator(nn.Module):
    """D(x, y): one number an image, and the features f(x) that the encoder's loss and the score compare.

    All blocks but the last halve the image, so it arrives at 4 x 4. The head takes the sum of the features over pixels,
    or all of them. Nothing couples the samples of a batch, which the gradient penalty requires. The widths mirror the
    generator's.
    """

    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        widths, attended = config.widths[::-1], config.attended("discriminator")
        last = len(widths) - 1
        self.blocks = nn.ModuleList(
            ResidualDown(config, c, d, pre_relu=i > 0, down=i < last, attention=i in attended)
            for i, (c, d) in enumerate(pairwise((channels, *widths)))
        )
        self.head, self.sums = config.head, config.features == "sums"
        size = widths[-1] * (16 if self.head == "flatten" else 1)
        self.linear = spectral_norm(nn.Linear(size, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, size))
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """f(x), [N, widths[0], 4, 4] or, where the configuration asks for sums, [N, widths[0]], of images x
        [N, C, H, W] in [-1, 1]; no class enters."""
        h = self._trunk(x)
        return h.sum(dim=(2, 3)) if self.sums else h

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Critic values [N] of images x [N, C, H, W] in [-1, 1] as members of the classes y [N] (int64); without y, as
        of no class."""
        f = self._trunk(x)
        h = flattened(f) if self.head == "flatten" else f.sum(dim=(2, 3))
        value: Tensor = self.linear(h).squeeze(1)
        return value if y is None else value + (self.embedding(y) * h).sum(dim=1)

    def _trunk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.relu(x)
