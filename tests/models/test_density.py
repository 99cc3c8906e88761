"""Distances from normal images against their formulas written out, and where there is little to fit to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from raccgan.errors import InputError
from raccgan.models import density as module
from raccgan.models.density import TEXTURE, VISIBLE, Gaussian, Vectors, contrast
from raccgan.models.maps import smoothed
from raccgan.scoring.calibration import fit_density
from raccgan.scoring.detector import Detector
from raccgan.train import main as train
from raccgan.training.loop import PHASES, Training
from raccgan.training.run import Run
from tests.kernels.compare import assert_each_close

Make = Callable[..., tuple[Run, Training]]


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    """Vectors whose coordinates depend on one another, of quite different scales."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(count, size)) @ draw.normal(size=(size, size)) * np.geomspace(0.1, 10, size)
    return torch.from_numpy(mixed + 5).float()


def fitted(v: Tensor) -> Gaussian:
    gaussian = Gaussian(1, v.shape[1])
    gaussian.fit(v, 0)
    return gaussian


@pytest.mark.parametrize(("count", "size"), [(200, 7), (12, 30)])
def test_the_distance_is_mahalanobis_with_the_covariance_of_ledoit_and_wolf(count: int, size: int) -> None:
    v, asked = correlated(count, size), correlated(9, size, seed=1)
    mean, deviation = v.double().numpy().mean(axis=0), v.double().numpy().std(axis=0)
    covariance, shrinkage = ledoit_wolf((v.double().numpy() - mean) / deviation, assume_centered=True)
    assert 0 < shrinkage < 1
    u = (asked.double().numpy() - mean) / deviation
    wanted = np.einsum("ni,ij,nj->n", u, np.linalg.inv(covariance), u) / size
    assert_each_close(fitted(v)(asked, 0), wanted, rtol=1e-4)


def test_beyond_the_rank_all_directions_share_one_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    v, asked = correlated(300, 6), correlated(9, 6, seed=1)
    whole = fitted(v)
    monkeypatch.setattr(module, "RANK", 2)
    values = whole.variances[0].clone()  # from the smallest on
    values[:4] = values[:4].mean()
    whole.variances[0] = values
    assert_each_close(fitted(v)(asked, 0), whole(asked, 0), rtol=1e-4, atol=0)


def test_normal_vectors_are_at_one_and_others_further() -> None:
    v = correlated(4000, 10)
    gaussian = fitted(v[:2000])
    assert gaussian(v[2000:], 0).mean().item() == pytest.approx(1, rel=0.1)
    assert gaussian(v[2000:] + 5 * v.std(dim=0), 0).mean() > 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_vectors_and_coordinates_that_never_move_give_finite_distances(count: int) -> None:
    v = correlated(count, 5)
    v[:, 2] = 1.5
    gaussian = fitted(v)
    assert gaussian(correlated(9, 5, seed=1), 0).isfinite().all()
    assert gaussian(v, 0).max() <= 2


def test_each_class_has_its_own() -> None:
    v = correlated(80, 4)
    v[40:] += 1000
    both = Gaussian(2, 4)
    for k, members in enumerate(v.split(40)):
        both.fit(members, k)
    for k, members in enumerate(v.split(40)):
        assert_each_close(both(v, k), fitted(members)(v, 0), rtol=1.3e-6, atol=1e-5)
    with pytest.raises(ValueError, match="no image of class 1"):
        both.fit(v[:0], 1)


def test_contrast_is_the_squared_difference_to_the_next_pixels_below_and_to_the_right() -> None:
    x = torch.rand(2, 3, 5, 5) * 2 - 1
    found = contrast(x)
    for row, column in ((0, 0), (3, 2), (4, 1), (2, 4), (4, 4)):
        i, j = min(row, 3), min(column, 3)  # the last row and column repeat those before
        down, right = x[:, :, i + 1, j] - x[:, :, i, j], x[:, :, i, j + 1] - x[:, :, i, j]
        assert_each_close(found[:, row, column], (down**2 + right**2).mean(dim=1), rtol=1.3e-6, atol=1e-5)


def test_defects_are_the_largest_smoothed_errors_of_regions() -> None:
    """A few pixels that differ much and the same error spread over the region have one texture, not one defect."""
    x = torch.zeros(2, 1, 32, 32)
    maps = torch.zeros(2, 32, 32)
    maps[0, 10:12, 18:20] = 1.0
    maps[1, 8:16, 16:24] = 4 / 64
    _, textures, defects = Vectors.of(torch.empty(2, 0), x, maps)
    assert_each_close(*textures, rtol=1.3e-6, atol=1e-5)
    few, spread = defects
    place = 1 * 4 + 2  # the region in the second row, third column
    assert_each_close(few[place], torch.log(smoothed(maps[:1])[0, 8:16, 16:24].max() + VISIBLE), rtol=1.3e-6, atol=1e-5)
    assert few[place] > spread[place] + 1.5
    assert few[:16].argmax() == spread[:16].argmax() == place
    assert_each_close(few[16:], spread[16:], rtol=1.3e-6, atol=1e-5)  # the contrast


def test_no_image_has_no_texture() -> None:
    """A rank may have none of a few images."""
    _, *regional = Vectors.of(torch.empty(0, 5), torch.empty(0, 1, 8, 8), torch.empty(0, 8, 8))
    assert [v.shape for v in regional] == [(0, TEXTURE)] * 2


@pytest.mark.parametrize("size", [8, 16])
def test_a_texture_is_the_logarithm_of_regional_means(size: int) -> None:
    x = torch.zeros(2, 1, size, size)
    map = torch.zeros(2, size, size)
    side = size // 4
    map[1, side : 2 * side, 3 * side :] = 0.3
    x[1, 0, 2 * side + 1, 1] = 0.5  # four differences: to it from above and from the left, and from it both ways
    t = Vectors.of(torch.empty(2, 0), x, map).texture
    wanted = torch.full((2, TEXTURE), np.log(1e-4))
    wanted[1, 4 * 1 + 3] = np.log(0.3 + 1e-4)
    wanted[1, 16 + 4 * 2] = np.log(4 * 0.5**2 / side**2 + 1e-4)
    assert_each_close(t, wanted, rtol=1e-5, atol=0)


def test_a_descriptor_is_the_latent_and_the_means_of_each_block(tiny: Make) -> None:
    _, training = tiny()
    encoder = training.networks.encoder
    x, y = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2])
    outputs = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, output: outputs.append(output))
    z, h = encoder.describe(x, y)
    assert_each_close(h, torch.cat([z, *(o.relu().mean(dim=(2, 3)) for o in outputs)], dim=1), rtol=1.3e-6, atol=1e-5)
    assert_each_close(encoder(x, y), z, rtol=1.3e-6, atol=1e-5)
    assert h.shape[1] == encoder.described


def test_an_unfinished_training_has_none_and_a_finished_one_keeps_it(tiny: Make) -> None:
    run, training = tiny()
    for phase in PHASES:
        training.run(phase)
    with pytest.raises(InputError, match="finish the training"):
        Detector.load(training.path, threshold=1.0)
    assert train(["--phase", "evaluate", "--resume", str(training.path.parent), "--control-steps", "5"]) == 0
    kept = Detector.load(training.path).scorer.module.density.state_dict()
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    for name, value in training.networks.density.state_dict().items():
        assert_each_close(kept[name], value, rtol=1.3e-6, atol=1e-5)
    assert (kept["descriptor.images"] > 0).all()
