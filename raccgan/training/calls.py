"""The calls of ops that one training step of each phase makes, listed without computing anything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raccgan.config import Config
from raccgan.kernels.qualification.record import Recorded, recorded
from raccgan.models.networks import build
from raccgan.training.steps import Steps

_PHASES = {"discriminator": "gan", "generator": "gan", "encoder": "encoder", "pathology": "pathology"}


def calls(config: Config, classes: int, channels: int, device: torch.device, world: int = 1) -> Iterator[Recorded]:
    """Every call of the losses of all networks, for the batch of one of ``world`` ranks."""
    n = config.batch_size // world
    steps = Steps(config, build(config, channels=channels, classes=classes, device=device))

    def _inputs(name: str) -> tuple[Tensor, ...]:
        image = torch.zeros(n, channels, config.image_size, config.image_size, device=device)
        image = image.contiguous(memory_format=torch.channels_last)
        y = torch.zeros(n, dtype=torch.int64, device=device)
        z = torch.zeros(n, config.latent_size, device=device)
        mix = torch.zeros(n, 1, 1, 1, device=device)
        of = {
            "discriminator": (image, y, z, mix),
            "generator": (y, z),
            "encoder": (image, y),
            "pathology": (image,) * 2,
        }
        return of[name]

    for name, phase in _PHASES.items():
        steps.freeze(phase)
        yield from recorded(lambda: steps.objectives[name](*_inputs(name)), second_order=name == "discriminator")  # noqa: B023  # called at once
