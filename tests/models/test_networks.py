"""The three networks: the published parameter counts, shapes, and what must not couple samples."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from raccgan.config import attention_blocks
from raccgan.kernels import library
from raccgan.models.blocks import CBAM, flattened
from raccgan.models.discriminator import Discriminator
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator
from raccgan.models.inference import frozen
from tests.conftest import config_of
from tests.kernels.compare import assert_each_close, largest_difference
from tests.kernels.grid import OwnOps

AT_32 = (256, 256, 128, 64)  # 4-4-2-1 times 64
AT_128 = tuple(96 * m for m in (16, 16, 8, 4, 2, 1))


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("kind", "g", "d", "e"),
    [("depthwise-separable", 776_449, 357_965, 940_160), ("dense", 2_262_145, 2_410_945, 2_960_000)],
)
def test_published_counts_at_32_px(kind: str, g: int, d: int, e: int) -> None:
    """0.776, 0.358 and 0.940 M, dense 2.262, 2.411 and 2.960 M: grey, ten classes, the authors' encoder, no CBAM."""
    config = config_of(AT_32, latent=128, convolution=kind, encoder_conditioning="scalar")
    networks = (network(config, channels=1, classes=10) for network in (Generator, Discriminator, Encoder))
    assert tuple(map(count, networks)) == (g, d, e)


@pytest.mark.parametrize(
    ("kind", "g", "e"), [("depthwise-separable", 11_732_609, 16_437_240), ("dense", 67_912_385, 91_707_384)]
)
def test_published_counts_at_128_px(kind: str, g: int, e: int) -> None:
    """11.73 and 16.44 M, dense 67.9 and 91.7 M: grey, two classes. Counted without memory, on the meta device."""
    config = config_of(AT_128, latent=120, convolution=kind, encoder_conditioning="scalar")
    with torch.device("meta"):
        assert count(Generator(config, channels=1, classes=2)) == g
        assert count(Encoder(config, channels=1, classes=2)) == e


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_shapes(size: int, channels: int, classes: int) -> None:
    widths = [8] * ((size // 4).bit_length())
    latent = 6 * len(widths)
    config = config_of(widths, latent=latent, embedding=8, attention_generator="last-4")
    g, d, e = (network(config, channels, classes) for network in (Generator, Discriminator, Encoder))
    y = torch.tensor([0, classes - 1])
    x = g(torch.randn(2, latent), y)
    assert x.shape == (2, channels, size, size)
    assert x.abs().max() <= 1
    assert d(x, y).shape == (2,)
    assert d.features(x).shape == (2, 8, 4, 4)
    assert e(x, y).shape == (2, latent)


@pytest.mark.parametrize("attention", ["none", "all"])
def test_the_discriminator_couples_no_samples(attention: str) -> None:
    """The gradient of one sample's value with respect to another is zero, in training mode."""
    config = config_of((8, 8, 8), attention_discriminator=attention)
    d = Discriminator(config, channels=1, classes=2).train()
    x = torch.randn(3, 1, 16, 16, requires_grad=True)
    (g,) = torch.autograd.grad(d(x, torch.tensor([0, 1, 0]))[1], x)
    assert g[1].abs().max() > 0
    assert g[0].abs().max() == 0
    assert g[2].abs().max() == 0


@pytest.mark.parametrize(("conditioning", "differs"), [("film", True), ("scalar", False)])
def test_the_encoder_tells_classes_apart_in_every_coordinate(conditioning: str, differs: bool) -> None:
    """Ours moves every coordinate by its own amount; the authors' form moves all by the same."""
    config = config_of((8, 8, 8), latent=12, embedding=4, encoder_conditioning=conditioning)
    e = Encoder(config, channels=1, classes=2).double()
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    moved = (e(x, torch.tensor([1])) - e(x, torch.tensor([0]))).squeeze(0)
    assert (moved.std() > 1e-6) == differs
    assert moved.abs().min() > 0


def test_the_latent_is_linear_or_tanh() -> None:
    torch.manual_seed(0)
    x, y = 100 * torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)
    big = Encoder(config_of((8, 8, 8), latent=12, encoder_latent="linear"), channels=1, classes=1)
    big.linear.weight.data *= 100
    assert big(x, y).abs().max() > 1
    big.output = "tanh"
    assert big(x, y).abs().max() <= 1


@pytest.mark.parametrize(("where", "blocks"), [("none", 0), ("all", 3), ("last-2", 2), ("last-9", 3), ("0,2", 2)])
def test_attention_stands_where_it_is_asked_for(where: str, blocks: int) -> None:
    g = Generator(config_of((8, 8, 8, 8), latent=16, attention_generator=where), channels=1, classes=2)
    assert sum(isinstance(module, CBAM) for module in g.modules()) == blocks


@pytest.mark.parametrize("which", ["last", "7", "-1", "1;2", ""])
def test_attention_that_is_no_place_is_refused(which: str) -> None:
    with pytest.raises(ValueError, match="attention"):
        attention_blocks(which, 3)


def test_cbam_has_at_least_one_reduced_channel() -> None:
    assert CBAM(3, "reference").reduce.out_features == 1
    assert CBAM(64, "reference").reduce.out_features == 4


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_cbam_normalises_its_scores_as_batch_norm_does_and_keeps_the_same_running_moments(kernels: str) -> None:
    torch.manual_seed(0)
    module, norm = CBAM(6, kernels), nn.BatchNorm2d(1, momentum=0.01)

    def with_batch_norm(x: torch.Tensor) -> torch.Tensor:
        logits = sum(module.expand(module.reduce(v).relu()) for v in (x.mean(dim=(2, 3)), x.amax(dim=(2, 3))))
        gated = x * logits.sigmoid()[:, :, None, None]
        planes = torch.stack([gated.amax(dim=1), gated.mean(dim=1)], dim=1)
        return gated * norm(module.spatial(planes)).sigmoid()

    for _ in range(3):
        x = 3 * torch.randn(2, 6, 2, 3)  # few scores: the unbiased variance is 12/11 of the biased one
        assert_each_close(module(x), with_batch_norm(x), rtol=1.3e-6, atol=1e-5)
    assert_each_close(module.running_mean, norm.running_mean, rtol=1e-5, atol=1e-7)
    assert_each_close(module.running_var, norm.running_var, rtol=1e-5, atol=0)
    module.eval(), norm.eval()
    assert_each_close(module(x), with_batch_norm(x), rtol=1.3e-6, atol=1e-5)


def test_conditional_batch_norm_in_evaluation_is_the_batch_norm_of_training() -> None:
    """Where the running moments are those of the batch, evaluation gives what training gave."""
    torch.manual_seed(0)
    config = config_of((8, 8, 8), latent=12, embedding=4, attention_generator="all")
    g = Generator(config, channels=1, classes=2).double()
    for norm in (module for module in g.modules() if hasattr(module, "momentum")):
        norm.momentum = 1.0
    z, y = torch.randn(64, 12, dtype=torch.float64), torch.randint(0, 2, (64,))
    with torch.no_grad():
        trained = g(z, y)
    # Spectral norm turned once more in training, and running variances are unbiased: near, not equal.
    assert (g.eval()(z, y) - trained).abs().max() < 1e-2


def test_new_networks_are_normalised_in_eval_mode() -> None:
    """Spectral norm's vectors are those of the orthogonal weights: each normalised weight has the singular value 1."""
    torch.manual_seed(0)
    config = config_of((64, 32, 16), latent=36)
    g, d = (network(config, channels=1, classes=3).eval() for network in (Generator, Discriminator))
    norms = [
        torch.linalg.matrix_norm(cast(torch.Tensor, module.weight).flatten(1), ord=2).item()
        for module in itertools.chain(g.modules(), d.modules())
        if parametrize.is_parametrized(module)
    ]
    assert len(norms) == 13  # two norms of two linear layers in each of two blocks, two skips, G's head; D's two
    assert norms == pytest.approx([1.0] * len(norms), rel=1e-4)
    images = g(torch.randn(16, 36), torch.arange(16) % 3)
    assert images.abs().mean() < 0.4, "saturated"


def test_a_checkpoint_of_one_path_serves_the_other() -> None:
    settings = {"latent": 12, "attention_generator": "all"}
    configs = (config_of((8, 8, 8), kernels=name, **settings) for name in ("reference", "fused"))
    plain, fused = (Generator(config, channels=1, classes=2).eval() for config in configs)
    fused.load_state_dict(plain.state_dict())
    z, y = torch.randn(3, 12), torch.tensor([0, 1, 1])
    assert_each_close(fused(z, y), plain(z, y), rtol=1e-3, atol=1e-4)


def test_frozen_networks_are_the_same_functions_and_leave_the_originals_alone() -> None:
    torch.manual_seed(0)  # in bfloat16 one of thirty draws is ill-conditioned
    config = config_of((8, 4), latent=24, attention_generator="all", discriminator_head="sum")
    x, y, z = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([0, 2]), torch.randn(2, 24)
    pairs: list[tuple[nn.Module, tuple[torch.Tensor, ...]]] = [
        (Generator(config, channels=1, classes=3), (z, y)),
        (Discriminator(config, channels=1, classes=3), (x, y)),
        (Encoder(config, channels=1, classes=3), (x, y)),
    ]
    for network, inputs in pairs:
        for p in network.parameters():
            nn.init.normal_(p, std=0.3)  # biases too
        for name, moment in network.named_buffers():
            if "running_" in name:
                nn.init.uniform_(moment, 0.5, 2.0)
        network.train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        first, second = frozen(network), frozen(network)  # the second, so that the first has spoilt nothing
        assert not first.training
        assert not any(p.requires_grad for p in first.parameters())
        assert network.training
        assert all(p.requires_grad for p in network.parameters())
        after = network.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        wanted = network.eval()(*inputs)
        for copied in (first, second):
            assert_each_close(copied(*inputs), wanted, rtol=1e-4, atol=1e-5)
        halves = frozen(network, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            error, plain = (largest_difference(one(*inputs), wanted) for one in (halves, network))
        assert 0 < error <= 3 * plain + 0.01


def test_the_gradient_of_flattened_features_is_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = flattened(x)
    assert torch.equal(y, x.flatten(1))
    (g,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert g.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(flattened, x)
    assert torch.autograd.gradgradcheck(flattened, x)


@pytest.mark.parametrize("image_channels", [1, 3])
def test_the_generators_head_is_depthwise_separable(image_channels: int) -> None:
    """In training and in evaluation, with and without gradients, and with the running moments moved alike."""
    settings = {"latent": 12, "attention_generator": "all"}
    configs = (config_of((8, 6), kernels=name, **settings) for name in ("reference", "fused"))
    plain, fused = (Generator(config, image_channels, classes=2).train() for config in configs)
    nn.init.normal_(plain.head.bias, std=0.3)
    nn.init.normal_(plain.norm.weight, std=2.0)
    fused.load_state_dict(plain.state_dict())
    z, y = torch.randn(3, 12), torch.tensor([0, 1, 1])
    tight = {"rtol": 1e-4, "atol": 1e-5}
    for train, recorded in itertools.product((True, False), (True, False)):
        plain.train(train)
        fused.train(train)
        with torch.set_grad_enabled(recorded), OwnOps() as own:
            got = fused(z, y)
        with torch.set_grad_enabled(recorded):
            wanted = plain(z, y)
        depthwise = [name for name in own.names if "depthwise" in name]
        assert len(depthwise) == (0 if library.path() is None else 3 if image_channels == 1 else 4)  # a block has two
        assert_each_close(got, wanted, **tight)
        if recorded:
            g = torch.randn_like(got)
            ours, theirs = (
                torch.autograd.grad(image, net.parameters(), g) for image, net in ((got, fused), (wanted, plain))
            )
            for (name, _), found, right in zip(plain.named_parameters(), ours, theirs, strict=True):
                assert_each_close(found, right, rtol=1e-3, atol=1e-4, what=name)
    for name, wanted in plain.norm.state_dict().items():
        assert_each_close(fused.norm.state_dict()[name], wanted, **tight)
