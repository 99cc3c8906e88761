"""The losses: Wasserstein with gradient penalty for G and D (Gulrajani et al., 2017), izi_f for E (f-AnoGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.config import Config
from raccgan.models.discriminator import Discriminator
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator
from raccgan.models.networks import Networks
from raccgan.models.trace import Terms


class Losses:
    """The losses of D, of G and of E, each with the terms that are reported of it, in the configured precision.

    A loss is the mean over the N samples that it is given: with several ranks, over this rank's slice of the batch.
    """

    def __init__(self, config: Config, networks: Networks) -> None:
        self.config, self.networks = config, networks

    def discriminator(self, real: Tensor, y: Tensor, z: Tensor, mix: Tensor) -> tuple[Tensor, Terms]:
        """penalty * gradient penalty - (E[D(real)] - E[D(fake)]), whose gradients reach D's weights.

        Images ``real`` [N, C, H, W] in [-1, 1] and the images that G makes of latents z [N, latent] are of the classes
        y [N]; ``mix`` [N, 1, 1, 1] in [0, 1] is where between real and fake each interpolate lies.
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
            loss = -d(g(z, y), y).mean()
        return loss, {"generator": loss.detach()}

    def encoder(self, x: Tensor, y: Tensor) -> tuple[Tensor, Terms]:
        """The image term + kappa * the feature term, for images x [N, C, H, W] in [-1, 1] of classes y [N]."""
        nets = self.networks
        with self._precision(x):
            image, feature = encoder_loss(nets.encoder, nets.average, nets.discriminator, x, y)
        return image + self.config.kappa * feature, {"image": image.detach(), "feature": feature.detach()}

    def _precision(self, t: Tensor) -> torch.autocast:
        return torch.autocast(t.device.type, dtype=torch.bfloat16, enabled=self.config.precision != "float32")


def critic_loss(critic: Discriminator, real: Tensor, fake: Tensor, y: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """E[D(real)] - E[D(fake)], which D maximises, and the gradient penalty between real and fake: scalars.

    Arguments as of :meth:`Losses.discriminator`; ``fake`` is without graph. Gradients: first order, for D's weights.
    """
    value_real, value_fake = critic(torch.cat([real, fake]), torch.cat([y, y])).chunk(2)
    wasserstein = value_real.mean() - value_fake.mean()
    return wasserstein, gradient_penalty(critic, torch.lerp(real, fake, mix), y)


def gradient_penalty(critic: Discriminator, x: Tensor, y: Tensor) -> Tensor:
    """The mean over samples x [N, C, H, W] of classes y [N] of (|dD(x, y)/dx| - 1)^2: a scalar of at least float32.

    Gradients: first order, for the critic's weights; they differentiate the critic twice.
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x, y).sum(), x, create_graph=True)
    wide = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide.norm(dim=1) - 1).square().mean()


def encoder_loss(
    encoder: Encoder, generator: Generator, critic: Discriminator, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """mean (x - x')^2 and mean (f(x) - f(x'))^2 with x' = G(E(x, y), y) (f-AnoGAN, Schlegl et al., 2019).

    The gradient of both terms reaches E, that of the second through f and G. G's weights are trained too if they
    require gradients, which the caller decides; f's should not. x is [N, C, H, W] in [-1, 1], y [N] (int64).
    """
    x_hat = generator(encoder(x, y), y)
    with torch.no_grad():
        f = critic.features(x)
    return F.mse_loss(x_hat, x), F.mse_loss(critic.features(x_hat), f)
