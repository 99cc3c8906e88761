"""Scores: one an image whatever the batch, under the best normal class, and the threshold from held-out images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raccgan.config import SCORES
from raccgan.errors import InputError
from raccgan.models.density import Vectors
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.models.trace import Replayed
from raccgan.scoring.calibration import fit_density, threshold_of
from raccgan.scoring.scorer import Scorer
from raccgan.training.loop import Training
from raccgan.training.run import Run
from tests.kernels.compare import assert_each_close

Make = Callable[..., tuple[Run, Training]]


@pytest.fixture
def run_and_scorer(tiny: Make) -> tuple[Run, Scorer]:
    run, training = tiny()
    training.run("gan")
    training.run("encoder")
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    return run, Scorer(run.config, training.networks, run.classes)


def test_a_score_does_not_depend_on_the_batch(run_and_scorer: tuple[Run, Scorer]) -> None:
    """Alone, in batches of any size, in any order, whatever mode the networks were left in: a relative 1e-4."""
    run, scorer = run_and_scorer
    images = run.dataset(run.split.test).images(range(37))
    whole = scorer.score(images).score
    alone = torch.cat([scorer.score(images[i : i + 1]).score for i in range(37)])
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    shuffled = torch.empty(37)
    shuffled[order] = scorer.score(images[order]).score
    batched = torch.cat([scorer.score(part).score for part in images.split(scorer.batch)])
    for other in (alone, shuffled, batched):
        assert_each_close(other, whole, rtol=1e-4, atol=0)
    assert whole.std() > 0


def test_any_batches_in_any_order_give_the_same_scores(run_and_scorer: tuple[Run, Scorer]) -> None:
    """Cut anywhere, into any order, with any size of a pass and in any layout: a relative 1e-5.

    What remains of the batch is rounding: oneDNN convolves some shapes of fewer than 16 images by another kernel, and a
    matrix of fewer than 4 rows is multiplied by another one, and either adds in another order.
    """
    run, scorer = run_and_scorer
    images = run.dataset(run.split.test).images(range(40))
    whole = scorer.score(images).score

    @given(
        order=st.permutations(range(40)),
        cuts=st.sets(st.integers(1, 39)),
        pairs=st.integers(1, 64),
        memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    )
    def check(order: list[int], cuts: set[int], pairs: int, memory_format: torch.memory_format) -> None:
        scorer.pairs = pairs
        mixed = images[order].contiguous(memory_format=memory_format)
        parts = [scorer.score(part) for part in mixed.tensor_split(sorted(cuts))]
        assert_each_close(torch.cat([p.score for p in parts]), whole[order], rtol=1e-5, atol=0)

    check()


def test_the_order_changes_no_bit(run_and_scorer: tuple[Run, Scorer]) -> None:
    run, scorer = run_and_scorer
    images = run.dataset(run.split.test).images(range(40))
    scorer.pairs = 50  # of 5 classes: four passes of 50
    whole = scorer.score(images)

    @given(order=st.permutations(range(40)))
    def check(order: list[int]) -> None:
        mixed = scorer.score(images[order])
        assert torch.equal(mixed.score, whole.score[order])
        assert torch.equal(mixed.condition, whole.condition[order])

    check()


@pytest.mark.parametrize("made_of", SCORES)
def test_the_score_is_the_minimum_over_the_normal_classes(
    run_and_scorer: tuple[Run, Scorer], tiny: Make, made_of: str
) -> None:
    run, scorer = run_and_scorer
    scorer.module.made_of = made_of
    images = run.dataset(run.split.test).images(range(12))
    x = images.clone()
    f = scorer.module.discriminator.features(x)
    by_class = []
    for index in range(len(run.classes)):
        y = torch.full((12,), index)
        z, h = scorer.module.encoder.describe(x, y)
        x_hat = scorer.module.generator(z, y)
        term = (f - scorer.module.discriminator.features(x_hat)).square().flatten(1).mean(dim=1)
        squared = (x - x_hat).square().mean(dim=1)
        density, texture_density, defect_density = scorer.module.density(Vectors.of(h, x, squared), index)
        reconstruction = squared.mean(dim=(1, 2)) + run.config.kappa * term
        by_class.append(
            {
                "reconstruction": reconstruction,
                "density": density,
                "texture": texture_density,
                "defects": defect_density,
                "both": (density * texture_density).sqrt(),
                "all": density * (texture_density * reconstruction).sqrt(),
            }[made_of]
        )
    table = torch.stack(by_class)
    scored = scorer.score(images, details=True)
    assert_each_close(scored.score, table.amin(dim=0).detach(), rtol=1e-4, atol=0)
    assert torch.equal(scored.condition, table.argmin(dim=0))
    assert len(set(scored.condition.tolist())) > 1
    assert scored.map is not None
    y = scored.condition
    squared = (x - scorer.module.generator(scorer.module.encoder(x, y), y)).square().mean(dim=1)
    assert_each_close(scored.terms["residual"], squared.mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    assert_each_close(scored.map, smoothed(squared), rtol=1e-3, atol=1e-5)


def test_a_known_class_conditions_on_it_alone(run_and_scorer: tuple[Run, Scorer], tiny: Make) -> None:
    run, _ = run_and_scorer
    _, training = tiny()
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    images = run.dataset(run.split.test).images(range(9))
    fixed = Scorer(run.config, training.networks, run.classes, label_policy="3")
    assert set(fixed.score(images).condition.tolist()) == {3}
    with pytest.raises(InputError, match=r"label policy '7' cannot apply: .* \(0, 1, 2, 3, 4\)"):
        Scorer(run.config, training.networks, run.classes, label_policy="7")


def test_both_paths_score_alike(run_and_scorer: tuple[Run, Scorer]) -> None:
    run, scorer = run_and_scorer
    images = run.dataset(run.split.test).images(range(20))
    fused = scorer.score(images).score
    scorer.module.kernels = "reference"
    assert_each_close(scorer.score(images).score, fused, rtol=1e-4, atol=0)


def again(run: Run, scorer: Scorer, **options: Any) -> Scorer:
    """Another scorer by the same networks."""
    m = scorer.module
    networks = Networks(m.generator, m.discriminator, m.encoder, m.generator, m.density)
    return Scorer(run.config, networks, run.classes, **options)


@pytest.mark.long
def test_a_compiled_scorer_scores_alike(run_and_scorer: tuple[Run, Scorer]) -> None:
    run, scorer = run_and_scorer
    torch._dynamo.reset()
    compiled = again(run, scorer, compiled=True)
    images = run.dataset(run.split.test).images(range(37))
    for count, details in ((37, False), (1, False), (8, True)):
        wanted, got = (one.score(images[:count], details=details) for one in (scorer, compiled))
        assert_each_close(got.score, wanted.score, rtol=1e-4, atol=0)
        assert (got.map is None) == (wanted.map is None) == (not details)
        if got.map is not None and wanted.map is not None:
            assert_each_close(got.map, wanted.map, rtol=1e-4, atol=1e-5)
        assert torch.equal(got.condition, wanted.condition)


def test_scores_that_are_replayed_have_the_same_bits(
    run_and_scorer: tuple[Run, Scorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scorer = run_and_scorer
    monkeypatch.setattr(Replayed.__init__, "__defaults__", (2,))
    replayed = again(run, scorer)
    images = run.dataset(run.split.test).images(range(37))
    for count, details in ((37, False), (37, True), (1, False), (1, True), (1, False)):
        wanted, got = (one.score(images[:count], details=details) for one in (scorer, replayed))
        assert torch.equal(got.score, wanted.score)
        assert details is False or (got.map is not None and torch.equal(got.map, wanted.map))
    assert len(replayed._compare._replays) == 3, "passes of 64 images under a class, the last of 57, and of 5"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_compiled_scorer_says_so(tiny: Make) -> None:
    run, training = tiny()
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    scorer = Scorer(run.config, training.networks, run.classes, compiled=True)
    with pytest.raises(InputError, match=r"the scorer does not compile here: .*No working C\+\+ compiler"):
        scorer.score(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("value", [1.5, -2.0, float("nan"), float("inf")])
def test_images_outside_the_range_are_refused(run_and_scorer: tuple[Run, Scorer], value: float) -> None:
    _, scorer = run_and_scorer
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 3, 3] = value
    with pytest.raises(InputError, match=r"must be in \[-1, 1\]"):
        scorer.score(images)


def test_no_images_give_no_scores(run_and_scorer: tuple[Run, Scorer]) -> None:
    _, scorer = run_and_scorer
    assert scorer.score(torch.empty(0, 1, 8, 8)).score.shape == (0,)
    assert scorer.score(torch.empty(0, 1, 0, 0)).score.shape == (0,)
    with pytest.raises(InputError, match=r"must have pixels, got \[2, 1, 0, 0\]"):
        scorer.score(torch.empty(2, 1, 0, 0))


def test_the_threshold_is_a_quantile_of_held_out_scores() -> None:
    assert threshold_of(np.arange(101.0), 0.95) == 95.0
    with pytest.raises(InputError, match="no held-out normal images"):
        threshold_of(np.array([]), 0.95)
