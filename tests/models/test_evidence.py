"""The weights of a score's terms: what separates counts, nothing counts against, and every number stays finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raccgan.models.evidence import LOGITS, TERMS, Evidence
from raccgan.models.randomness import stream


def terms(n: int, seed: int, **shift: float) -> dict[str, Tensor]:
    """Of ``n`` images: noise, and in some terms a shift of so many deviations."""
    draw = stream(seed, "terms")
    found = {name: torch.randn(n, generator=draw) + shift.get(name, 0.0) for name in TERMS}
    return {name: value if name in LOGITS else torch.exp(0.3 * value) for name, value in found.items()}


def fitted(**shift: float) -> Evidence:
    evidence = Evidence()
    evidence.fit(terms(400, 0), terms(1200, 1, **shift))
    return evidence


def test_what_tells_them_apart_weighs_most() -> None:
    evidence = fitted(density=3.0, pathology=2.0)
    assert evidence.weight.sum().item() == pytest.approx(1, rel=1e-5)
    order = [TERMS[i] for i in evidence.weight.argsort(descending=True).tolist()]
    assert order[:2] == ["density", "pathology"]
    assert evidence.described().startswith("density 0.")


def test_a_term_that_points_the_other_way_does_not_count() -> None:
    evidence = fitted(density=2.0, texture_density=-3.0)
    assert evidence.weight.min() >= 0
    assert evidence.weight[TERMS.index("texture_density")] < 1e-3
    more = terms(5, 3)
    further = more | {"density": more["density"] * 2}
    assert (evidence(further) > evidence(more)).all()


def test_a_normal_image_is_about_one() -> None:
    assert fitted(density=1.0)(terms(500, 7)).median().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_few_images_and_extreme_terms_stay_finite(count: int) -> None:
    evidence = Evidence()
    evidence.fit(terms(count, 0), terms(count, 1))
    for value in (0.0, 1e-30, 1e30):
        assert evidence(dict.fromkeys(TERMS, torch.full((3,), value))).isfinite().all()


def test_without_any_separation_all_terms_weigh_the_same() -> None:
    same = terms(50, 0)
    evidence = Evidence()
    evidence.fit(same, same)
    assert (evidence.weight - 1 / len(TERMS)).abs().max() < 1e-3
