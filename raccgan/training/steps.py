"""One step of each phase of training: random draws, then for each loss its gradients, their mean over ranks, Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raccgan.config import Config
from raccgan.data.synthesis import Draws, synthetic
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.models.blocks import Coupling, couple
from raccgan.models.networks import Networks, update_average
from raccgan.models.randomness import stream
from raccgan.models.trace import Objective, Terms, TracedStep
from raccgan.training.losses import Losses

PATHOLOGY_LR = 4e-4  # of Adam, at first


class Steps:
    """The networks of a configuration, which are trained in place, their optimisers, and one step of each phase.

    The random draws of a step are functions of (seed, phase, step) alone. With several ranks each computes its slice of
    the batch, all have the same weights after every step, and rank 0 alone keeps the generator's average.
    """

    def __init__(self, config: Config, networks: Networks, job: Collectives = SINGLE) -> None:
        self.config, self.networks, self.job = config, networks, job
        self.device = next(networks.generator.parameters()).device
        # f-AnoGAN freezes the G that E is trained against; its reconstructions are then as blurred as its samples.
        tuned = [networks.average] if config.generator_tuning > 0 else []
        self._reconstructing: list[nn.Module] = [networks.encoder, *tuned]
        losses = Losses(config, networks)
        self.objectives: dict[str, Objective] = {
            "discriminator": losses.discriminator,
            "generator": losses.generator,
            "encoder": losses.encoder,
            "pathology": losses.pathology,
        }
        # fused: a quarter of the time of the default's loop over weights on a CPU, 1.5 of a digits step's 25 ms.
        adam = partial(torch.optim.Adam, fused=True)
        adversary: dict[str, Any] = {"betas": (0.0, 0.999), "eps": 1e-6}
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "generator": adam(networks.generator.parameters(), lr=config.generator_lr, **adversary),
            "discriminator": adam(networks.discriminator.parameters(), lr=config.discriminator_lr, **adversary),
            "encoder": adam([{"params": list(learning.parameters())} for learning in self._reconstructing]),
            "pathology": adam(networks.pathology.parameters(), lr=PATHOLOGY_LR),
        }
        self.traced: dict[str, TracedStep] = {}  # by network, what takes the place of its objective and autograd
        if job.world > 1:
            for _, network in networks.items():
                couple(network, Coupling(job.world, job.shared_moments))

    def freeze(self, phase: str) -> None:
        """Set which networks learn in this phase, and put the others in eval mode."""
        learning = {"generator", "discriminator"} if phase == "gan" else {phase}
        for name, network in self.networks.items():
            network.train(name in learning).requires_grad_(name in learning)
        if phase == "encoder":
            for network in self._reconstructing:
                network.requires_grad_(True)  # G's moving average stays in eval mode, as it scores

    def gan_step(self, step: int, x: Tensor, y: Tensor) -> Terms:
        """``critic_steps`` discriminator steps on slices of the batch, then one generator step; what they report."""
        draw = stream(self.config.seed, "gan", step)
        n = self.config.batch_size // self.job.world
        for real, label in zip(x.split(n), y.split(n), strict=True):
            z = self._latents(draw)
            mix = self._own(torch.rand(self.config.batch_size, 1, 1, 1, generator=draw))
            terms = self._descend("discriminator", real, label, z, mix)
        terms = terms | self._descend("generator", y[-n:], self._latents(draw))
        if self.job.first:
            # The average has a short memory at first: it would otherwise hold on to the random weights of the start.
            decay = min(self.config.ema, (1 + step) / (10 + step))
            update_average(self.networks.average, self.networks.generator, decay)
        return terms

    def encoder_step(self, step: int, x: Tensor, y: Tensor) -> Terms:
        """One step on izi_f, and what it reports; the learning rates fall to zero on a cosine."""
        rate = self.config.encoder_lr * 0.5 * (1 + math.cos(math.pi * step / self.config.encoder_steps))
        shares = (1.0, self.config.generator_tuning)
        for group, share in zip(self.optimisers["encoder"].param_groups, shares, strict=False):
            group["lr"] = rate * share
        return self._descend("encoder", x, y)

    def pathology_step(self, step: int, x: Tensor, y: Tensor) -> Terms:
        """One step that tells normal images from synthetic pathologies; the learning rate falls to zero in the last
        fifth.

        x are three batches: normal images, those that get a pathology, and those of which parts are pasted.
        """
        del y
        draw = stream(self.config.seed, "pathology", step)
        n = self.config.batch_size
        draws = Draws(*(self.job.own_rows(part) for part in Draws.of(n, self.config.image_size, draw)))
        shift = torch.randint(-(self.config.image_size // 20), self.config.image_size // 20 + 1, (2,), generator=draw)
        x = torch.roll(x, tuple(shift.tolist()), (2, 3))
        x = x.flip(-1) if torch.rand(1, generator=draw) < 0.5 else x
        normal, base, other = x.chunk(3)
        ill, _ = synthetic(base, other, Draws(*(part.to(self.device) for part in draws)))
        # A trace is of one memory format, whether the images were turned or not.
        normal, ill = (each.contiguous(memory_format=torch.channels_last) for each in (normal, ill))
        for group in self.optimisers["pathology"].param_groups:
            group["lr"] = PATHOLOGY_LR * min(1.0, 5 * (1 - step / self.config.pathology_steps))
        return self._descend("pathology", normal, ill)

    def _descend(self, name: str, *inputs: Tensor) -> Terms:
        self.optimisers[name].zero_grad(set_to_none=True)
        terms = self.differentiate(name, *inputs)
        self.job.average_gradients(self._weights(name))
        self.optimisers[name].step()
        return terms

    def differentiate(self, name: str, *inputs: Tensor) -> Terms:
        """Leave the gradients of a network's loss in its weights, which have none yet, and return the loss's terms."""
        if name in self.traced:
            return self.traced[name](*inputs)
        loss, terms = self.objectives[name](*inputs)
        loss.backward()
        return terms

    def _latents(self, draw: torch.Generator) -> Tensor:
        return self._own(torch.randn(self.config.batch_size, self.config.latent_size, generator=draw))

    def _own(self, batch: Tensor) -> Tensor:
        return self.job.own_rows(batch).to(self.device)

    def trace(self, *, compiled: bool = False, warn: Callable[[str], None] | None = None) -> None:
        """Have the next steps trace and replay their losses, see :class:`raccgan.models.trace.TracedStep` for the
        arguments. :func:`cannot_trace` says where that is impossible.
        """
        networks = [network for _, network in self.networks.items()]
        traced = partial(TracedStep, compiled=compiled, rounded=self.config.precision != "float32", warn=warn)
        self.traced = {
            name: traced(objective, self._weights(name), networks) for name, objective in self.objectives.items()
        }

    def _weights(self, name: str) -> list[nn.Parameter]:
        return [weight for group in self.optimisers[name].param_groups for weight in group["params"]]


def cannot_trace(config: Config, job: Collectives = SINGLE) -> str | None:
    """Why the steps of a configuration cannot be traced, in one line; None if they can."""
    if job.world > 1:
        return "in one process only: ranks exchange moments in the middle of a step"
    if config.kernels == "reference":
        return "not with --kernels reference, whose gradient penalty is a loop over channels, each with ops of its own"
    return None
