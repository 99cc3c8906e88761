"""The whole training step as training runs it: the discriminator with its penalty, then the generator."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import machine
from bench.measure import Case, Compare, Contestant
from bench.networks import CLASSES, doubled, networks
from bench.peers import LAYOUTS, NO_KERNEL, label
from bench.results import fastest, milliseconds
from bench.roofline import training_step
from raccgan import reductions
from raccgan.config import Config, make_config
from raccgan.data.dataset import ImageDataset
from raccgan.kernels import cbam, depthwise_separable, moments
from raccgan.losses import critic_loss, generator_loss
from raccgan.networks import Networks
from raccgan.randomness import stream
from raccgan.training import Training

# Smaller batches than the presets' 64 and 16 where a step would take many seconds on a CPU.
CASES: dict[str, tuple[Config, int]] = {
    "digits 8px b32": (make_config("digits", {}), 1),
    "32px b16": (make_config("mnist", {"batch_size": 16}), 1),
    "32px b64": (make_config("mnist", {}), 1),
    "128px b4": (make_config("mvtec", {"batch_size": 4}), 3),
    "128px b64": (make_config("mvtec", {"batch_size": 64}), 3),
}
LARGE = "128px b64"
CHECKED = {LARGE: 4}  # images that are compared with float64, where all would not fit a GPU
QUICK = {("digits 8px b32", "float32"), ("32px b16", "float32"), (LARGE, "bfloat16")}
PUBLISHED = ("32px b64", "128px b4")


def _marks(name: str, precision: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.large] if name == LARGE else []
    if name in PUBLISHED:
        marks.append(pytest.mark.published)
    return marks if (name, precision) in QUICK else [*marks, pytest.mark.full]


PARAMETERS = [
    pytest.param(name, precision, marks=_marks(name, precision))
    for name in CASES
    for precision in ("float32", "bfloat16")
    # There instance norms over four pixels bring everyone's penalty in bfloat16 up to 0.4 off, eager PyTorch's too.
    if (name, precision) != ("digits 8px b32", "bfloat16")
]
# How far from float64 the gradients may be, and in bfloat16 the losses. A new generator's gradient is ill-conditioned:
# through norms over few pixels, max pools and millions of ReLUs, float32 is hundredths off at 128 px, whoever computes
# it. A missing second derivative is a third off. In bfloat16 eager PyTorch's own gradients are off by more than their
# largest value, so there the losses are compared, of which the penalty holds the first derivative: up to 0.1 off.
TOLERANCE = {"float32": 0.1, "bfloat16": 0.3}

Batch = tuple[Tensor, Tensor]


@pytest.mark.parametrize(("name", "precision"), PARAMETERS)
def test_training_step(
    measured: Compare, device: str, name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    config, channels = CASES[name]
    config = replace(config, precision=precision)
    checked = CHECKED.get(name, config.batch_size)
    contestant = partial(_contestant, channels=channels, device=device, checked=checked)
    fused = contestant(config, kernels="fused", layout="channels_last")
    contestants = [
        # The reference is also a peer: it is what a user of eager PyTorch would write. Training runs channels_last.
        contestant(config, kernels="reference", layout="NCHW"),
        contestant(config, kernels="reference", layout="channels_last"),
        fused,
        _without_kernels(contestant(config, kernels="fused", layout="channels_last")),
    ]
    if precision != "float32":  # nobody has to train in it where float32 is faster
        plain = contestant(
            replace(config, precision="float32"), kernels="reference", layout="channels_last", judged=precision
        )
        contestants.append(replace(plain, implementation="reference in float32"))
    if request.config.getoption("full"):
        contestants = [_with_memory(c, name, precision, device) for c in contestants]
    exact = networks(config, channels, device, "reference", "NCHW")
    counts = count(exact.generator), count(exact.discriminator)
    costs = training_step(config, channels, *counts, getattr(torch, precision))
    judge = replace(config, precision="float32", batch_size=checked)
    check = gradients if precision == "float32" else _loss_values
    wanted = check(doubled(exact), judge, *batch_of(judge, channels, device, torch.float64))
    case = Case(
        "training_step", name, getattr(torch, precision), "step", device, costs,
        tolerance=TOLERANCE[precision], images=config.batch_size,
    )  # fmt: skip
    rows = measured(case, contestants, wanted)
    eager = min(milliseconds(row) for row in rows if row.peer)
    assert fastest(rows, fused.implementation) < eager


def _contestant(
    config: Config, *, channels: int, device: str, kernels: str, layout: str, checked: int, judged: str | None = None
) -> Contestant:
    """One training of its own; each call is a step on another batch.

    ``checked`` images are compared with float64; ``judged``: another precision than its own, as whose equal it is.
    """
    judged = judged or config.precision
    few = replace(config, batch_size=checked)
    made = networks(config, channels, device, kernels, layout)
    check = partial(gradients if judged == "float32" else _loss_values, made, few, *batch_of(few, channels, device))
    step = stepping(config, channels, device, kernels, layout)
    return Contestant(
        label(kernels, check),
        layout,
        peer=kernels == "reference",
        fused=kernels == "fused",
        check=check,
        call=lambda: next(step),
    )


def _without_kernels(fused: Contestant) -> Contestant:
    """The same training with the reference and the rewritten algebra alone, so that kernels get no credit for that."""

    def hidden(run: Callable[[], Any]) -> Callable[[], Any]:
        def run_without() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                for family in (cbam, depthwise_separable, moments):
                    kept = {n: one for n, one in family.IMPLEMENTATIONS.items() if n in ("reference", "rewritten")}
                    patch.setattr(family, "IMPLEMENTATIONS", kept)
                return run()

        return run_without

    check = hidden(fused.check)
    return replace(fused, implementation=label("rewritten", check), fused=False, check=check, call=hidden(fused.call))


def _with_memory(c: Contestant, name: str, precision: str, device: str) -> Contestant:
    """The same, with the memory of its step; without kernels it could not be told apart in another process."""
    if NO_KERNEL in c.implementation:
        return c
    kernels = "fused" if c.fused else "reference"
    own = "float32" if "float32" in c.implementation else precision
    arguments = (name, own, device, kernels, c.layout, torch.get_num_threads())

    def memory() -> float:
        code = f"import bench.test_step as t; print(t.peak_megabytes{arguments})"
        return float(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True))

    return replace(c, memory=memory)


def peak_megabytes(name: str, precision: str, device: str, kernels: str, layout: str, threads: int) -> float:
    """The most memory that steps take beyond networks and batch, optimisers included; for a fresh process only, since
    memory that was freed is taken again unseen."""
    torch.set_num_threads(threads)
    config, channels = CASES[name]
    step = stepping(replace(config, precision=precision), channels, device, kernels, layout)
    before = machine.memory_bytes(device)
    for _ in range(3):
        next(step)
    return (machine.peak_memory_bytes(device) - before) / 1e6


def stepping(config: Config, channels: int, device: str, kernels: str, layout: str) -> Iterator[Any]:
    """Steps for ever, of this rank's slice of the batch; everything that they need is made now."""
    x, y = map(reductions.own_rows, batch_of(config, channels, device))
    copies = [(x.clone(memory_format=LAYOUTS[layout]), y) for _ in range(4)]
    made = networks(config, channels, device, kernels, layout)
    none = ImageDataset.__new__(ImageDataset)  # a step is given its batch
    training = Training(
        config, made, none, classes=[str(i) for i in range(CLASSES)], channels=channels, path=Path(os.devnull)
    )
    training.freeze("gan")
    return (training.gan_step(step, *copies[step % len(copies)]) for step in itertools.count())


def batch_of(config: Config, channels: int, device: str, dtype: torch.dtype = torch.float32) -> Batch:
    draw = stream(0, "bench/batch")
    n, size = config.batch_size, config.image_size
    x = torch.rand(n, channels, size, size, generator=draw) * 2 - 1
    return x.to(device, dtype), torch.randint(CLASSES, (n,), generator=draw).to(device)


def _losses(networks: Networks, config: Config, x: Tensor, y: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """D and its loss, G and its loss, before any weight moves."""
    g, d = networks.generator, networks.discriminator
    draw = stream(0, "bench/noise")
    in_precision = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    z = reductions.own_rows(torch.randn(config.batch_size, config.latent_size, generator=draw)).to(x)
    mix = reductions.own_rows(torch.rand(config.batch_size, 1, 1, 1, generator=draw)).to(x)
    with torch.no_grad(), in_precision():
        fake = g(z, y).to(x.dtype)
    with in_precision():
        terms = critic_loss(d, x, fake, y, mix)
        generator = generator_loss(d, g(z, y), y)
    return [(d, config.penalty * terms.penalty - terms.wasserstein), (g, generator)]


def _loss_values(networks: Networks, config: Config, x: Tensor, y: Tensor) -> list[Tensor]:
    return [torch.stack([loss.detach().to(x.dtype) for _, loss in _losses(networks, config, x, y)])]


def gradients(networks: Networks, config: Config, x: Tensor, y: Tensor) -> list[Tensor]:
    """All of D's gradients in one vector, and all of G's.

    Weights after a step would not do: Adam's first step is the sign of each gradient, however small it is.
    """
    vectors = []
    for network, loss in _losses(networks, config, x, y):
        parameters = list(network.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        vectors.append(torch.cat([g.flatten() for g in found if g is not None]))
    return vectors


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
