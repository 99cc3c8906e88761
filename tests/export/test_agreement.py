"""The comparison that an exported model has to pass before it is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from raccgan.errors import InputError
from raccgan.export import graph
from raccgan.export.graph import Runner
from tests.export.conftest import Trained


@pytest.mark.parametrize("threshold", [0.1, 0.25, 1 / 3, 1e-30, 1e-50, 0.0, -0.7, 1e300])
def test_the_threshold_in_single_precision_decides_as_the_double_does(threshold: float) -> None:
    inside = graph._float32_below(threshold)
    with np.errstate(over="ignore", under="ignore"):
        near = np.float32(threshold)
        around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    for score in around:
        assert (score <= np.float32(inside)) == (float(score) <= threshold)


@pytest.mark.parametrize("wrong", [lambda s: s * 1.01, lambda s: s * float("nan"), lambda s: torch.zeros_like(s)])
def test_a_model_that_does_not_agree_is_refused(several: Trained, wrong: Callable[[Tensor], Tensor]) -> None:
    scorer = several.scorer()

    def model(change: Callable[[Tensor], Tensor]) -> Runner:
        def call(images: Tensor) -> list[Tensor]:
            score = change(scorer.score(images).score)
            return [score, torch.zeros(len(images)), ~(score <= several.threshold)]

        return call

    right = graph.agreement(model(lambda s: s), scorer, several.images, several.threshold, "float32")
    assert right.images == len(several.images)
    assert right.equal_decisions == 1
    assert right.max_relative_difference < 1e-4  # the batches differ
    with pytest.raises(InputError, match="does not agree with the checkpoint: a score differs by"):
        graph.agreement(model(wrong), scorer, several.images, several.threshold, "float32")


def test_images_of_one_value_are_not_compared(several: Trained) -> None:
    """A model that differs on them alone agrees; with nothing else to compare on there is no answer."""
    scorer = several.scorer()
    blank = torch.full((2, 1, 16, 16), 0.3)

    def call(images: Tensor) -> list[Tensor]:
        score = scorer.score(images).score
        score = torch.where(images.flatten(1).std(dim=1) < 1e-6, score + 1, score)
        return [score, torch.zeros(len(images)), ~(score <= several.threshold)]

    mixed = torch.cat([blank, several.images[:5]])
    assert graph.agreement(call, scorer, mixed, several.threshold, "float32").images == 5
    with pytest.raises(InputError, match="of one value everywhere"):
        graph.agreement(call, scorer, blank, several.threshold, "float32")
