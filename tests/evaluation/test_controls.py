"""The plain controls: right distances, the same scores from the same seed, nothing left in the random state."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from raccgan.evaluation.controls import SIZES, autoencoder, nearest_neighbour
from raccgan.evaluation.metrics import image_metrics
from tests.kernels.compare import assert_each_close


def images(count: int, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, np.ndarray]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    normal = torch.tensor(data.target < 5)
    train, held = x[normal].split([540, int(normal.sum()) - 540])
    return train, torch.cat([held, x[~normal]]), np.arange(len(x) - 540) >= len(held)


def test_nearest_neighbour_is_the_smallest_distance() -> None:
    train, test = images(20, 3), images(7, 3, seed=1)
    nearest = [train[(train - image).square().sum(dim=(1, 2, 3)).argmin()] for image in test]
    literal = (torch.stack(nearest) - test).square().mean(dim=1)
    assert_each_close(nearest_neighbour(train, test), literal, rtol=1e-5, atol=0)


def test_a_training_image_is_at_distance_zero() -> None:
    train = images(20)
    assert_each_close(nearest_neighbour(train, train[3:5]), 0, atol=1e-3)


def test_a_large_training_set_is_thinned_evenly_and_keeps_its_ends() -> None:
    train = images(100)
    distances = nearest_neighbour(train, train, max_train=12).amax(dim=(1, 2))
    assert [i for i in range(100) if distances[i] < 1e-3] == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]


def test_controls_separate_digits(digits: tuple[Tensor, Tensor, np.ndarray]) -> None:
    train, test, anomalous = digits
    for map, least in ((nearest_neighbour(train, test), 0.95), (autoencoder(train, test, seed=0, steps=400), 0.85)):
        assert map.shape == (len(test), 8, 8)
        assert map.dtype == torch.float32
        auroc = image_metrics(map.mean(dim=(1, 2)).numpy(), anomalous, 0.0).auroc
        assert auroc is not None
        assert auroc > least


def test_the_seed_decides_and_the_caller_does_not() -> None:
    train, test = images(20), images(5, seed=1)
    torch.manual_seed(1)
    first = autoencoder(train, test, seed=3, steps=5)
    torch.manual_seed(2)
    np.testing.assert_array_equal(autoencoder(train, test, seed=3, steps=5), first)
    assert not np.allclose(autoencoder(train, test, seed=4, steps=5), first)


def test_the_random_state_and_the_images_stay_as_they_were() -> None:
    train, test = images(20), images(5, seed=1)
    kept = train.clone(), test.clone()
    before = torch.get_rng_state()
    autoencoder(train, test, seed=3, steps=2)
    nearest_neighbour(train, test, max_train=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(train, kept[0])
    assert torch.equal(test, kept[1])


def test_training_lowers_the_error_of_what_was_seen_also_under_no_grad() -> None:
    train = images(1).expand(8, -1, -1, -1)
    with torch.no_grad():
        few, many = (autoencoder(train, train[:1], seed=0, steps=steps) for steps in (1, 60))
    assert many.mean() < few.mean() / 4


def test_a_score_does_not_depend_on_the_other_images() -> None:
    train, test = images(20), images(37, seed=1)
    together = autoencoder(train, test, seed=0, steps=5)
    # The squares of differences near nothing are rounded by where an image lies in the batch: 3e-10 on an Intel Xeon.
    flipped = autoencoder(train, test.flip(0), seed=0, steps=5).flip(0)
    assert_each_close(flipped, together, rtol=1e-5, atol=1e-8)
    assert_each_close(autoencoder(train, test[4:5], seed=0, steps=5), together[4:5], rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_and_both_kinds_of_colour(size: int, channels: int) -> None:
    map = autoencoder(images(2, channels, size), images(1, channels, size, 1), seed=0, steps=1, batch_size=2)
    assert map.shape == (1, size, size)
    assert 0 < map.mean() < 4


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    autoencoder(images(3), images(1), seed=0, steps=3, progress=lambda step, steps: seen.append((step, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_no_test_image_gives_no_map() -> None:
    assert nearest_neighbour(images(3), images(0)).shape == (0, 8, 8)
    assert autoencoder(images(3), images(0), seed=0, steps=1).shape == (0, 8, 8)


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one normal"):
        nearest_neighbour(images(0), images(3))
    with pytest.raises(ValueError, match="alike"):
        nearest_neighbour(images(3, 1), images(3, 3))
    for wrong in (images(2, 1, 12), images(2, 1, 16)[:, :, :8], images(2, 1, 4)):
        with pytest.raises(ValueError, match="square images"):
            autoencoder(wrong, wrong, seed=0, steps=1)
