"""How near generated images come to real images of their class: the kernel distance.

It is the unbiased estimate of the squared maximum mean discrepancy between two sets of images, with the kernel of KID
(Binkowski et al., 2018) on d features a and b of an image each, k(a, b) = (a . b / d + 1)^3: 0 in the mean for two sets
from one distribution. The features come from fixed random convolutions, so no network that was trained on photographs
judges digits or X-rays (Naeem et al., 2020). docs/generate.md has measurements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.models.randomness import stream

MOST = 500  # images of a kind to compare: the estimate gains little from more, and time grows with their square
FILTERS = 32
SHUFFLES = 200


class Comparison(NamedTuple):
    """Kernel distances to the real test images of a class."""

    generated: float  # of generated images
    real: float  # of real training images: what a perfect generator comes to
    chance: float  # real images shuffled into two such sets stay below it 19 times in 20
    noise: float  # of uniform noise, which has nothing of the class


@torch.inference_mode()
def features(x: Tensor, *, batch: int = 64) -> Tensor:
    """What the distance compares, [N, d], of images x [N, C, S, S] in [-1, 1] on the CPU.

    3 x 3 convolutions with fixed random weights, ReLU, average pool, down to 4 pixels; the response after each ReLU,
    averaged over a 4 x 4 grid, is kept. So d = 16 * FILTERS for each size from S to 4, halving.
    """
    draw = stream(0, "features")
    sizes = int(math.log2(x.shape[-1] // 4)) + 1
    widths = [x.shape[1]] + [FILTERS] * sizes
    layers = [
        (torch.randn(FILTERS, c, 3, 3, generator=draw) / math.sqrt(4.5 * c), 0.1 * torch.randn(FILTERS, generator=draw))
        for c in widths[:-1]
    ]
    parts = []
    for h in x.split(batch):
        kept = []
        for weight, bias in layers:
            h = F.relu(F.conv2d(h, weight, bias, padding=1))
            kept.append(F.adaptive_avg_pool2d(h, 4).flatten(1))
            h = F.avg_pool2d(h, 2)
        parts.append(torch.cat(kept, dim=1))
    return torch.cat(parts)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features a [N, d] and b [M, d]; a ValueError below 2 of either."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of either kind, got {len(a)} and {len(b)}")
    return float(_distances(torch.cat([a, b]).double(), _first(a, b)[None]))


def compare(generated: Tensor, train: Tensor, test: Tensor) -> Comparison:
    """How far generated, real training and noise images lie from real test images of the same class.

    All are images [N, C, S, S] in [-1, 1] on the CPU, at least 2 of each, else a ValueError. Features are centered on
    the test images' mean and divided by their deviation, one number for all, so that a distance means the same for
    every data set.
    """
    reference = features(test).double()
    center = reference.mean(dim=0)
    # Images that are all alike have no deviation; then distances are in the units of the features.
    deviation = (reference - center).square().mean().sqrt().item() or 1.0

    def scaled(x: Tensor) -> Tensor:
        return (features(x).double() - center) / deviation

    known, real = (reference - center) / deviation, scaled(train)
    draw = stream(0, "compare")
    noise = torch.rand(train.shape, generator=draw) * 2 - 1
    both, first = torch.cat([real, known]), _first(real, known)
    shuffled = torch.stack([first[torch.randperm(len(both), generator=draw)] for _ in range(SHUFFLES)])
    return Comparison(
        generated=kernel_distance(scaled(generated), known),
        real=kernel_distance(real, known),
        chance=float(_distances(both, shuffled).quantile(0.95)),
        noise=kernel_distance(scaled(noise), known),
    )


def _first(a: Tensor, b: Tensor) -> Tensor:
    """Which rows of both sets are those of a: [N + M] of 1 and 0."""
    return torch.cat([torch.ones(len(a)), torch.zeros(len(b))]).double()


def _distances(both: Tensor, first: Tensor) -> Tensor:
    """The distances [S] of rows of ``both`` [K, d] in ``first`` [S, K] to the others; none is compared with itself."""
    kernel = (both @ both.T / both.shape[1] + 1) ** 3
    within = kernel - kernel.diagonal().diag()
    rest = 1 - first
    n, m = first.sum(dim=1), rest.sum(dim=1)
    towards_first, towards_rest = first @ within, rest @ within
    a = (towards_first * first).sum(dim=1) / (n * (n - 1))
    b = (towards_rest * rest).sum(dim=1) / (m * (m - 1))
    return a + b - 2 * (towards_first * rest).sum(dim=1) / (n * m)
