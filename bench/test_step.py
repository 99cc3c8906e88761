"""The whole training step as training runs it: the discriminator with its penalty, then the generator."""

from __future__ import annotations

import importlib
import itertools
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
from bench.measure import Case, Compare, Contestant, checked_or_raises
from bench.networks import CLASSES, by_name, doubled, networks
from bench.peers import LAYOUTS, NO_KERNEL, label
from bench.results import fastest, milliseconds
from bench.roofline import training_step
from raccgan.config import Config, make_config
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.kernels import dispatch
from raccgan.models.compiling import CompileError
from raccgan.models.networks import Networks
from raccgan.models.randomness import stream
from raccgan.training.steps import Steps

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
    how = "recorded" if device == "cpu" else ""  # as raccgan.train runs its steps
    ours = replace(contestant(config, kernels="fused", layout="channels_last", how=how), fused=True)
    contestants = [
        # The reference is also a peer: it is what a user of eager PyTorch would write. Training runs channels_last.
        contestant(config, kernels="reference", layout="NCHW"),
        contestant(config, kernels="reference", layout="channels_last"),
        ours,
        _without_kernels(contestant(config, kernels="fused", layout="channels_last", how=how), how),
        *(contestant(config, kernels=kernels, layout="channels_last", how=how) for kernels in by_name(device)),
    ]
    if precision != "float32":  # nobody has to train in it where float32 is faster
        plain = contestant(
            replace(config, precision="float32"), kernels="reference", layout="channels_last", judged=precision
        )
        contestants.append(replace(plain, implementation="reference in float32"))
    if request.config.getoption("full"):
        others = (other for other in ("", "recorded", "compiled") if other != how)
        contestants += [contestant(config, kernels="fused", layout="channels_last", how=other) for other in others]
        if name in PUBLISHED:
            plain = contestant(config, kernels="fused", layout="channels_last", how="compiled")
            contestants.append(_without_kernels(plain, "compiled"))
        contestants = [_with_memory(_that_compiles(c), name, precision, device) for c in contestants]
    exact = networks(config, channels, device, "reference", "NCHW")
    counts = count(exact.generator), count(exact.discriminator)
    costs = training_step(config, channels, *counts, getattr(torch, precision))
    judge = replace(config, precision="float32", batch_size=checked)
    check = gradients if precision == "float32" else losses
    wanted = check(training_of(judge, doubled(exact)), *batch_of(judge, channels, device, torch.float64))
    case = Case(
        "training_step", name, getattr(torch, precision), "step", device, costs,
        tolerance=TOLERANCE[precision], images=config.batch_size,
    )  # fmt: skip
    rows = measured(case, contestants, wanted)
    eager = min(milliseconds(row) for row in rows if row.peer)
    assert fastest(rows, ours.implementation) < eager


def _contestant(
    config: Config,
    *,
    channels: int,
    device: str,
    kernels: str,
    layout: str,
    checked: int,
    judged: str | None = None,
    how: str = "",
) -> Contestant:
    """One training of its own; each call is a step on another batch.

    Args:
        checked: images that are compared with float64.
        judged: another precision than its own, as whose equal it is.
        how: its steps are "recorded", or "compiled" as well.
    """
    judged = judged or config.precision
    few = replace(config, batch_size=checked)
    made = partial(networks, config, channels, device, kernels, layout)
    x, y = batch_of(few, channels, device)
    batch = (x.contiguous(memory_format=LAYOUTS[layout]), y)
    compute = gradients if judged == "float32" else losses
    name = label(kernels, partial(compute, training_of(few, made()), *batch))
    judge = training_of(few, made(), how)
    own = judge if checked == config.batch_size else training_of(config, made(), how)
    step = steps_of(own, channels, device, layout)
    return Contestant(
        _named(name, how),
        layout,
        peer=kernels == "reference",
        fused=False,
        check=partial(compute, judge, *batch),
        call=lambda: next(step),
    )


def _named(implementation: str, how: str) -> str:
    return f"{implementation}, {how}" if how else implementation


def _that_compiles(c: Contestant) -> Contestant:
    """The same; a compiled step that does not compile here becomes a row that says so, and does not fail the case.

    In bfloat16 PyTorch 2.13 generates C++ that does not compile for the step without kernels, and on an Intel Xeon with
    AVX-512 and AMX for ours.
    """
    return checked_or_raises(c, CompileError) if c.implementation.endswith("compiled") else c


def _without_kernels(fused: Contestant, how: str) -> Contestant:
    """The same training with the reference and the pytorch backend alone, so that kernels get no credit for that."""

    def hidden(run: Callable[[], Any]) -> Callable[[], Any]:
        def run_without() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                for name in dispatch.ops():
                    op = importlib.import_module(f"raccgan.kernels.{name}.op")
                    for table in {"BACKENDS", "POINTWISE"} & vars(op).keys():
                        kept = {n: one for n, one in getattr(op, table).items() if n in ("reference", "pytorch")}
                        patch.setattr(op, table, kept)
                return run()

        return run_without

    check = hidden(fused.check)
    # What compiles cannot be watched; it is what is recorded, whose operations are.
    name = "pytorch" + NO_KERNEL if how == "compiled" else label("pytorch", check)
    return replace(fused, implementation=_named(name, how), fused=False, check=check, call=hidden(fused.call))


def _with_memory(c: Contestant, name: str, precision: str, device: str) -> Contestant:
    """The same, with the memory of its step; without kernels it could not be told apart in another process."""
    if NO_KERNEL in c.implementation:
        return c
    kernels = "reference" if c.peer else "fused"
    own = "float32" if "float32" in c.implementation else precision
    how = c.implementation.partition(", ")[2]
    arguments = (name, own, device, kernels, c.layout, how, torch.get_num_threads())

    def memory() -> float:
        code = f"import bench.test_step as t; print(t.peak_megabytes{arguments})"
        return float(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True))

    return replace(c, memory=memory)


def peak_megabytes(name: str, precision: str, device: str, kernels: str, layout: str, how: str, threads: int) -> float:
    """The most memory that steps take beyond networks and batch, optimisers and compiler included; for a fresh process
    only, since memory that was freed is taken again unseen."""
    torch.set_num_threads(threads)
    config, channels = CASES[name]
    step = stepping(replace(config, precision=precision), channels, device, kernels, layout, how)
    before = machine.memory_bytes(device)
    for _ in range(3):
        next(step)
    return (machine.peak_memory_bytes(device) - before) / 1e6


def stepping(
    config: Config,
    channels: int,
    device: str,
    kernels: str,
    layout: str,
    how: str = "recorded",
    job: Collectives = SINGLE,
) -> Iterator[Any]:
    """Steps for ever; everything that they need is made now."""
    training = training_of(config, networks(config, channels, device, kernels, layout), how, job)
    return steps_of(training, channels, device, layout)


def training_of(config: Config, made: Networks, how: str = "", job: Collectives = SINGLE) -> Steps:
    """The first phase of a training of these networks."""
    training = Steps(config, made, job)
    training.freeze("gan")
    if how:
        training.trace(compiled=how == "compiled")
    return training


def steps_of(training: Steps, channels: int, device: str, layout: str) -> Iterator[Any]:
    """Steps for ever, of this rank's slice of the batch."""
    x, y = map(training.job.own_rows, batch_of(training.config, channels, device))
    copies = [(x.clone(memory_format=LAYOUTS[layout]), y) for _ in range(4)]
    return (training.gan_step(step, *copies[step % len(copies)]) for step in itertools.count())


def batch_of(config: Config, channels: int, device: str, dtype: torch.dtype = torch.float32) -> Batch:
    draw = stream(0, "bench/batch")
    n, size = config.batch_size, config.image_size
    x = torch.rand(n, channels, size, size, generator=draw) * 2 - 1
    return x.to(device, dtype), torch.randint(CLASSES, (n,), generator=draw).to(device)


def losses(training: Steps, x: Tensor, y: Tensor) -> list[Tensor]:
    """D's loss and G's, before any weight moves; their gradients are then in the weights."""
    for network in (training.networks.discriminator, training.networks.generator):
        network.zero_grad()
    draw = stream(0, "bench/noise")
    own, n = training.job.own_rows, training.config.batch_size
    z = own(torch.randn(n, training.config.latent_size, generator=draw)).to(x)
    mix = own(torch.rand(n, 1, 1, 1, generator=draw)).to(x)
    of_d = training.differentiate("discriminator", x, y, z, mix)
    of_g = training.differentiate("generator", y, z)
    total = training.config.penalty * of_d["penalty"] - of_d["wasserstein"]
    return [torch.stack([total.to(x.dtype), of_g["generator"].to(x.dtype)])]


def gradients(training: Steps, x: Tensor, y: Tensor) -> list[Tensor]:
    """All of D's gradients in one vector, and all of G's.

    Weights after a step would not do: Adam's first step is the sign of each gradient, however small it is.
    """
    losses(training, x, y)
    both = (training.networks.discriminator, training.networks.generator)
    return [torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]) for network in both]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
