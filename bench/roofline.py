"""The floor under a case's time: what must be computed and moved, over what this machine can compute and move.

    floor = max(bytes / bandwidth, 2 * multiply-adds / peak)

Bytes and multiply-adds follow from shapes alone: each input of a stage is read once and each output written once, by
the least arithmetic known for it (upsampling folded into the convolution, pooling before the matrix product). The two
ceilings are measured in the same run, that of the arithmetic as the best of several large products. A pass is a
sequence of stages, because each needs the one before it:

=============== ==========================================================================================
forward         outputs from inputs
input gradient  gradients of the inputs: as many multiply-adds again
gradient        gradients of the inputs and the weights: twice as many
second gradient through the input gradient, to its cotangent and the weights: twice as many
=============== ==========================================================================================

Nothing here is a promise that a floor can be reached; a share above 1 means that data came from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import layers
from bench.machine import cache_bytes, clock
from raccgan.config import Config

PASSES: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "backward": ("forward", "gradient"),
    "penalty": ("forward", "input gradient", "second gradient"),
}
# In a whole critic the norms have second derivatives too, which send a gradient back through the forward pass.
CRITIC_PENALTY = (*PASSES["penalty"], "gradient")


class Cost(NamedTuple):
    """What one stage must do; ``dtype`` is the arithmetic's."""

    macs: int
    bytes: int
    dtype: str = "float32"


class Work(NamedTuple):
    """An op on given shapes: multiply-adds of its forward pass, and the bytes of its tensors."""

    macs: int
    inputs: int  # what a gradient flows on to
    weights: int
    residual: int  # read forward only: its gradient is the output's, untouched
    outputs: int
    curved: bool  # whether the inputs have a second gradient
    dtype: str

    def stages(self, names: Iterable[str]) -> list[Cost]:
        x, w, y = self.inputs, self.weights, self.outputs
        second = 2 * x + w + y + w + y + (x if self.curved else 0)
        known = {
            "forward": (1, x + w + self.residual + y),
            "input gradient": (1, y + x + w + x),
            "gradient": (2, y + x + w + x + w),
            "second gradient": (2, second),
        }
        return [Cost(known[name][0] * self.macs, known[name][1], self.dtype) for name in names]


def depthwise_separable(
    dtype: torch.dtype, *, shape: tuple[int, int, int, int], out: int, k: int, affine: bool = True, **options: Any
) -> Work:
    """``options`` are those of a case in tests/kernels/grid.py; pre_relu and relu cost nothing."""
    n, c, h, w = shape
    upsample, pool, residual = options.get("upsample", 1), options.get("pool", 1), options.get("residual", False)
    curved = affine or options.get("norm") == "instance"
    wide = n * h * w * upsample**2  # pixels that are convolved
    final = n * (h * upsample // pool) * (w * upsample // pool)
    if k == 1:  # folds into the pointwise convolution, which commutes with both resizings
        macs = min(n * h * w, final) * c * out
    else:
        taps = [wide * k**2]
        if upsample == 2:
            taps.append(wide * ((k + 1) // 2) ** 2)  # one smaller convolution for each output parity
        if pool == 2:
            taps.append(final * (k + 1) ** 2)  # one larger convolution of stride 2
        macs = min(taps) * c + final * c * out
    e = dtype.itemsize
    return Work(
        macs=macs + (n * c * h * w if curved else 0),
        inputs=e * (n * c * h * w + (2 * n * c if affine else 0)),
        weights=e * (c * k * k + out * c + (c + out if options.get("bias", True) else 0)),
        residual=e * final * out if residual else 0,
        outputs=e * final * out,
        curved=curved,
        dtype=name_of(dtype),
    )


def moments(dtype: torch.dtype, *, shape: tuple[int, int, int, int]) -> Work:
    elements = torch.Size(shape).numel()
    return Work(
        macs=2 * elements,
        inputs=dtype.itemsize * elements,
        weights=0,
        residual=0,
        outputs=2 * 4 * shape[1],  # float32 whatever the input is
        curved=True,
        dtype="float32",
    )


def cbam(
    dtype: torch.dtype, *, shape: tuple[int, int, int, int], norm: str, reduced: int, k: int, ties: bool = False
) -> Work:
    n, c, h, w = shape
    elements, e = n * c * h * w, dtype.itemsize
    return Work(
        # An element: two sums and the two gates, half a multiply-add or one each. Then the gates' own layers.
        macs=3 * elements + 2 * n * h * w * k * k + 4 * n * c * reduced,
        inputs=e * elements,
        weights=e * (2 * c * reduced + c + reduced + 2 * k * k + 2),
        residual=0,
        outputs=e * elements,
        curved=True,
        dtype=name_of(dtype),
    )


def anomaly_score(
    dtype: torch.dtype, *, shape: tuple[int, int, int, int], features: tuple[int, ...] | None, want_map: bool = True
) -> Work:
    n, _, h, w = shape
    elements = torch.Size(shape).numel() + (n * torch.Size(features).numel() if features else 0)
    return Work(
        macs=elements,
        inputs=2 * dtype.itemsize * elements,
        weights=0,
        residual=0,
        outputs=4 * (2 * n + (n * h * w if want_map else 0)),  # float32 whatever the inputs are
        curved=True,
        dtype="float32",
    )


WORK: dict[str, Callable[..., Work]] = {
    "depthwise_separable": depthwise_separable,
    "cbam": cbam,
    "moments": moments,
    "anomaly_score": anomaly_score,
}


def training_step(
    config: Config, image_channels: int, generator: int, discriminator: int, dtype: torch.dtype
) -> list[Cost]:
    """One step of the first phase, layer by layer: D with penalty, then G; weights are float32 in every precision.

    Args:
        generator, discriminator: how many parameters they have, for the optimisers and the moving average.

    Heads, linear layers and norms are left out: a few hundredths of the work.
    """
    n = config.batch_size
    G = [depthwise_separable(dtype, **layer.at(n)) for layer in layers.generator(config)]
    G += [cbam(dtype, **layer.at(n)) for layer in layers.attention(config, "batch")]
    D = [depthwise_separable(dtype, **layer.at(n)) for layer in layers.discriminator(config, image_channels)]
    both = [depthwise_separable(dtype, **layer.at(2 * n)) for layer in layers.discriminator(config, image_channels)]
    parts = (
        (G, PASSES["forward"]),  # fake images for D
        (both, PASSES["backward"]),  # D on real and fake images
        (D, CRITIC_PENALTY),
        (G, PASSES["backward"]),
        (D, ("forward", "input gradient")),  # G's loss through D, whose weights stand still
    )
    costs = [cost for works, names in parts for work in works for cost in work.stages(names)]
    # Adam reads the weight, its gradient and two moments and writes three of them; the average reads two, writes one.
    return [*costs, Cost(0, 4 * (7 * (generator + discriminator) + 3 * generator))]


def scoring(config: Config, image_channels: int, batch: int, dtype: torch.dtype) -> list[Cost]:
    """Scores of a batch under one known class, layer by layer: E, G, D's features of x and of x', the score.

    Stem, heads, linear layers and norms are left out: a few hundredths of the work.
    """
    E = [depthwise_separable(dtype, **layer.at(batch)) for layer in layers.encoder(config)]
    G = [depthwise_separable(dtype, **layer.at(batch)) for layer in layers.generator(config)]
    G += [cbam(dtype, **layer.at(batch)) for layer in layers.attention(config, "fixed")]
    D = [depthwise_separable(dtype, **layer.at(batch)) for layer in layers.discriminator(config, image_channels)]
    image, features = (batch, image_channels, config.image_size, config.image_size), (config.widths[0], 4, 4)
    score = anomaly_score(torch.float32, shape=image, features=features, want_map=False)
    return [cost for work in (*E, *G, *D, *D, score) for cost in work.stages(PASSES["forward"])]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ceilings:
    """What the machine was seen to do at best, in bytes and floating-point operations a second."""

    copy: float
    read: float
    peak: dict[str, float]  # by dtype, of the fastest large product

    def floor_ms(self, costs: Iterable[Cost]) -> float:
        """A kernel that only reads is held to the faster of the two bandwidths: a floor has to lie below."""
        bandwidth = max(self.copy, self.read)
        return sum(1e3 * max(c.bytes / bandwidth, 2 * c.macs / self.peak[c.dtype]) for c in costs)

    def at_best(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of each: what is lower was disturbed."""
        peak = {dtype: max(value, other.peak[dtype]) for dtype, value in self.peak.items()}
        return Ceilings(max(self.copy, other.copy), max(self.read, other.read), peak)


def measure_ceilings(device: str) -> Ceilings:
    """A few seconds: a large copy, a large sum, and large products in float32 and in bfloat16.

    As large as it takes to leave the cache and to keep all units busy, and no larger: on a machine that is not quiet,
    only short runs are undisturbed.
    """
    count = cache_bytes(device)  # of float32: each tensor is four times the cache
    source = torch.ones(count, device=device)
    copied = _shortest(partial(torch.zeros_like(source).copy_, source), device)
    read = _shortest(source.sum, device)
    peak = {
        name_of(dtype): max(2 * macs / _shortest(run, device) for macs, run in _products(dtype, device))
        for dtype in (torch.float32, torch.bfloat16)
    }
    return Ceilings(copy=8 * count / copied, read=4 * count / read, peak=peak)


def _products(dtype: torch.dtype, device: str) -> Iterator[tuple[int, Callable[[], object]]]:
    """Multiply-adds and a call of each: a matrix product, and 1 x 1 convolutions, which are matrix products too.

    They come from different libraries. On an AMD processor PyTorch's matrix product reaches less than half of what its
    convolution does in float32; a ceiling is what the machine can do, and not one of its libraries. On a GPU, PyTorch
    lets a float32 convolution use TF32, and a matrix product not.
    """
    side = 8192 if device == "cuda" else 768
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    yield side**3, partial(torch.matmul, a, b)
    for n, c, size in ((64, 1024, 64), (16, 4096, 64)) if device == "cuda" else ((64, 256, 16), (16, 512, 16)):
        x, w = (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
            for shape in ((n, c, size, size), (c, c, 1, 1))
        )
        yield n * size**2 * c**2, partial(F.conv2d, x, w)


def _shortest(run: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """Of as many runs as the time allows, the shortest: a ceiling is what the machine can do undisturbed."""
    run()
    end = time.monotonic() + seconds
    times: list[float] = []
    while time.monotonic() < end or len(times) < 5:
        begun = clock(device)
        run()
        times.append(clock(device) - begun)
    return min(times)
