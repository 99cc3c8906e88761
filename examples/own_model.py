"""Our ops in a small model of one's own: a discriminator under a gradient penalty, which differentiates it twice.

The discriminator learns to tell images of plus and minus one from blurred noise.

python examples/own_model.py
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raccgan.kernels.cbam import CbamWeights, cbam
from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable


class Block(nn.Module):
    """ReLU, depthwise 3 x 3, pointwise and average pool in one call, then CBAM in another."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1)
        self.reduce = nn.Linear(out_channels, out_channels // 2)
        self.expand = nn.Linear(out_channels // 2, out_channels)
        self.spatial = nn.Conv2d(2, 1, 7, bias=False)
        self.norm = nn.BatchNorm2d(1)  # its weight and bias; CBAM normalises each sample on its own

    def forward(self, x: Tensor) -> Tensor:
        convolutions = Weights(self.depthwise.weight, self.depthwise.bias, self.pointwise.weight, self.pointwise.bias)
        attention = CbamWeights(
            self.reduce.weight,
            self.reduce.bias,
            self.expand.weight,
            self.expand.bias,
            self.spatial.weight,
            self.norm.weight,
            self.norm.bias,
        )
        y = depthwise_separable(x, convolutions, Prologue(relu=True), Resize(pool=2))
        return cbam(y, attention).y


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(1, 8, 1), Block(8, 16), Block(16, 16))
        self.linear = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 1, H, W]; returns [N]."""
        features: Tensor = F.relu(self.blocks(x)).sum(dim=(2, 3))
        return self.linear(features).squeeze(1)


def penalty(discriminator: nn.Module, x: Tensor) -> Tensor:
    """mean (|dD/dx| - 1)^2: its own gradient is of second order."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def main(steps: int = 60) -> float:
    """Train; returns the last estimate of the Wasserstein distance."""
    torch.manual_seed(0)
    discriminator = Discriminator()
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.0, 0.999))
    distance = torch.zeros(())
    for step in range(steps):
        real = torch.randn(16, 1, 16, 16).sign()
        fake = F.avg_pool2d(torch.randn(16, 1, 16, 16), 3, 1, padding=1)
        mixed = torch.lerp(real, fake, torch.rand(16, 1, 1, 1))
        distance = discriminator(real).mean() - discriminator(fake).mean()
        loss = 10 * penalty(discriminator, mixed) - distance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 9:
            print(f"step {step + 1}: Wasserstein estimate {distance.item():.3f}")
    return distance.item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
