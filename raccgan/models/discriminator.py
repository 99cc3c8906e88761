"""Discriminator: how real an image is as a member of its class (a projection critic, Miyato and Koyama, 2018)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.models.blocks import ResidualDown, flattened, initialise

HEADS = ("sum", "flatten")


class Discriminator(nn.Module):
    """D(x, y): one number an image, and the features f(x) that the encoder's loss and the score compare.

    Nothing in it couples the samples of a batch, which the gradient penalty requires.

    Args:
        widths: channels after each block; all blocks but the last halve the image, so it arrives at 4 x 4.
        classes, image_channels: sizes.
        head: how features become a vector: their "sum" over pixels, or all of them ("flatten").
        attention, kind, kernels: as in :class:`raccgan.models.generator.Generator`.

    Raises:
        ValueError: no such head, or ``attention`` names no blocks.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        classes: int,
        image_channels: int,
        head: str,
        attention: Collection[int] = (),
        kind: str = "depthwise-separable",
        kernels: str = "fused",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"discriminator head {head!r} is not one of {', '.join(HEADS)}")
        last = len(widths) - 1
        self.blocks = nn.ModuleList(
            ResidualDown(c, d, pre_relu=i > 0, down=i < last, kind=kind, kernels=kernels, attention=i in attention)
            for i, (c, d) in enumerate(pairwise((image_channels, *widths)))
        )
        self.head = head
        size = widths[-1] * (16 if head == "flatten" else 1)
        self.linear = spectral_norm(nn.Linear(size, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, size))
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """f(x), [N, widths[-1], 4, 4], of images x [N, C, H, W] in [-1, 1]; no class enters."""
        for block in self.blocks:
            x = block(x)
        return F.relu(x)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Critic values [N] of images x [N, C, H, W] in [-1, 1] as members of the classes y [N] (int64)."""
        f = self.features(x)
        h = flattened(f) if self.head == "flatten" else f.sum(dim=(2, 3))
        value: Tensor = self.linear(h).squeeze(1) + (self.embedding(y) * h).sum(dim=1)
        return value
