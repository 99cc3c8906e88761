"""The other scores of a trained model, against their formulas written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from raccgan.evaluation import fit_density
from raccgan.experiments.compositions import COMPOSITIONS, Terms, composed, terms_of
from raccgan.run import Run
from raccgan.training import Training


def terms(**known: list[float]) -> Terms:
    n = len(next(iter(known.values())))
    names = [f.name for f in dataclasses.fields(Terms)]
    return Terms(**{name: np.array(known.get(name, [0.0] * n)) for name in names})


def test_a_standardised_sum_counts_in_deviations_of_the_normal_images() -> None:
    normal = terms(residual=[1.0, 3.0], feature=[10.0, 30.0])  # means 2 and 20, deviations 1 and 10
    asked = terms(residual=[2.0, 5.0], feature=[20.0, 10.0])
    assert composed(asked, normal)["standardised"].tolist() == [0.0, 2.0]


def test_normal_images_that_are_all_alike_divide_by_no_zero() -> None:
    alike = terms(residual=[1.0, 1.0])
    assert all(np.isfinite(scores).all() for scores in composed(alike, alike).values())


def test_the_terms_are_those_of_the_chosen_condition(tiny: Callable[..., tuple[Run, Training]]) -> None:
    run, training = tiny()
    fit_density(run, training.networks, training.data)
    scorer = run.scorer(training.networks)
    data = run.dataset(run.split.test[:9])
    with pytest.raises(ValueError, match="score with details"):
        terms_of(scorer, data, scorer.score(data.images(range(9))), "terms")
    scored = scorer.score(data.images(range(9)), details=True)
    found = terms_of(scorer, data, scored, "terms")
    x, y = data.images(range(9)), scored.condition
    latent, critic = scorer.encoder(x, y), scorer.discriminator(x, y)
    np.testing.assert_allclose(found.latent, latent.square().mean(dim=1), rtol=1e-5)
    np.testing.assert_allclose(found.critic, -critic, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.residual, scored.residual)
    assert scored.map is not None
    highest = scored.map.flatten(1).amax(dim=1).numpy()
    assert (found.map_maximum <= highest + 1e-6).all()
    assert (found.map_top <= found.map_maximum).all()
    assert torch.tensor(found.map_maximum).std() > 0
    assert set(composed(found, found)) == set(COMPOSITIONS)
