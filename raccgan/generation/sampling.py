"""Images from the averaged generator, and how near they come to real images of their class.

Latents. Image i of a seed is made from the latent z_i ~ N(0, 1), a function of the seed and of i alone: the same for
every class, and whatever the number of images. A truncation t draws every coordinate beyond [-t, t] again until it
lies within (BigGAN's truncation trick): images nearer to the typical one, and less different from each other.

Distance. The kernel distance is the unbiased estimate of the squared maximum mean discrepancy between two sets of
images, with the polynomial kernel of KID (Binkowski et al., 2018) on d features a and b of an image each,

    k(a, b) = (a . b / d + 1)^3,

0 in the mean for two draws from one distribution, so a little below it as often as above. The features come from
random convolutions with ReLU, the same ones on every machine: no network to download, and no photographs behind it
that digits or X-rays have nothing to do with (Naeem et al., 2020, found random embeddings to serve such data). They
replace PCA of the pixels, which is blind to what the leading components do not hold: between 231 chest X-rays and
1340 others at 64 px, noise of deviation 0.2 added to every pixel took the distance from 0.24 to 0.46 on the
convolutions, and from 0.36 to 0.36 on 64 components.

It sees images that are wrong and images that are too much alike; it does not see that they are copies of training
images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.models.generator import Generator
from raccgan.models.randomness import stream

LOWEST_TRUNCATION = 0.1
"""Below it a coordinate in a dozen and fewer would be kept, and drawing again takes ever longer."""

MOST = 500
"""Images of a kind that are compared: the estimate gains little from more, and time grows with their square."""

FILTERS = 32
SHUFFLES = 200


@dataclass(frozen=True)
class Comparison:
    """Kernel distances to the real test images of a class."""

    generated: float  # of generated images
    real: float  # of real training images: what a perfect generator comes to
    chance: float  # real images shuffled into two such sets stay below it 19 times in 20
    noise: float  # of uniform noise, which has nothing of the class


def latents(indices: Iterable[int], size: int, *, seed: int, truncation: float | None = None) -> Tensor:
    """The latents z_i of ``indices``, [N, size], on the CPU.

    Raises:
        ValueError: ``truncation`` is below :data:`LOWEST_TRUNCATION` or not a number.
    """
    if truncation is not None and not truncation >= LOWEST_TRUNCATION:
        raise ValueError(f"the truncation must be at least {LOWEST_TRUNCATION}, got {truncation}")
    rows = []
    for index in indices:
        draw = stream(seed, "generate", index)
        z = torch.randn(size, generator=draw)
        while truncation is not None and (beyond := z.abs() > truncation).any():
            z[beyond] = torch.randn(int(beyond.sum()), generator=draw)
        rows.append(z)
    return torch.stack(rows) if rows else torch.empty(0, size)


@torch.inference_mode()
def images(generator: Generator, z: Tensor, y: int, *, batch: int = 64) -> Tensor:
    """G(z, y) of latents z [N, latent] and the class of index y: [N, C, S, S] in [-1, 1], float32, on the CPU."""
    device = generator.embedding.weight.device
    parts = [
        generator(part.to(device), torch.full((len(part),), y, device=device)).float().cpu() for part in z.split(batch)
    ]
    return torch.cat(parts).contiguous()


@torch.inference_mode()
def between_classes(generator: Generator, z: Tensor, first: int, last: int, steps: int) -> Tensor:
    """From one class to another at a fixed latent z [latent]: [steps, C, S, S] in [-1, 1], on the CPU.

    The class embedding that all blocks share moves on the straight line between those of the two classes. A generator
    looks it up in a table, so what is called here is that generator with the points of the line as its table.
    """
    table = generator.embedding.weight
    line = torch.lerp(table[first], table[last], torch.linspace(0, 1, steps, device=table.device)[:, None])
    made: Tensor = torch.func.functional_call(
        generator,
        {"embedding.weight": line},
        (z.to(table.device).expand(steps, -1), torch.arange(steps, device=table.device)),
    )
    return made.float().cpu().contiguous()


def between_latents(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """A path between two latents [latent], ends included: [steps, latent].

    It is cos(t) first + sin(t) last for t from 0 to a quarter turn: of two independent draws from N(0, 1) every point
    of it is such a draw too. Halfway on the straight line the deviation would be 0.7, which no z in training had.
    """
    turn = torch.linspace(0, math.pi / 2, steps)[:, None]
    path = turn.cos() * first + turn.sin() * last
    path[-1] = last  # cos of a quarter turn is not quite 0 in floating point
    return path


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
    """Unbiased squared maximum mean discrepancy of features a [N, d] and b [M, d], N and M at least 2.

    Raises:
        ValueError: fewer than 2 of either.
    """
    return float(_distances(_kernel(torch.cat([a, b]).double()), _first(len(a), len(b))))


def compare(generated: Tensor, train: Tensor, test: Tensor) -> Comparison:
    """How far generated, real training and noise images lie from real test images of the same class.

    All are images [N, C, S, S] in [-1, 1] on the CPU, at least 2 of each. Features are centred on the test images'
    mean and divided by their deviation, one number for all, so that a distance means the same for every data set.

    Raises:
        ValueError: fewer than 2 of one kind.
    """
    reference = features(test).double()
    centre = reference.mean(dim=0)
    # Images that are all alike have no deviation; then distances are in the units of the features.
    deviation = (reference - centre).square().mean().sqrt().item() or 1.0

    def scaled(x: Tensor) -> Tensor:
        return (features(x).double() - centre) / deviation

    known = (reference - centre) / deviation
    draw = stream(0, "compare")
    noise = torch.rand(train.shape, generator=draw) * 2 - 1
    real = _kernel(torch.cat([scaled(train), known]))
    whole = _first(len(train), len(test))
    shuffled = torch.cat([whole[:, torch.randperm(len(real), generator=draw)] for _ in range(SHUFFLES)])
    return Comparison(
        generated=kernel_distance(scaled(generated), known),
        real=float(_distances(real, whole)),
        chance=float(_distances(real, shuffled).quantile(0.95)),
        noise=kernel_distance(scaled(noise), known),
    )


def _kernel(both: Tensor) -> Tensor:
    """k of every pair: [K, K] for features [K, d]."""
    return (both @ both.T / both.shape[1] + 1) ** 3


def _first(n: int, m: int) -> Tensor:
    """Which of n + m rows are the first set: [1, n + m] of 1 and 0."""
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of either kind, got {n} and {m}")
    return torch.cat([torch.ones(1, n), torch.zeros(1, m)], dim=1).double()


def _distances(kernel: Tensor, first: Tensor) -> Tensor:
    """The distance [S] of the rows in the first set to the others, for S ways to choose them: first [S, K], 0 or 1.

    No image is compared with itself, which is what makes the estimate unbiased.
    """
    within = kernel - kernel.diagonal().diag()
    rest = 1 - first
    n, m = first.sum(dim=1), rest.sum(dim=1)
    towards_first, towards_rest = first @ within, rest @ within
    a = (towards_first * first).sum(dim=1) / (n * (n - 1))
    b = (towards_rest * rest).sum(dim=1) / (m * (m - 1))
    return a + b - 2 * (towards_first * rest).sum(dim=1) / (n * m)
