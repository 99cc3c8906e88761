"""Synthetic pathologies: within their regions, within the range, and the same for any slice of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raccgan.data.synthesis import Draws, regions, smooth, synthetic
from raccgan.models.randomness import stream
from tests.kernels.compare import assert_each_close


def images(n: int, channels: int, size: int) -> Tensor:
    return smooth(torch.rand(n, channels, size, size, generator=stream(0, "images")) * 2 - 1, 1.0)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (1, 64)])
def test_every_image_changes_within_its_mask_alone(channels: int, size: int) -> None:
    x, draws = images(12, channels, size), Draws.of(12, size, stream(1, "draws"))
    y, mask = synthetic(x, x.roll(1, 0), draws)
    assert y.shape == x.shape
    assert mask.shape == (12, 1, size, size)
    assert y.isfinite().all()
    assert y.abs().max() <= 1
    assert 0 <= mask.min() <= mask.max() <= 1
    changed = (y - x).abs()
    assert (changed.amax(dim=(1, 2, 3)) > 0.02).float().mean() > 0.8, "haze of the region's own grey is rare"
    assert (changed <= 4 * mask + 1e-6).all(), "something changed where the mask says nothing does"


def test_a_slice_of_a_batch_is_the_same_whoever_makes_it() -> None:
    x, draws = images(6, 1, 16), Draws.of(6, 16, stream(1, "draws"))
    whole, _ = synthetic(x, x.flip(0), draws)
    part, _ = synthetic(x[2:4], x.flip(0)[2:4], Draws(*(each[2:4] for each in draws)))
    assert_each_close(part, whole[2:4], rtol=0, atol=1e-6)


def test_regions_are_small_and_large() -> None:
    share = regions(Draws.of(300, 32, stream(0, "regions")), 32).mean(dim=(1, 2, 3))
    assert share.min() < 0.02
    assert share.max() > 0.2


def test_smoothing_keeps_a_constant_and_the_mean_of_what_is_far_from_the_border() -> None:
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert_each_close(smooth(flat, 2.0), flat, rtol=1e-6)
    spot = torch.zeros(1, 1, 33, 33)
    spot[0, 0, 16, 16] = 1
    assert smooth(spot, 3.0).sum().item() == pytest.approx(1, rel=1e-5)
    assert smooth(spot, 3.0)[0, 0, 16, 16] < 0.05
