"""The losses: Wasserstein with gradient penalty for G and D (Gulrajani et al., 2017), izi_f for E (f-AnoGAN)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.models.discriminator import Discriminator
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator


class CriticLoss(NamedTuple):
    """``wasserstein`` is E[D(real)] - E[D(fake)], what D maximises; ``penalty`` is not weighted yet."""

    wasserstein: Tensor
    penalty: Tensor


def critic_loss(critic: Discriminator, real: Tensor, fake: Tensor, y: Tensor, mix: Tensor) -> CriticLoss:
    """The two terms of the discriminator's loss (WGAN-GP, Gulrajani et al., 2017), scalars.

    Args:
        real, fake: [N, C, H, W] in [-1, 1]; ``fake`` without graph.
        y: classes of both, [N] int64.
        mix: where between real and fake each interpolate lies, [N, 1, 1, 1] in [0, 1].

    Gradients: first order, for the critic's weights.
    """
    value_real, value_fake = critic(torch.cat([real, fake]), torch.cat([y, y])).chunk(2)
    return CriticLoss(
        wasserstein=value_real.mean() - value_fake.mean(),
        penalty=gradient_penalty(critic, torch.lerp(real, fake, mix), y),
    )


def gradient_penalty(critic: Discriminator, x: Tensor, y: Tensor) -> Tensor:
    """The mean over samples of (|dD(x, y)/dx| - 1)^2, not weighted: a scalar of at least float32.

    Args:
        x: the points [N, C, H, W] at which the gradient is taken; gradients do not reach it.
        y: their classes [N].

    Gradients: first order, for the critic's weights; they differentiate the critic twice.
    """
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(x, y).sum(), x, create_graph=True)
    wide = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide.norm(dim=1) - 1).square().mean()


def generator_loss(critic: Discriminator, fake: Tensor, y: Tensor) -> Tensor:
    """-E[D(fake)], a scalar, for images [N, C, H, W] of classes y [N]. Gradients: any order, for all weights."""
    return -critic(fake, y).mean()


class EncoderLoss(NamedTuple):
    """The two terms of izi_f, kappa not applied yet."""

    image: Tensor
    feature: Tensor


def encoder_loss(encoder: Encoder, generator: Generator, critic: Discriminator, x: Tensor, y: Tensor) -> EncoderLoss:
    """mean (x - x')^2 and mean (f(x) - f(x'))^2 with x' = G(E(x, y), y) (f-AnoGAN, Schlegl et al., 2019).

    The gradient of both terms reaches E, that of the second through f and G. G's weights are trained too if they
    require gradients, which the caller decides; f's should not.

    Args:
        x: images [N, C, H, W] in [-1, 1].
        y: their classes [N] int64.
    """
    x_hat = generator(encoder(x, y), y)
    with torch.no_grad():
        f = critic.features(x)
    return EncoderLoss(image=F.mse_loss(x_hat, x), feature=F.mse_loss(critic.features(x_hat), f))
