"""Chooses sizes and steps for data that no preset was made for: what a time allows on this machine.

The networks of a rung are trained for a few steps, timed, and thrown away. A run with the settings that were chosen,
given as options, is the same run.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raccgan.config import Config
from raccgan.data.inventory import typical_side
from raccgan.data.samples import Sample, spread
from raccgan.distributed.collectives import SINGLE
from raccgan.errors import InputError
from raccgan.evaluation.controls import autoencoder
from raccgan.outputs.terminal import say
from raccgan.scoring.calibration import SYNTHETIC
from raccgan.scoring.scorer import Scorer
from raccgan.training.loop import PHASES, Training
from raccgan.training.run import Run

MINUTES = {"cpu": 20.0, "cuda": 60.0}
STEPS = {phase: f"{phase}_steps" for phase in PHASES}
TRIED = 4  # steps of each phase that are timed, after one that traces
SEEN = 64  # images that are scored to time it
# Of a rung's steps. On chest X-rays a fifth of them at 64 px had an AUROC of 0.857, and 0.8 of them at 32 px, in about
# the same time, 0.819.
ENOUGH = 0.2
MOST = 3.0  # times a rung's steps
ROOM = 1.1  # pictures, tables, checkpoints, and the controls that need no network


class Rung(NamedTuple):
    """Networks of one size, and steps that train them well where that was measured: docs/results.md."""

    image_size: int
    base_width: int
    multipliers: str
    batch_size: int
    gan_steps: int
    encoder_steps: int
    seconds: float  # of all steps on one core of an AMD EPYC: which rungs are worth timing


LADDER = (
    Rung(8, 32, "2,1", 32, 2500, 1000, 90),
    Rung(16, 32, "", 32, 3000, 1500, 250),
    Rung(32, 16, "4,4,2,1", 16, 2000, 2000, 300),
    Rung(64, 16, "4,4,2,2,1", 16, 2000, 2000, 690),
    Rung(128, 16, "4,4,4,2,2,1", 16, 2000, 2000, 2500),
    Rung(128, 96, "", 16, 20000, 10000, 120_000),  # the published widths; an estimate
)
PATHOLOGY_STEPS = 1000


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    once: Mapping[str, float]  # of each phase: the trace
    step: Mapping[str, float]
    rest: float  # reading, fits, thresholds, tests, controls
    threads: int  # with which this was measured; 0 for PyTorch's own choice

    def of(self, steps: Mapping[str, int]) -> float:
        """Training for so many steps of each phase, and the rest."""
        return self.rest + sum(self.once[phase] + self.step[phase] * count for phase, count in steps.items())


def planned(run: Run, given: Mapping[str, Any], minutes: float | None) -> Config:
    """The run's configuration with sizes and steps that take so long, tests and controls among it; says which.

    Args:
        run: with the rest of its configuration settled.
        given: settings that the user chose, which stay. Where all steps are among them nothing is timed.
        minutes: None for :data:`MINUTES`.

    Raises:
        InputError: ``minutes`` is not above 0, does not go with the steps, or is too short for any training at all.
    """
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise InputError(f"--minutes {minutes:g}: it is a time above 0")
    rungs = _rungs(run, given)
    if all(name in given for name in STEPS.values()):
        if minutes is not None:
            raise InputError("--minutes chooses steps, and all of them are given: leave out one or the other")
        small = max((rung for rung in rungs if rung.image_size <= 64), default=rungs[0])
        return _config(run.config, given, small)
    budget = 60 * (MINUTES[run.device.type] if minutes is None else minutes)
    say(f"choosing sizes and steps for {_shown(budget)}: a few steps are timed")
    rung, costs = _search(run, given, rungs, budget)
    steps = _steps(rung, costs, given, budget)
    counted: dict[str, Any] = {STEPS[phase]: count for phase, count in steps.items()}
    config = replace(_config(run.config, given, rung), threads=costs.threads, **counted)
    counts = f"{steps['gan']} steps of the GAN, {steps['encoder']} of the encoder, {steps['pathology']} of the head"
    say(
        f"{config.image_size} px, width {config.base_width}, {config.batch_size} images a step; {counts}: about "
        f"{_shown(costs.of(steps))} with tests and controls; --minutes sets the time, config.json has all settings"
    )
    return config


def _rungs(run: Run, given: Mapping[str, Any]) -> list[Rung]:
    """Those whose pixels the images have, the smallest first; one at least."""
    smallest = LADDER[0].image_size
    size = given.get("image_size")
    if size is None and given.get("multipliers"):
        size = smallest // 2 * 2 ** given["multipliers"].count(",")
    if size is not None:
        below = [rung for rung in LADDER if rung.image_size <= size] or LADDER[:1]
        nearest = below[-1].image_size
        return [
            rung if nearest == size else rung._replace(image_size=size, multipliers="")
            for rung in below
            if rung.image_size == nearest
        ]
    side = typical_side([sample.image for sample in run.split.train]) or smallest
    return [rung for rung in LADDER if rung.image_size <= max(smallest, side * 4 / 3)]


def _config(config: Config, given: Mapping[str, Any], rung: Rung) -> Config:
    chosen = rung._asdict() | {"pathology_steps": PATHOLOGY_STEPS}
    del chosen["seconds"]
    return replace(config, **{name: value for name, value in chosen.items() if name not in given})


def _search(run: Run, given: Mapping[str, Any], rungs: list[Rung], budget: float) -> tuple[Rung, Costs]:
    """The highest rung that trains long enough within the budget, else the lowest; and its costs."""
    first = rungs[0]
    costs = _costs(run, _config(run.config, given, first))
    speed = sum(costs.step[p] * n for p, n in _goals(first).items()) / first.seconds
    best = first, costs
    for rung in reversed(rungs[1:]):
        if rung.seconds * speed * ENOUGH > budget:  # not worth timing
            continue
        costs = _costs(run, _config(run.config, given, rung))
        if costs.of({phase: int(n * ENOUGH) for phase, n in _goals(rung).items()}) <= budget:
            return rung, costs
    return best


def _goals(rung: Rung) -> dict[str, int]:
    return {"gan": rung.gan_steps, "encoder": rung.encoder_steps, "pathology": PATHOLOGY_STEPS}


def _steps(rung: Rung, costs: Costs, given: Mapping[str, Any], budget: float) -> dict[str, int]:
    """Steps of each phase that fill the budget: those of the rung in proportion, and no more of the pathology head."""
    fixed = {phase: given[name] for phase, name in STEPS.items() if name in given}
    free = {phase: count for phase, count in _goals(rung).items() if phase not in fixed}
    nothing = costs.of(fixed | dict.fromkeys(free, 0))
    left = budget - nothing
    each = {phase: costs.step[phase] * count for phase, count in free.items()}
    if left < 0.02 * sum(each.values()):
        least = (nothing + 0.05 * sum(each.values())) / 60
        raise InputError(
            f"--minutes {budget / 60:g} is too short: reading, tests and controls take {_shown(nothing)} here; give "
            f"{math.ceil(10 * least) / 10:g} or more"
        )
    head = each.pop("pathology", 0.0)
    share = left / (head + sum(each.values()))
    if share > 1 and each:  # the head is trained as long as was measured, the others take what is left
        share = (left - head) / sum(each.values())
    scaled = {phase: round(count * min(share, MOST if phase in each else 1.0)) for phase, count in free.items()}
    return fixed | {phase: max(1, _two_digits(count)) for phase, count in scaled.items()}


def _two_digits(count: int) -> int:
    unit = 10 ** max(0, len(str(count)) - 2)
    return count // unit * unit


def _costs(run: Run, config: Config) -> Costs:
    """What a configuration costs on this run's data, measured; networks and steps are thrown away."""
    samples = _readable(run, config)
    batch = max(1, min(config.batch_size, len(samples)) // run.job.world)
    many: dict[str, Any] = dict.fromkeys(STEPS.values(), 1000)  # so that steps are traced
    trial = replace(run, config=replace(config, batch_size=batch, **many), job=SINGLE)
    begun = time.monotonic()
    seen = trial.dataset(samples)
    images = seen.images(range(len(samples)))
    reading = (time.monotonic() - begun) / len(samples)
    with tempfile.TemporaryDirectory(prefix="raccgan-") as folder, _threads_kept():
        training = Training(trial, seen, Path(folder) / "unused")
        once, step, threads = _timed_steps(training)
        training.freeze("none")
        for gaussian in training.networks.density.children():
            gaussian.get_buffer("images").fill_(1)  # as if it were fitted: the arithmetic is the same
        scorer = Scorer(trial.config, training.networks, run.classes)
        scorer.score(images)
        begun = time.monotonic()
        scorer.score(images)
        image = (time.monotonic() - begun) / len(images)
        of_control = _per_step(images, trial)
    train, held_out, test = (len(part) for part in (run.split.train, run.split.held_out, run.split.test))
    passes = 2 * (train + (1 + SYNTHETIC) * held_out + test) + held_out  # ours, and behind untrained networks
    controls = of_control * config.control_steps
    rest = ROOM * (reading * (train + held_out + test) + image * passes + controls)
    return Costs(once, step, rest, threads)


def _readable(run: Run, config: Config) -> list[Sample]:
    """Some training images, without those that cannot be read: a line names these where all images are read."""
    samples = spread(run.split.train, SEEN)
    data = replace(run, config=config).dataset(samples)
    bad = data.problems()
    if len(bad) == len(samples):
        raise data.refusal(bad)
    return [sample for index, sample in enumerate(samples) if index not in bad]


def _timed_steps(training: Training) -> tuple[dict[str, float], dict[str, float], int]:
    """Seconds of each phase's first step beyond another, and of another; and the threads that take less of them."""
    once: dict[str, float] = {}
    steps: dict[str, dict[int, float]] = {}
    choices = [torch.get_num_threads(), 1] if training.device.type == "cpu" and not training.config.threads else [0]
    for phase in PHASES:
        take = getattr(training, f"{phase}_step")
        training.freeze(phase)
        training.trace_if_worth_it(phase)
        times: dict[int, list[float]] = {count: [] for count in choices}
        first = 0.0
        for number, (x, y) in zip(range(1 + TRIED * len(choices)), training.batches(phase), strict=False):
            count = choices[number % len(choices)]
            if count:
                torch.set_num_threads(count)
            begun = time.monotonic()
            torch.stack(list(take(number, x, y).values())).tolist()  # waits for a GPU
            seconds = time.monotonic() - begun
            if number == 0:
                first = seconds
            else:
                times[count].append(seconds)
        steps[phase] = {count: statistics.median(found) for count, found in times.items()}
        once[phase] = max(0.0, first - min(steps[phase].values()))
    best = min(choices, key=lambda count: sum(found[count] for found in steps.values()))
    if best:
        torch.set_num_threads(best)
    threads = best if best != choices[0] else training.config.threads
    return once, {phase: found[best] for phase, found in steps.items()}, threads


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _per_step(images: torch.Tensor, run: Run) -> float:
    """Seconds that a step of the autoencoder takes, which every run is compared with."""
    times: list[float] = []
    begun = time.monotonic()

    def note(step: int, steps: int) -> None:
        nonlocal begun
        times.append(time.monotonic() - begun)
        begun = time.monotonic()

    autoencoder(images, images[:1], seed=0, steps=TRIED, device=run.device, progress=note)
    return statistics.median(times)


def _shown(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
