"""Latents that depend on nothing but seed and index, interpolations that start and end where they say, the distance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.data.sources.digits import load_digits_source
from raccgan.generation.sampling import (
    between_classes,
    between_latents,
    compare,
    features,
    images,
    kernel_distance,
    latents,
)
from raccgan.models.generator import Generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A generator as a checkpoint has it: some training behind it, so that norms and classes differ, and in eval."""
    torch.manual_seed(0)
    g = Generator(widths=(8, 8, 8), classes=3, image_channels=1, latent=12, embedding=4)
    torch.nn.init.normal_(g.embedding.weight)
    for _ in range(5):
        g(torch.randn(16, 12), torch.randint(0, 3, (16,)))
    return g.eval().requires_grad_(False)


def digits(label: str, split: str) -> Tensor:
    source = load_digits_source(None)  # type: ignore[arg-type]  # it reads no folder
    chosen = [sample for sample in source.samples if sample.label == label and sample.split == split]
    return ImageDataset(chosen, classes=(), size=8, channels=1).images(range(len(chosen)))


def test_a_latent_is_a_function_of_seed_and_index() -> None:
    z = latents(range(40), 24, seed=3)
    assert torch.equal(latents([7, 2], 24, seed=3), z[[7, 2]])
    assert not torch.equal(latents(range(40), 24, seed=4), z)
    assert len({tuple(row.tolist()) for row in z}) == 40
    assert latents([], 24, seed=3).shape == (0, 24)


def test_latents_are_normal_and_truncated_ones_a_normal_cut_off() -> None:
    """Deviation of N(0, 1) within [-t, t]: sqrt(1 - 2 t p(t) / P(|z| < t))."""
    z = latents(range(500), 40, seed=0)
    assert z.std().item() == pytest.approx(1, abs=0.02)
    for t in (0.1, 0.7, 2.0):
        cut = latents(range(500), 40, seed=0, truncation=t)
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        assert cut.abs().max() <= t
        assert cut.std().item() == pytest.approx(math.sqrt(1 - 2 * t * density / math.erf(t / math.sqrt(2))), rel=0.02)
        kept = z.abs() <= t
        assert torch.equal(cut[kept], z[kept]), "a coordinate within the limit stays as it was drawn"


@pytest.mark.parametrize("truncation", [0.0, -1.0, 0.09, float("nan")])
def test_a_truncation_that_would_never_end_is_refused(truncation: float) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.1"):
        latents([0], 4, seed=0, truncation=truncation)


def test_images_are_those_of_the_generator_in_any_batch(generator: Generator) -> None:
    z = latents(range(7), 12, seed=0)
    expected = generator(z, torch.full((7,), 2))
    for batch in (1, 3, 64):
        torch.testing.assert_close(images(generator, z, 2, batch=batch), expected, rtol=1e-4, atol=1e-5)


def test_between_two_classes_the_ends_are_the_classes(generator: Generator) -> None:
    z = latents([0], 12, seed=0)
    made = between_classes(generator, z[0], 2, 0, 9)
    torch.testing.assert_close(made[[0]], images(generator, z, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made[[-1]], images(generator, z, 0), rtol=1e-4, atol=1e-5)
    whole, steps = (made[0] - made[-1]).norm(), (made[1:] - made[:-1]).flatten(1).norm(dim=1)
    assert whole > 0.1
    assert steps.max() < 0.5 * whole, "one step is most of the way"


def test_between_two_latents_every_point_is_as_likely_as_the_ends() -> None:
    """The deviation over many pairs is 1 at every point; on the straight line it would be 0.7 in the middle."""
    z = latents(range(400), 50, seed=1)
    paths = torch.stack([between_latents(a, b, 5) for a, b in z.split(2)])  # [200, 5, 50]
    assert torch.equal(paths[:, 0], z[::2])
    assert torch.equal(paths[:, -1], z[1::2])
    torch.testing.assert_close(paths.std(dim=(0, 2)), torch.ones(5), rtol=0, atol=0.03)


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_features_do_not_depend_on_the_batch(size: int, channels: int) -> None:
    x = torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    f = features(x)
    assert f.shape == (5, 16 * 32 * int(math.log2(size // 2)))
    torch.testing.assert_close(features(x, batch=2), f, rtol=1e-4, atol=1e-5)
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
