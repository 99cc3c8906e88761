"""What the pathology head sees of an image: shapes at every size, and each part against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raccgan.models.density import Gaussian
from raccgan.models.maps import FAINT, contrasts
from raccgan.models.pathology import GRIDS, Pathology
from tests.conftest import tiny_config
from tests.kernels.compare import assert_each_close


@pytest.mark.parametrize(("size", "multipliers"), [(8, "2,1"), (16, "2,2,1"), (32, "2,2,1,1"), (64, "2,2,2,1,1")])
def test_what_is_observed_has_the_sizes_that_are_fitted(size: int, multipliers: str) -> None:
    head = Pathology(tiny_config(image_size=size, multipliers=multipliers, latent=0), 3).eval()
    x = torch.rand(2, 3, size, size) * 2 - 1
    with torch.no_grad():
        seen, outputs = head.observe(x), head._trunk(x)
        assert_each_close(seen.logit, head(x), rtol=1e-5, atol=1e-6)
    assert seen.places.shape[1] == head.places**2
    for name, coordinates in head.sizes.items():
        assert getattr(seen, name).shape[-1] == coordinates, name
    first, half = outputs[0].shape[1], seen.features.shape[1] // 2
    assert_each_close(seen.features[:, :first], outputs[0].mean(dim=(2, 3)), rtol=1e-4, atol=1e-6)
    spread = outputs[0].std(dim=(2, 3), correction=0)
    assert_each_close(seen.features[:, half : half + first], spread, rtol=1e-4, atol=1e-6)
    at = F.adaptive_avg_pool2d(outputs[0], head.places)
    assert_each_close(seen.places[:, 1, : at.shape[1]], at[:, :, 0, 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_contrasts_are_the_deviations_of_regions(grid: int) -> None:
    x = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(
        memory_format=torch.channels_last
    )
    got = contrasts(x, grid).unflatten(1, (2, grid, grid))
    side = 32 // grid
    wanted = x.double().numpy()[1, :, side : 2 * side, :side].std(axis=(1, 2)).mean()
    assert got[1, 0, 1, 0].item() == pytest.approx(np.log(wanted + FAINT), rel=1e-4)
    detail = contrasts(torch.full((1, 1, 32, 32), 0.4), grid)
    assert_each_close(detail, torch.full_like(detail, float(np.log(FAINT))), rtol=1e-3)


def test_a_gaussian_at_each_place_is_that_of_the_place_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(60, 4, 5, generator=draw) * torch.arange(1, 5)[:, None] + 3
    every = Gaussian(2, 5, places=4)
    every.fit(v, 1)
    for place in range(4):
        alone = Gaussian(1, 5)
        alone.fit(v[:, place], 0)
        assert_each_close(every(v, 1)[:, place], alone(v[:, place], 0), rtol=1e-5)
