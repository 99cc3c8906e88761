"""The whole training step as training runs it: the discriminator with its penalty, then the generator."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.measure import Case, Compare, Contestant
from bench.peers import label
from bench.roofline import training_step
from raccgan.config import Config, make_config
from raccgan.data.dataset import ImageDataset
from raccgan.kernels import cbam, depthwise_separable
from raccgan.losses import critic_loss, generator_loss
from raccgan.networks import Networks, build
from raccgan.randomness import stream
from raccgan.training import Training

CLASSES = 10
# Smaller batches than the presets' 64 and 16 where a step would take many seconds on a CPU.
CASES: dict[str, tuple[Config, int]] = {
    "digits 8px b32": (make_config("digits", {}), 1),
    "32px b16": (make_config("mnist", {"batch_size": 16}), 1),
    "32px b64": (make_config("mnist", {}), 1),
    "128px b2": (make_config("mvtec", {"batch_size": 2}), 3),
}
QUICK = ("digits 8px b32", "32px b16")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

Batch = tuple[Tensor, Tensor]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in CASES])
def test_training_step(measured: Compare, device: str, name: str) -> None:
    config, channels = CASES[name]
    contestants = [
        # The reference is also a peer: it is what a user of eager PyTorch would write. Training runs channels_last.
        _contestant(config, channels, device, "reference", "NCHW"),
        _contestant(config, channels, device, "reference", "channels_last"),
        _contestant(config, channels, device, "fused", "channels_last"),
        _without_kernels(_contestant(config, channels, device, "fused", "channels_last")),
    ]
    networks = _networks(config, channels, device, "reference", "NCHW")
    wanted = _gradients(_doubled(networks), config, *_batch(config, channels, device, torch.float64))
    costs = training_step(config, channels, _count(networks.generator), _count(networks.discriminator))
    # A new generator's gradient is ill-conditioned: through norms over few pixels, max pools and millions of ReLUs,
    # float32 is hundredths off at 128 px, whoever computes it. A missing second derivative is a third off.
    case = Case("training_step", name, torch.float32, "step", device, costs, tolerance=0.1)
    measured(case, contestants, wanted)


def _contestant(config: Config, channels: int, device: str, kernels: str, layout: str) -> Contestant:
    """One training of its own; each call is a step on another batch."""
    x, y = _batch(config, channels, device)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    checked = _networks(config, channels, device, kernels, layout)
    step = _stepping(config, channels, _networks(config, channels, device, kernels, layout), (x, y))
    return Contestant(
        label(kernels, lambda: _gradients(checked, config, x, y)),
        layout,
        peer=kernels == "reference",
        fused=kernels == "fused",
        check=lambda: _gradients(checked, config, x, y),
        call=lambda: next(step),
    )


def _without_kernels(fused: Contestant) -> Contestant:
    """The same training with the reference and the rewritten algebra alone, so that kernels get no credit for that."""

    def hidden(run: Callable[[], Any]) -> Callable[[], Any]:
        def run_without() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                for family in (cbam, depthwise_separable):
                    kept = {n: one for n, one in family.IMPLEMENTATIONS.items() if n in ("reference", "rewritten")}
                    patch.setattr(family, "IMPLEMENTATIONS", kept)
                return run()

        return run_without

    check = hidden(fused.check)
    return replace(fused, implementation=label("rewritten", check), fused=False, check=check, call=hidden(fused.call))


def _stepping(config: Config, channels: int, networks: Networks, batch: Batch) -> Iterator[Any]:
    x, y = batch
    none = ImageDataset.__new__(ImageDataset)  # a step is given its batch
    training = Training(
        config, networks, none, classes=[str(i) for i in range(CLASSES)], channels=channels, path=Path(os.devnull)
    )
    training.freeze("gan")
    copies = [(x.clone(), y) for _ in range(4)]
    for step in itertools.count():
        yield training.gan_step(step, *copies[step % len(copies)])


def _batch(config: Config, channels: int, device: str, dtype: torch.dtype = torch.float32) -> Batch:
    draw = stream(0, "bench/batch")
    n, size = config.batch_size, config.image_size
    x = torch.rand(n, channels, size, size, generator=draw) * 2 - 1
    return x.to(device, dtype), torch.randint(CLASSES, (n,), generator=draw).to(device)


def _networks(config: Config, channels: int, device: str, kernels: str, layout: str) -> Networks:
    """The same weights for all, in training's state of the first phase."""
    networks = build(replace(config, kernels=kernels), channels=channels, classes=CLASSES, device=torch.device(device))
    for _, network in networks.items():
        network.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    if layout == "NCHW":  # the generator makes its first tensor channels_last, and the rest follows from that one

        def contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].contiguous(), *inputs[1:])

        networks.generator.blocks[0].register_forward_pre_hook(contiguous)
    return networks


def _doubled(networks: Networks) -> Networks:
    for _, network in networks.items():
        network.double()
    return networks


def _gradients(networks: Networks, config: Config, x: Tensor, y: Tensor) -> list[Tensor]:
    """All of D's gradients in one vector, and all of G's, before any weight moves.

    Weights after a step would not do: Adam's first step is the sign of each gradient, however small it is.
    """
    g, d = networks.generator, networks.discriminator
    draw = stream(0, "bench/noise")
    z = torch.randn(len(x), config.latent_size, generator=draw).to(x)
    mix = torch.rand(len(x), 1, 1, 1, generator=draw).to(x)
    with torch.no_grad():
        fake = g(z, y)
    terms = critic_loss(d, x, fake, y, mix)
    losses: list[tuple[nn.Module, Callable[[], Tensor]]] = [
        (d, lambda: config.penalty * terms.penalty - terms.wasserstein),
        (g, lambda: generator_loss(d, g(z, y), y)),
    ]
    vectors = []
    for network, loss in losses:
        parameters = list(network.parameters())
        found = torch.autograd.grad(loss(), parameters, allow_unused=True)
        vectors.append(torch.cat([g.flatten() for g in found if g is not None]))
    return vectors


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
