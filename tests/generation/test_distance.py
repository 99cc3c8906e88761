"""The kernel distance against its definition, and on images whose order is plain to see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.data.sources.digits import load_digits
from raccgan.generation.distance import compare, features, kernel_distance
from tests.kernels.compare import assert_each_close


def digits(label: str, split: str) -> Tensor:
    source = load_digits(None)  # type: ignore[arg-type]  # it reads no folder
    chosen = [sample for sample in source.samples if sample.label == label and sample.split == split]
    return ImageDataset(chosen, classes=(), size=8, channels=1).images(range(len(chosen)))


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_do_not_depend_on_the_batch(size: int, channels: int) -> None:
    x = torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    f = features(x)
    assert f.shape == (5, 16 * 32 * int(math.log2(size // 2)))
    assert_each_close(features(x, batch=2), f, rtol=1e-4, atol=1e-5)
    assert (f[0] - f[1]).abs().max() > 0.01


def test_the_distance_is_the_sum_over_pairs() -> None:
    """Against the definition, written out."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, generator=draw).double(), 1 + torch.randn(5, 3, generator=draw).double()

    def k(p: Tensor, q: Tensor) -> float:
        return float((p @ q / 3 + 1) ** 3)

    within_a = sum(k(a[i], a[j]) for i in range(4) for j in range(4) if i != j) / 12
    within_b = sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(k(p, q) for p in a for q in b) / 20
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * across)
    with pytest.raises(ValueError, match="at least 2 images of either kind, got 1 and 5"):
        kernel_distance(a[:1], b)


def test_the_distance_of_one_distribution_is_zero_in_the_mean() -> None:
    """Unbiased: over many pairs of small sets the mean is within its own error of zero, and some are below."""
    draw = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [kernel_distance(torch.randn(6, 4, generator=draw), torch.randn(9, 4, generator=draw)) for _ in range(800)]
    )
    assert found.mean().abs() < 3 * found.std() / math.sqrt(800)
    assert (found < 0).any()


@pytest.mark.parametrize("label", ["0", "3"])
def test_the_distance_orders_what_is_plain_to_see(label: str) -> None:
    """Real images, then noisy ones, blurred ones, another digit, noise; and a collapsed sample is not near."""
    train, test = digits(label, "train"), digits(label, "test")
    draw = torch.Generator().manual_seed(0)
    changed = {
        "real": train,
        "noisy": (train + 0.5 * torch.randn(train.shape, generator=draw)).clamp(-1, 1),
        "another digit": digits("8", "train"),
        "noise": torch.rand(train.shape, generator=draw) * 2 - 1,
    }
    found = {name: compare(x, train, test) for name, x in changed.items()}
    distances = [comparison.generated for comparison in found.values()]
    assert distances == sorted(distances)
    assert distances[0] == found["noise"].real
    assert abs(distances[0]) < 0.2 < distances[1]
    assert distances[-1] == pytest.approx(found["real"].noise, rel=0.2)
    # Good images, all alike or of a few kinds: a perfect precision, and far beyond chance all the same.
    few = [compare(train[:kinds].repeat(25, 1, 1, 1), train, test).generated for kinds in (1, 4, 16)]
    assert few == sorted(few, reverse=True)
    assert few[-1] > max(found["real"].chance, found["real"].real)
    assert few[0] > 10 * found["real"].chance


def test_chance_is_what_shuffled_real_images_reach() -> None:
    """One distribution cut in two at random: below the chance level about 19 times in 20, so nearly always."""
    everything = torch.cat([digits("3", "train"), digits("3", "test")])
    draw = torch.Generator().manual_seed(1)
    below = 0
    for _ in range(12):
        cut = everything[torch.randperm(len(everything), generator=draw)]
        comparison = compare(cut[:60], cut[60:120], cut[120:])
        below += comparison.real <= comparison.chance
    assert below >= 9
    # And not for a trivial reason: two digits are far beyond it.
    apart = compare(digits("3", "train"), digits("5", "train"), digits("3", "test"))
    assert apart.real > 5 * apart.chance
