"""The controls without a network: an image unlike the normal ones scores above them, whatever the shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raccgan.evaluation.plain import PLAIN


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_an_image_unlike_the_others_scores_highest(name: str, channels: int, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    line = torch.linspace(-0.5, 0.5, size)
    normal = line + 0.02 * torch.randn(40, channels, size, size, generator=draw)
    test = normal[30:].clone()
    test[4, :, : size // 2, : size // 2] += 0.4 * torch.randn(channels, size // 2, size // 2, generator=draw)
    scores = PLAIN[name](normal[:30], test.clamp(-1, 1))
    assert scores.shape == (10,)
    assert np.isfinite(scores).all()
    assert scores.argmax() == 4
    again = PLAIN[name](normal[:30], test.clamp(-1, 1))
    assert np.array_equal(scores, again), "a seed gives the same scores"
    assert np.isfinite(PLAIN[name](normal[:1], test)).all(), "one normal image"
