"""The whole networks that a step and the scorer run: the same weights for everyone, in either memory layout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.peers import LAYOUTS
from raccgan.config import Config
from raccgan.kernels import dispatch
from raccgan.models.networks import Networks, build

CLASSES = 10


def by_name(device: str) -> list[str]:
    """The kernels of ours that take part by their name: on a GPU, where ``fused`` passes over what was not measured
    yet, those that serve every op there."""
    if device != "cuda":
        return []

    def serves(kernels: str) -> bool:
        try:
            dispatch.require(kernels, torch.device(device))
        except dispatch.KernelError:
            return False
        return True

    return [kernels for kernels in ("native", "triton") if serves(kernels)]


def networks(config: Config, image_channels: int, device: str, kernels: str, layout: str) -> Networks:
    """New networks of a configuration, with the weights of its seed."""
    config = replace(config, kernels=kernels)
    made = build(config, channels=image_channels, classes=CLASSES, device=torch.device(device))
    for _, network in made.items():
        network.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    if layout == "NCHW":  # a generator makes its first tensor channels_last, and the rest follows from that one

        def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].contiguous(), *inputs[1:])

        for generator in (made.generator, made.average):
            generator.blocks[0].register_forward_pre_hook(contiguous)
    return made


def doubled(made: Networks) -> Networks:
    """The same networks, in float64 from now on."""
    for _, network in made.items():
        network.double()
    return made
