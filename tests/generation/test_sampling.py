"""Latents that depend on nothing but seed and index, and interpolations that start and end where they say."""

from __future__ import annotations

import math

import pytest
import torch

from raccgan.generation.sampling import between_classes, between_latents, images, latents
from raccgan.models.generator import Generator
from tests.conftest import config_of
from tests.kernels.compare import assert_each_close


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A generator as a checkpoint has it: some training behind it, so that norms and classes differ, and in eval."""
    torch.manual_seed(0)
    g = Generator(config_of((8, 8, 8), latent=12, embedding=4, attention_generator="all"), channels=1, classes=3)
    torch.nn.init.normal_(g.embedding.weight)
    for _ in range(5):
        g(torch.randn(16, 12), torch.randint(0, 3, (16,)))
    return g.eval().requires_grad_(False)


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
        assert_each_close(images(generator, z, 2, batch=batch), expected, rtol=1e-4, atol=1e-5)


def test_between_two_classes_the_ends_are_the_classes(generator: Generator) -> None:
    z = latents([0], 12, seed=0)
    made = between_classes(generator, z[0], 2, 0, 9)
    assert_each_close(made[[0]], images(generator, z, 2), rtol=1e-4, atol=1e-5)
    assert_each_close(made[[-1]], images(generator, z, 0), rtol=1e-4, atol=1e-5)
    whole, steps = (made[0] - made[-1]).norm(), (made[1:] - made[:-1]).flatten(1).norm(dim=1)
    assert whole > 0.1
    assert steps.max() < 0.5 * whole, "one step is most of the way"


def test_between_two_latents_every_point_is_as_likely_as_the_ends() -> None:
    """The deviation over many pairs is 1 at every point; on the straight line it would be 0.7 in the middle."""
    z = latents(range(400), 50, seed=1)
    paths = torch.stack([between_latents(a, b, 5) for a, b in z.split(2)])  # [200, 5, 50]
    assert torch.equal(paths[:, 0], z[::2])
    assert torch.equal(paths[:, -1], z[1::2])
    assert_each_close(paths.std(dim=(0, 2)), torch.ones(5), rtol=0, atol=0.03)
