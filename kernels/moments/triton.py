"""The triton backend of the moments: one read of x for both, and one for their gradient.

A program takes a tile, some pixels of one sample with all their channels, and leaves a mean and the sum of the squared
deviations from it. A second launch joins the tiles in a fixed order (Chan et al., 1983). Other ops use these kernels
too. No GPU has run them yet.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.moments import autograd
from raccgan.kernels.triton_runtime import Config, empty_in_order, in_order, jit, pixels_of, tile_of, tl


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`raccgan.kernels.moments`, the same bits in every run. x is copied if not NCHW or channels_last."""
    return torch.ops.raccgan.moments_triton(x)


@jit
def moments_of_tiles(
    x,  # [N, C, P], or [N, P, C] where CHANNELS_LAST
    partial,  # [N, tiles, 2, C]: mean, and squared deviations from it, over the tile
    pixels, tiles,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRE_RELU: tl.constexpr,
    PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, _ = pixels_of(program, tiles, pixels, PIXEL_TILE)
    count = tl.minimum(PIXEL_TILE, pixels - program % tiles * PIXEL_TILE)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if PRE_RELU:
            value = tl.where(value <= 0, 0.0, value)  # NaN stays NaN
        mean = tl.sum(value, axis=0) / count
        away = tl.where(inside, value - mean[None, :], 0.0)
        tl.store(partial + program * 2 * CHANNELS + channel, mean, mask=in_channels)
        tl.store(partial + program * 2 * CHANNELS + CHANNELS + channel, tl.sum(away * away, axis=0), mask=in_channels)


@jit
def join_moments(
    partial,  # [groups, items, 2, C], as moments_of_tiles leaves it
    mean, var,  # [groups, C] each
    kept,  # [2, groups, C]: the same again, or None
    pixels, tiles,  # of a sample
    items,  # tiles of a group
    count: float,  # pixels of a group
    CHANNELS: tl.constexpr, PIXEL_TILE: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments of COLUMNS channels of a group, a sample's or the batch's, from those of its tiles."""
    blocks = tl.cdiv(CHANNELS, COLUMNS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_channels = channel < CHANNELS
    of_group = partial + group * items * 2 * CHANNELS + channel[None, :]
    sums = tl.zeros([ITEMS, COLUMNS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS).to(tl.int64)
        size = tl.minimum(PIXEL_TILE, pixels - i % tiles * PIXEL_TILE)[:, None]
        inside = (i < items)[:, None] & in_channels[None, :]
        sums += size * tl.load(of_group + i[:, None] * 2 * CHANNELS, mask=inside, other=0.0)
        first += ITEMS
    of_all = tl.sum(sums, axis=0) / count
    squares = tl.zeros([ITEMS, COLUMNS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS).to(tl.int64)
        size = tl.minimum(PIXEL_TILE, pixels - i % tiles * PIXEL_TILE)[:, None]
        inside = (i < items)[:, None] & in_channels[None, :]
        at = of_group + i[:, None] * 2 * CHANNELS
        away = tl.load(at, mask=inside, other=0.0) - of_all[None, :]
        squares += tl.where(inside, tl.load(at + CHANNELS, mask=inside, other=0.0) + size * away * away, 0.0)
        first += ITEMS
    of_squares = tl.sum(squares, axis=0) / count
    at = group * CHANNELS + channel
    tl.store(mean + at, of_all, mask=in_channels)
    tl.store(var + at, of_squares, mask=in_channels)
    if kept is not None:
        tl.store(kept + at, of_all, mask=in_channels)
        tl.store(kept + tl.num_programs(0) // blocks * CHANNELS + at, of_squares, mask=in_channels)


_ELEMENTS = (Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 4), Config({"ELEMENTS": 8192}, 8))
_JOIN = Config({"ITEMS": 64, "COLUMNS": 32}, 4)


@cache
def sweep_tile(channels: int, pixels: int, channels_last: bool) -> Config:
    """Pixels and channels of a tile."""

    def tile(config: Config) -> Config:
        elements = config.tile["ELEMENTS"]
        if channels_last:
            channel_tile = min(128, runtime.power_of_two(channels))
            pixel_tile = min(elements // channel_tile, runtime.power_of_two(pixels))
        else:
            pixel_tile = min(256, runtime.power_of_two(pixels))
            channel_tile = min(elements // pixel_tile, runtime.power_of_two(channels))
        return config._replace(tile={"PIXEL_TILE": pixel_tile, "CHANNEL_TILE": channel_tile})

    return runtime.cheapest_sweep(map(tile, _ELEMENTS), channels, pixels)


def fill_moments(x: Tensor, mean: Tensor, var: Tensor, *, pre_relu: bool = False) -> None:
    """Write mean and biased variance of x, or its ReLU: [C] of the batch or [N, C] of each sample; NaN of no pixels."""
    x = in_order(x)
    (n, c, height, width), last = x.shape, not x.is_contiguous()
    pixels, groups = height * width, n if mean.dim() == 2 else 1
    config = sweep_tile(c, pixels, last)
    tiles = runtime.cdiv(pixels, config.tile["PIXEL_TILE"])
    partial = mean.new_empty(n * tiles * 2 * c)
    constants = {"CHANNELS": c, "CHANNELS_LAST": last, "PRE_RELU": pre_relu}
    runtime.launch(moments_of_tiles, n * tiles, x, partial, pixels, tiles, config=config, **constants)
    items = n * tiles // max(1, groups)
    given = (partial, mean, var, None, pixels, tiles, items, float(n * pixels // max(1, groups)))
    constants = {"CHANNELS": c, "PIXEL_TILE": config.tile["PIXEL_TILE"]}
    runtime.launch(join_moments, groups * runtime.cdiv(c, _JOIN.tile["COLUMNS"]), *given, config=_JOIN, **constants)


@jit
def _gradient(
    grad_mean, grad_var, x, mean,
    grad_x,  # as x
    pixels, tiles, count: float,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    sample, pixel, _ = pixels_of(tl.program_id(0).to(tl.int64), tiles, pixels, PIXEL_TILE)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
        a = tl.load(grad_mean + channel, mask=in_channels, other=0.0)[None, :]
        b = tl.load(grad_var + channel, mask=in_channels, other=0.0)[None, :]
        center = tl.load(mean + channel, mask=in_channels, other=0.0)[None, :]
        away = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - center
        tl.store(grad_x + at, ((a + 2 * b * away) / count).to(grad_x.dtype.element_ty), mask=inside)


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = autograd.shapes(x)
    fill_moments(x, mean, var)
    return mean, var


def _backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    x = in_order(x)
    grad = empty_in_order(x)
    (n, c, height, width), last = x.shape, not x.is_contiguous()
    config = sweep_tile(c, height * width, last)
    tiles = runtime.cdiv(height * width, config.tile["PIXEL_TILE"])
    images = (grad_mean.contiguous(), grad_var.contiguous(), x, mean.contiguous(), grad)
    sizes = (height * width, tiles, float(n * height * width))
    runtime.launch(_gradient, n * tiles, *images, *sizes, config=config, CHANNELS=c, CHANNELS_LAST=last)
    return grad


_OPS = [
    torch.library.custom_op(f"raccgan::moments_triton{name}", run, mutates_args=(), schema=schema)
    for name, run, schema in (
        ("", _forward, "(Tensor x) -> (Tensor, Tensor)"),
        ("_backward", _backward, "(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor"),
    )
]
autograd.register_both("moments_triton", empty_in_order)
