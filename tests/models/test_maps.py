"""The smoothing of a map against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from raccgan.models.maps import SMOOTHING, smoothed
from tests.kernels.compare import assert_each_close


@pytest.mark.parametrize("size", [8, 16, 64])
def test_smoothing_is_a_gaussian_mirrored_at_the_borders(size: int) -> None:
    map = torch.rand(3, size, size, dtype=torch.float64)
    deviation = SMOOTHING * size
    reach = int(np.ceil(3 * deviation))
    wanted = [gaussian_filter(m, deviation, mode="mirror", radius=reach) for m in map.numpy()]
    assert_each_close(smoothed(map), np.stack(wanted), rtol=1e-9)


def test_a_map_of_one_value_stays_and_a_spot_spreads() -> None:
    flat = torch.full((1, 64, 64), 0.3)
    assert_each_close(smoothed(flat), flat, rtol=1.3e-6, atol=1e-5)
    spot = torch.zeros(1, 64, 64)
    spot[0, 20, 30] = 1
    found = smoothed(spot)[0]
    assert (found == found.max()).nonzero().tolist() == [[20, 30]]
    assert found.sum().item() == pytest.approx(1, rel=1e-5)
    assert 0.01 < found[20, 32] < found[20, 31] < found[20, 30] < 0.1
