"""The objectives of the optimisers: the losses of a configuration, as functions of one step's tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from raccgan.config import Config
from raccgan.models.networks import Networks
from raccgan.models.trace import Objective, Terms
from raccgan.training.losses import critic_loss, encoder_loss, generator_loss


class Objectives:
    """The losses of D, of G and of E, each with the terms that are reported of it, in the configured precision.

    A loss is the mean over the N samples that it is given: with several ranks, over this rank's slice of the batch.
    """

    def __init__(self, config: Config, networks: Networks) -> None:
        self.config, self.networks = config, networks

    def of(self, name: str) -> Objective:
        """The loss of the "discriminator", the "generator" or the "encoder"."""
        losses: dict[str, Objective] = {
            "discriminator": self.discriminator,
            "generator": self.generator,
            "encoder": self.encoder,
        }
        return losses[name]

    def discriminator(self, real: Tensor, y: Tensor, z: Tensor, mix: Tensor) -> tuple[Tensor, Terms]:
        """penalty * gradient penalty - (E[D(real)] - E[D(fake)]), whose gradients reach D's weights.

        Args:
            real: images [N, C, H, W] in [-1, 1].
            y: their classes [N], and those of the images that G makes of ``z``.
            z: latents [N, latent].
            mix: where between real and fake each interpolate lies, [N, 1, 1, 1] in [0, 1].
        """
        g, d = self.networks.generator, self.networks.discriminator.requires_grad_(True)
        with torch.no_grad(), self._precision(real):
            fake = g(z, y).to(real.dtype)
        with self._precision(real):
            wasserstein, penalty = critic_loss(d, real, fake, y, mix)
        loss = self.config.penalty * penalty - wasserstein
        return loss, {"wasserstein": wasserstein.detach(), "penalty": penalty.detach()}

    def generator(self, y: Tensor, z: Tensor) -> tuple[Tensor, Terms]:
        """-E[D(G(z, y), y)], whose gradients reach G's weights, for classes y [N] and latents z [N, latent]."""
        g, d = self.networks.generator, self.networks.discriminator.requires_grad_(False)
        with self._precision(z):
            loss = generator_loss(d, g(z, y), y)
        return loss, {"generator": loss.detach()}

    def encoder(self, x: Tensor, y: Tensor) -> tuple[Tensor, Terms]:
        """The image term + kappa * the feature term, for images x [N, C, H, W] in [-1, 1] of classes y [N]."""
        with self._precision(x):
            terms = encoder_loss(self.networks.encoder, self.networks.average, self.networks.discriminator, x, y)
        loss = terms.image + self.config.kappa * terms.feature
        return loss, {"image": terms.image.detach(), "feature": terms.feature.detach()}

    def _precision(self, t: Tensor) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(t.device.type, dtype=torch.bfloat16)
