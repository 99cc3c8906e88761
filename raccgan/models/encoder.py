"""Encoder: an image and a class to the latent from which the generator should reconstruct the image."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.config import Config
from raccgan.models.blocks import ResidualDown, flattened, initialise


class Encoder(nn.Module):
    """E(x, y): a latent for an image as a member of a class. A stem 3x3, then blocks that all halve the image.

    ``config.encoder_conditioning`` says how the class enters. "film": an embedding scales and shifts every norm of the
    trunk, and adds a term of its own to each coordinate of the latent. "scalar", the authors' form: <embedding(y), h>,
    one number, is added to all coordinates. ``config.encoder_latent`` is "linear", as z is N(0, 1); or the authors'
    "tanh", whose latents stay in [-1, 1]. ``config.encoder_head`` is "relu", before the linear layer; or the authors'
    "bare". The widths mirror the generator's.
    """

    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        widths, attended, latent = config.widths[::-1], config.attended("encoder"), config.latent_size
        embedding = config.embedding if config.encoder_conditioning == "film" else 0
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResidualDown(config, c, d, pre_relu=True, down=True, attention=i in attended, condition=embedding)
            for i, (c, d) in enumerate(pairwise(widths))
        )
        self.described = latent + sum(widths[1:])
        size = 16 * widths[-1]
        self.linear = nn.Linear(size, latent)
        self.embedding = nn.Embedding(classes, embedding or size)
        self.bare = config.encoder_head == "bare"
        if self.bare:
            spectral_norm(self.embedding)
            if config.image_size <= 32:
                spectral_norm(self.linear)
        self.class_term = nn.Linear(embedding, latent, bias=False) if embedding else None
        self.output = config.encoder_latent
        self.kernels = config.kernels
        initialise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents [N, latent] of images x [N, C, H, W] in [-1, 1] as members of the classes y [N] (int64); without y,
        of no class."""
        return self._latent(self._trunk(x, y)[-1], y)

    def describe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The latents [N, latent], and the descriptors [N, described] of :mod:`raccgan.models.density`."""
        outputs = self._trunk(x, y)
        z = self._latent(outputs[-1], y)
        return z, torch.cat([z, *(F.relu(h).mean(dim=(2, 3)) for h in outputs)], dim=1)

    def _trunk(self, x: Tensor, y: Tensor | None) -> list[Tensor]:
        condition = None if y is None or self.class_term is None else self.embedding(y)
        h, outputs = self.stem(x), []
        for block in self.blocks:
            h = block(h, condition)
            outputs.append(h)
        return outputs

    def _latent(self, h: Tensor, y: Tensor | None) -> Tensor:
        # Looked up anew: one lookup for trunk and latent would add its gradients in another order, and round otherwise.
        condition = None if y is None else self.embedding(y)
        h = flattened(h if self.bare else F.relu(h))
        z: Tensor = self.linear(h)
        if condition is not None and self.class_term is not None:
            z = z + self.class_term(condition)
        elif condition is not None:
            z = z + (condition * h).sum(dim=1, keepdim=True)
        return torch.tanh(z) if self.output == "tanh" else z
