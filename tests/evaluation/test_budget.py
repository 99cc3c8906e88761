"""Sizes and steps by a time: what is chosen, what stays, what is refused, and that timing leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raccgan import train
from raccgan.config import Config, make_config
from raccgan.data.samples import Sample, Source
from raccgan.data.splits import Split
from raccgan.errors import InputError
from raccgan.evaluation import budget
from raccgan.evaluation.budget import LADDER, PATHOLOGY_STEPS, Costs, planned
from raccgan.training.loop import PHASES
from raccgan.training.run import Run
from tests.cli.test_commands import refused, run
from tests.conftest import CPU, TINY, TINY_OPTIONS

REST = 60.0  # seconds beside training, on the machine of these tests


def run_of(side: int, count: int = 40, **settings: Any) -> Run:
    """Noise of ``side`` times twice that many pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, 2 * side), dtype=np.uint8)
    samples = tuple(Sample(str(i), "good", "train", image) for i, image in enumerate(pixels))
    split = Split(("good",), samples[4:], samples[:2], samples[2:4])
    source = Source("noise", samples, ("good",), 1, ("good",), "folder")
    return Run(make_config(None, {"dataset": "noise"} | settings), split, source, 1, CPU)


def seconds_of(config: Config) -> float:
    """Of all steps of the rung that a configuration is of."""
    sizes = config.image_size, config.base_width
    return next(rung.seconds for rung in LADDER if (rung.image_size, rung.base_width) == sizes)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What was timed, on a machine as the one of :data:`LADDER`, where a phase takes a third of all."""
    found: list[Config] = []

    def costs(_: Run, config: Config) -> Costs:
        found.append(config)
        rung = next(r for r in LADDER if r.image_size == config.image_size and r.base_width == config.base_width)
        goals = {"gan": rung.gan_steps, "encoder": rung.encoder_steps, "pathology": PATHOLOGY_STEPS}
        step = {phase: rung.seconds / 3 / count for phase, count in goals.items()}
        return Costs(dict.fromkeys(PHASES, 1.0), step, REST, threads=0)

    monkeypatch.setattr(budget, "_costs", costs)
    return found


@pytest.mark.parametrize(
    ("side", "minutes", "size", "width"),
    [
        (8, 20, 8, 32),
        (28, 20, 32, 16),
        (500, 9, 64, 16),
        (500, 20, 128, 16),
        (500, 60, 128, 16),
        (500, 3000, 128, 96),
        (500, 5, 64, 16),
        (500, 2, 16, 32),
        (90, 60, 64, 16),
    ],
)
def test_the_largest_networks_that_the_time_and_the_pixels_allow(
    timed: list[Config], side: int, minutes: float, size: int, width: int
) -> None:
    config = planned(run_of(side), {}, minutes)
    assert (config.image_size, config.base_width) == (size, width)
    assert len(timed) <= 3, "timing takes a while"


@pytest.mark.parametrize("minutes", [2, 6, 20, 60])
def test_the_steps_fill_the_time(timed: list[Config], minutes: float) -> None:
    config = planned(run_of(500), {}, minutes)
    rung = next(r for r in LADDER if r.image_size == config.image_size)
    shares = [config.gan_steps / rung.gan_steps, config.encoder_steps / rung.encoder_steps]
    shares.append(config.pathology_steps / PATHOLOGY_STEPS)
    taken = REST + 3 + seconds_of(config) / 3 * sum(shares)
    assert 0.85 * 60 * minutes < taken <= 60 * minutes
    assert config.pathology_steps <= PATHOLOGY_STEPS


def test_small_images_do_not_train_for_as_long_as_there_is_time(timed: list[Config]) -> None:
    config = planned(run_of(8), {}, 600)
    assert config.gan_steps == budget.MOST * LADDER[0].gan_steps


def test_what_the_user_gave_stays(timed: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    given = {"image_size": 32, "base_width": 16, "gan_steps": 123, "batch_size": 4}
    config = planned(run_of(500, **given), given, None)
    assert {name: getattr(config, name) for name in given} == given
    assert config.encoder_steps > 2000, "the time that is left"
    assert [each.image_size for each in timed] == [32]
    said = capsys.readouterr().err
    assert "32 px, width 16, 4 images a step; 123 steps of the GAN" in said
    assert planned(run_of(500), {"multipliers": "2,1"}, 20).image_size == 8


def test_where_all_steps_are_given_nothing_is_timed(timed: list[Config]) -> None:
    given = {name: value for name, value in TINY.items() if name != "latent"}
    config = planned(run_of(500, **given), given, None)
    assert (config.image_size, config.base_width, config.gan_steps) == (64, TINY["base_width"], TINY["gan_steps"])
    assert timed == []


@pytest.mark.parametrize(
    ("minutes", "given", "words"),
    [
        (0.0, {}, "--minutes 0: it is a time above 0"),
        (float("nan"), {}, "it is a time above 0"),
        (0.5, {}, "too short: reading, tests and controls take 63 seconds here; give 1.2 or more"),
        (20.0, TINY, "all of them are given"),
    ],
)
def test_a_time_that_cannot_be_kept_is_refused(
    timed: list[Config], minutes: float, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        planned(run_of(8, **given), given, minutes)


@pytest.mark.parametrize("arguments", [["--preset", "mnist-small"], ["--resume", "run"], []])
def test_a_time_beside_what_it_would_choose_is_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(train, "--out", "run", *TINY_OPTIONS, "--phase", "gan") == 0
    line = refused(capsys, train, *arguments, "--minutes", 5)
    assert "--minutes chooses sizes and steps, which --preset, --resume and digits bring" in line


def test_timing_leaves_nothing_behind(no_global_draws: Callable[[], None]) -> None:
    made = run_of(
        8, count=12, **{name: TINY[name] for name in ("base_width", "latent", "embedding", "pathology_width")}
    )
    threads = torch.get_num_threads()
    costs = budget._costs(made, replace(made.config, image_size=8, multipliers="2,1"))
    assert torch.get_num_threads() == threads
    no_global_draws()
    assert set(costs.step) == set(costs.once) == set(PHASES)
    assert all(0 < seconds < 60 for seconds in (*costs.step.values(), costs.rest))
    assert all(0 <= seconds < 60 for seconds in costs.once.values())
    assert costs.threads in (0, 1)


def test_images_that_cannot_be_read_are_not_timed(tmp_path: Path) -> None:
    made = run_of(8, count=8)
    (tmp_path / "broken.png").write_bytes(b"none")
    broken = Sample("broken", "good", "train", tmp_path / "broken.png")
    mixed = replace(made, split=replace(made.split, train=(*made.split.train, broken)))
    assert budget._readable(mixed, made.config) == list(made.split.train)
    alone = replace(made, split=replace(made.split, train=(broken,)))
    with pytest.raises(InputError, match=r"broken\.png"):
        budget._readable(alone, made.config)


@pytest.fixture
def no_global_draws() -> Callable[[], None]:
    before = torch.get_rng_state()

    def check() -> None:
        assert torch.equal(torch.get_rng_state(), before)

    return check
