"""The authors' forms of the networks and of training: their parameters, what each changes, and that they work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from raccgan import detect, train
from raccgan.data.augmentation import ASPECT, LEAST, placed, placements
from raccgan.experiment.tables import VARIANTS
from raccgan.models.discriminator import Discriminator
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator
from raccgan.models.inference import frozen
from raccgan.training.loop import Training
from raccgan.training.run import Run
from tests.cli.test_commands import run, shapes
from tests.conftest import TINY_OPTIONS, config_of
from tests.kernels.compare import assert_each_close
from tests.models.test_networks import AT_32, AT_128, count
from tests.models.test_trace import steps

AUTHORS: dict[str, Any] = {name: value for name, value in VARIANTS["authors"].items() if name != "augmentation"}


def test_the_authors_parameters_at_32_px() -> None:
    """Grey, ten classes. There the generator's last convolution is 3x3, and the features are of places."""
    config = config_of(AT_32, latent=128, **AUTHORS | {"generator_head": "3x3", "features": "places"})
    networks = (network(config, channels=1, classes=10) for network in (Generator, Discriminator, Encoder))
    assert tuple(map(count, networks)) == (776_449, 357_965, 940_160)


def test_the_authors_parameters_at_128_px() -> None:
    """Colour, two classes; counted without memory, on the meta device."""
    config = config_of(AT_128, latent=120, **AUTHORS)
    with torch.device("meta"):
        networks = [network(config, channels=3, classes=2) for network in (Generator, Discriminator, Encoder)]
    assert tuple(map(count, networks)) == (11_732_035, 11_089_669, 16_438_968)


def made(network: type[nn.Module], size: int = 16, **settings: Any) -> Any:
    torch.manual_seed(0)
    widths = (8,) * (size // 4).bit_length()
    return network(config_of(widths, latent=12 * len(widths), embedding=4, **settings), channels=1, classes=2)


@pytest.mark.parametrize(("size", "linear"), [(32, True), (64, False)])
def test_a_bare_encoder_keeps_what_is_negative_and_normalises_its_weights(size: int, linear: bool) -> None:
    bare, ours = (made(Encoder, size, encoder_head=head, encoder_conditioning="scalar") for head in ("bare", "relu"))
    assert parametrize.is_parametrized(bare.embedding)
    assert parametrize.is_parametrized(bare.linear) == linear
    assert not parametrize.is_parametrized(ours.embedding)
    h, y = -torch.rand(3, 8, 4, 4), torch.tensor([0, 1, 0])
    z = bare._latent(h, y)
    assert not torch.equal(z[0], z[2])
    wanted = bare.linear(h.flatten(1)) + (bare.embedding(y) * h.flatten(1)).sum(dim=1, keepdim=True)
    assert_each_close(z, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours._latent(h, y)[0], ours.linear.bias), "a ReLU leaves nothing"


def test_summed_features_are_the_sums_of_those_at_places() -> None:
    summed, placed_at = (made(Discriminator, features=form).eval() for form in ("sums", "places"))
    x = torch.randn(3, 1, 16, 16)
    assert_each_close(summed.features(x), placed_at.features(x).sum(dim=(2, 3)), rtol=1e-6, atol=1e-6)
    assert torch.equal(summed(x, torch.tensor([0, 1, 0])), placed_at(x, torch.tensor([0, 1, 0])))


@pytest.mark.parametrize("head", ["flatten", "sum"])
def test_a_critic_without_a_class_leaves_its_projection_out(head: str) -> None:
    d = made(Discriminator, discriminator_head=head).eval()
    x, y = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 0])
    f = d.features(x)
    h = f.flatten(1) if head == "flatten" else f.sum(dim=(2, 3))
    assert_each_close(d(x), d(x, y) - (d.embedding(y) * h).sum(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["film", "scalar"])
def test_an_encoder_without_a_class_is_one_without_class_terms(conditioning: str) -> None:
    e = made(Encoder, encoder_conditioning=conditioning).eval()
    x, y = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 0])
    assert e(x).shape == e(x, y).shape
    assert not torch.allclose(e(x), e(x, y))
    if conditioning == "scalar":
        e.embedding.weight.data.zero_()
        assert torch.equal(e(x), e(x, y))


def test_the_last_convolution_may_be_of_single_pixels() -> None:
    g = made(Generator, generator_head="1x1", kernels="fused").eval()
    z, y = torch.randn(2, 36), torch.tensor([0, 1])
    assert g.head.weight.shape == (1, 8, 1, 1)
    assert g(z, y).shape == (2, 1, 16, 16)
    assert_each_close(frozen(g)(z, y), g(z, y), rtol=1e-4, atol=1e-5)


def test_a_step_with_every_form_is_traced(tiny: Callable[..., tuple[Run, Training]]) -> None:
    (_, plain), (_, traced) = (tiny(folder=name, **VARIANTS["authors"]) for name in ("plain", "traced"))
    traced.trace()
    assert steps(traced) == steps(plain)


def test_the_authors_run_from_training_to_detection(tmp_path: Path) -> None:
    shapes(tmp_path / "data", ["good", "bad"], 12)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in VARIANTS["authors"].items()]
    data = ["--dataset", tmp_path / "data", "--normal", "good", "--image-size", 8]
    assert run(train, *data, "--out", tmp_path / "run", *TINY_OPTIONS, *options) == 0
    assert run(detect, tmp_path / "run", tmp_path / "data", "--out", tmp_path / "found", "--masks") == 0


# ---- augmentation ---------------------------------------------------------------------------------------------------


def test_mirrored_images_are_mirrored_exactly() -> None:
    x = torch.randn(64, 1, 8, 8)
    found = placed(x, placements("flip", 64, torch.Generator().manual_seed(1)))
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(found, x, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(found, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48


def test_parts_have_half_the_area_or_more_and_lie_within() -> None:
    theta = placements("crop", 2000, torch.Generator().manual_seed(1))
    width, height = theta[:, 0, 0], theta[:, 1, 1]
    area = width * height
    # A part that would be wider than the image is cut to its width.
    assert area.min() > LEAST / ASPECT**0.5 - 1e-6
    assert area.max() <= 1
    assert (area < 0.6).any()
    assert (area > 0.9).any()
    assert (width / height).max() <= ASPECT + 1e-5
    for side, centre in ((width, theta[:, 0, 2]), (height, theta[:, 1, 2])):
        assert (centre.abs() + side <= 1 + 1e-5).all()
    assert (placements("both", 2000, torch.Generator().manual_seed(1))[:, 0, 0] < 0).float().mean() == pytest.approx(
        0.5, abs=0.05
    )


def test_a_part_is_what_cutting_and_enlarging_gives() -> None:
    x = torch.randn(1, 1, 8, 8)
    theta = torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, 0.5]]])  # the quarter at the lower left
    # Taps beyond the part are its neighbours in the image, not its own border: compare away from there.
    wanted = F.interpolate(x[:, :, 4:, :4], scale_factor=2, mode="bilinear", align_corners=False)
    assert_each_close(placed(x, theta)[:, :, 1:, :7], wanted[:, :, 1:, :7], rtol=1e-4, atol=1e-5)


def test_draws_go_by_seed_and_step_and_do_not_touch_what_is_tested(tiny: Callable[..., tuple[Run, Training]]) -> None:
    (_, one), (_, two), (_, plain) = (
        tiny(folder=f, augmentation=k) for f, k in (("a", "both"), ("b", "both"), ("c", "none"))
    )
    batches = [[x for x, _ in training.batches("gan")] for training in (one, two, plain)]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(batches[0], batches[2], strict=True))
    assert torch.equal(next(one.batches("pathology"))[0], next(plain.batches("pathology"))[0])
    assert torch.equal(one.data.images([0, 1]), plain.data.images([0, 1]))
