"""Encoder: an image and a class to the latent from which the generator should reconstruct the image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raccgan.models.blocks import ResidualDown, flattened, initialise

CONDITIONINGS = ("film", "scalar")
LATENTS = ("linear", "tanh")


@dataclass(frozen=True)
class EncoderForm:
    """How the class enters an encoder, and the latent leaves it.

    Args:
        conditioning: "film": an embedding scales and shifts every norm of the trunk, and adds a term of its own to each
            coordinate of the latent. "scalar", the authors' form: <embedding(y), h>, one number, is added to all
            coordinates.
        output: "linear", as z is N(0, 1); or the authors' "tanh", whose latents stay in [-1, 1].
        embedding: size of the class embedding of "film".

    Raises:
        ValueError: no such conditioning or output.
    """

    conditioning: str = "film"
    output: str = "linear"
    embedding: int = 128

    def __post_init__(self) -> None:
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"encoder conditioning {self.conditioning!r} is not one of {', '.join(CONDITIONINGS)}")
        if self.output not in LATENTS:
            raise ValueError(f"encoder latent {self.output!r} is not one of {', '.join(LATENTS)}")


class Encoder(nn.Module):
    """E(x, y): a latent for an image as a member of a class. A stem 3x3, then blocks that all halve the image.

    Args:
        widths: channels of the stem and after each block.
        classes, image_channels, latent: sizes.
        form: how the class enters, and the latent leaves.
        attention, kind, kernels: as in :class:`raccgan.models.generator.Generator`.

    Raises:
        ValueError: ``attention`` names no blocks.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        classes: int,
        image_channels: int,
        latent: int,
        form: EncoderForm = EncoderForm(),
        attention: Collection[int] = (),
        kind: str = "depthwise-separable",
        kernels: str = "fused",
    ) -> None:
        super().__init__()
        film, embedding = form.conditioning == "film", form.embedding
        self.stem = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResidualDown(
                c, d, pre_relu=True, down=True, kind=kind, kernels=kernels,
                attention=i in attention, condition=embedding if film else 0,
            )
            for i, (c, d) in enumerate(pairwise(widths))
        )  # fmt: skip
        self.described = latent + sum(widths[1:])
        size = 16 * widths[-1]
        self.linear = nn.Linear(size, latent)
        self.embedding = nn.Embedding(classes, embedding if film else size)
        self.class_term = nn.Linear(embedding, latent, bias=False) if film else None
        self.output = form.output
        self.kernels = kernels
        initialise(self)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Latents [N, latent] of images x [N, C, H, W] in [-1, 1] as members of the classes y [N] (int64)."""
        return self._latent(self._trunk(x, y)[-1], y)

    def describe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [N, latent], and the descriptors [N, described] of :mod:`raccgan.models.density`.

        A descriptor is the latent, and the mean activation of every channel after each block.
        """
        outputs = self._trunk(x, y)
        z = self._latent(outputs[-1], y)
        return z, torch.cat([z, *(F.relu(h).mean(dim=(2, 3)) for h in outputs)], dim=1)

    def _trunk(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The output of each block."""
        condition = self.embedding(y) if self.class_term is not None else None
        h, outputs = self.stem(x), []
        for block in self.blocks:
            h = block(h, condition)
            outputs.append(h)
        return outputs

    def _latent(self, h: Tensor, y: Tensor) -> Tensor:
        condition = self.embedding(y)
        h = flattened(F.relu(h))
        z: Tensor = self.linear(h)
        if self.class_term is not None:
            z = z + self.class_term(condition)
        else:
            z = z + (condition * h).sum(dim=1, keepdim=True)
        return torch.tanh(z) if self.output == "tanh" else z
