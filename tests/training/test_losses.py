"""The losses: what they are made of, and what their gradients reach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raccgan.models.discriminator import Discriminator
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator
from raccgan.training.losses import critic_loss, encoder_loss, gradient_penalty
from tests.conftest import config_of
from tests.kernels.compare import assert_each_close, largest, largest_difference

SIZES = {"channels": 1, "classes": 2}
Y = torch.tensor([0, 1, 1])


def make() -> tuple[Generator, Discriminator, Encoder]:
    torch.manual_seed(0)
    config = config_of((8, 8, 8), latent=12, attention_generator="all")
    g = Generator(config, **SIZES).eval().requires_grad_(False)
    d = Discriminator(config, **SIZES).eval().requires_grad_(False)
    return g, d, Encoder(config, **SIZES)


def test_the_feature_term_reaches_the_encoder_and_nothing_else() -> None:
    """The published code detaches it. Here the encoder learns from it, through frozen f and G."""
    g, d, e = make()
    x = torch.rand(3, 1, 16, 16) * 2 - 1
    _, feature = encoder_loss(e, g, d, x, Y)
    feature.backward()
    for name, weight in e.named_parameters():
        # A bias before an instance norm has no influence but through the skip; weights all have.
        if name.endswith("weight") and "attention" not in name:
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name
    assert all(p.grad is None for network in (g, d) for p in network.parameters())


def test_the_image_term_is_the_mean_squared_error() -> None:
    g, d, e = make()
    x = torch.rand(3, 1, 16, 16) * 2 - 1
    image, feature = encoder_loss(e, g, d, x, Y)
    x_hat = g(e(x, Y), Y)
    assert_each_close(image, (x - x_hat).square().mean(), rtol=1.3e-6, atol=1e-5)
    assert_each_close(feature, (d.features(x) - d.features(x_hat)).square().mean(), rtol=1.3e-6, atol=1e-5)


def test_the_penalty_of_a_critic_with_a_known_gradient() -> None:
    """D(x) = <a, x> has the gradient a everywhere: the penalty is (|a| - 1)^2, its gradient 2 (|a| - 1) a / |a|."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.full((16,), 0.5))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.a

    critic = Linear()
    penalty = gradient_penalty(critic, torch.randn(3, 1, 4, 4), Y)  # type: ignore[arg-type]
    penalty.backward()
    assert_each_close(penalty, torch.tensor(1.0), rtol=1.3e-6, atol=1e-5)  # |a| = 2
    assert_each_close(critic.a.grad, 2 * critic.a.detach() / 2, rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_penalty_is_of_the_gradients_dtype_and_at_least_float32(dtype: torch.dtype, wanted: torch.dtype) -> None:
    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x * (1 + 2**-30)).flatten(1).sum(dim=1)  # a slope that float32 rounds to one

    penalty = gradient_penalty(Scale(), torch.ones(2, 1, 1, 1, dtype=dtype), torch.zeros(2))  # type: ignore[arg-type]
    assert penalty.dtype == wanted
    assert (penalty > 0) == (dtype == torch.float64)


@pytest.mark.parametrize("attention", ["none", "all"])
def test_the_penalty_differs_by_class_and_moves_every_weight_of_the_critic(attention: str) -> None:
    torch.manual_seed(0)
    d = Discriminator(config_of((64, 64, 64), attention_discriminator=attention), **SIZES).double()
    x = torch.rand(3, 1, 16, 16, dtype=torch.float64)
    penalty = gradient_penalty(d, x, Y)
    assert penalty != gradient_penalty(d, x, 1 - Y)
    penalty.backward()
    for name, weight in d.named_parameters():
        if name.endswith(("weight", "original")):
            assert weight.grad is not None, name
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", ["none", "all"])
def test_both_paths_have_the_same_penalty_gradients(attention: str) -> None:
    """The trap: a fused path that is right to first order and wrong under the penalty."""
    config = config_of((8, 16, 8), discriminator_head="sum", attention_discriminator=attention)
    found = []
    for kernels in ("reference", "fused"):
        torch.manual_seed(0)
        d = Discriminator(replace(config, kernels=kernels), **SIZES).double()
        x = torch.rand(3, 1, 16, 16, dtype=torch.float64)
        wasserstein, penalty = critic_loss(d, x, -x, Y, torch.full((3, 1, 1, 1), 0.3, dtype=torch.float64))
        (10 * penalty - wasserstein).backward()
        found.append({name: p.grad for name, p in d.named_parameters()})
    reference, fused = found
    # A bias before an instance norm has gradient zero but for rounding, so what counts is the largest gradient.
    scale = largest(wanted.abs().max().item() for wanted in reference.values() if wanted is not None)
    for name, wanted in reference.items():
        assert (wanted is None) == (fused[name] is None), name
        assert wanted is None or largest_difference(fused[name], wanted, name) < 1e-8 * scale, name
