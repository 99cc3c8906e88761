"""Launches the anomaly score's Triton kernels, and divides a call into programs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.anomaly_score.gradients import ScoreGrads, ScoreTensors
from raccgan.kernels.anomaly_score.triton import kernels
from raccgan.kernels.triton_runtime import Compilation, Config, launch, meta

ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
FINISH = Config({"PARTS": 128}, 1)


def tile_of(config: Config, channels: int, channels_last: bool) -> Config:
    """The image's tile, and the features', of a configuration that says only how many elements a program has."""
    elements = config.tile["ELEMENTS"]
    wide = min(32, runtime.power_of_two(channels)) if channels_last else 1
    return config._replace(tile={"PIXEL_TILE": elements // wide, "CHANNEL_TILE": wide, "FEATURE_TILE": elements})


class Plan(NamedTuple):
    """The sizes of a call, and its programs. Nothing but their number depends on the batch, so that no score does."""

    samples: int
    programs: int
    counts: tuple[int, int, int, int]  # pixels, features, image_tiles, feature_tiles
    sizes: tuple[float, float]  # of an image and of a sample's features: what their means are divided by
    layout: dict[str, int]
    tile: Config

    @classmethod
    def of(cls, x: Tensor, f: Tensor | None, images: bool = True, features: bool = True) -> Plan:
        """``images`` and ``features`` say whether anything of them is computed."""
        (n, c, h, w), last = x.shape, not x.is_contiguous()
        pixels, size = h * w, 0 if f is None or n == 0 else f.numel() // n
        config = tile_of(_config(c, pixels, size, last), c, last)
        image_tiles = runtime.cdiv(pixels, config.tile["PIXEL_TILE"]) if images else 0
        feature_tiles = runtime.cdiv(size, config.tile["FEATURE_TILE"]) if features else 0
        counts, layout = (pixels, size, image_tiles, feature_tiles), {"CHANNELS": c, "CHANNELS_LAST": last}
        return cls(n, n * (image_tiles + feature_tiles), counts, (float(c * pixels), float(size)), layout, config)


@cache
def _config(channels: int, pixels: int, features: int, channels_last: bool) -> Config:
    def work(config: Config) -> tuple[int, int]:
        tile = tile_of(config, channels, channels_last).tile
        programs = runtime.cdiv(pixels, tile["PIXEL_TILE"]) + runtime.cdiv(features, tile["FEATURE_TILE"])
        return programs, config.tile["ELEMENTS"]

    return runtime.cheapest(ELEMENTS, work)


def all_alike(x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None) -> ScoreTensors:
    """Each pair as it is where both are dense in the same order; else copies that are."""
    pair = (f, f_hat) if f is None or f_hat is None else _alike(f, f_hat)
    return ScoreTensors(*_alike(x, x_hat), *pair)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.is_contiguous() and b.is_contiguous():
        return a, b
    if a.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        return a, b
    return a.contiguous(), b.contiguous()


def forward_pass(tensors: ScoreTensors, residual: Tensor, feature: Tensor, to_map: Tensor | None) -> None:
    """Fill the outputs; ``tensors`` are alike."""
    assert tensors.x is not None
    plan = Plan.of(tensors.x, tensors.f)
    partial = residual.new_empty(plan.programs)
    given = (*tensors, to_map, partial, *plan.counts)
    launch(kernels.sum_squares, plan.programs, *given, config=plan.tile, **plan.layout)
    if tensors.f is None:
        feature.zero_()
    parts = (partial, residual, feature if tensors.f is not None else None, *plan.counts[2:], *plan.sizes)
    launch(kernels.find_means, plan.samples, *parts, config=FINISH)


def backward_pass(tensors: ScoreTensors, grads: ScoreGrads, found: ScoreTensors) -> None:
    """Fill the gradients that are not None; ``tensors`` are alike."""
    assert tensors.x is not None
    images = found.x is not None or found.x_hat is not None
    features = found.f is not None or found.f_hat is not None
    plan = Plan.of(tensors.x, tensors.f, images, features)
    given = (*tensors, *(g if g is None else g.contiguous() for g in grads), *found, *plan.counts, *plan.sizes)
    launch(kernels.find_gradients, plan.programs, *given, config=plan.tile, **plan.layout)


def compilations() -> Iterator[Compilation]:
    """Every configuration in every dtype and layout, for tests that compile them without a GPU.

    Of the smallest images also without features, whose gradient may come all the same as the op returns that term as
    zeros; and with as little as there can be.
    """
    with runtime.noted() as noted:
        for size, dtype, (c, last) in product((32, 128, 512), runtime.DTYPES, ((1, False), (3, True))):
            x, f = meta(dtype, 2, c, size, size, last=last), meta(dtype, 2, 2**13)
            of_sample, to_map = meta(torch.float32, 2), meta(torch.float32, 2, size, size)
            everything, images = ScoreTensors(x, x, f, f), ScoreTensors(x, x, None, None)
            grads = ScoreGrads(of_sample, of_sample, to_map)
            cases = [
                (everything, to_map, grads, everything),
                (images, to_map, grads, images),
                (images, None, ScoreGrads(of_sample, None, None), ScoreTensors(x, None, None, None)),
            ]
            for tensors, wanted, given, found in cases if size == 32 else cases[:1]:
                forward_pass(tensors, of_sample, of_sample, wanted)
                backward_pass(tensors, given, found)
    return iter(noted)
