"""How a call of CBAM's Triton kernels is cut into programs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam.autograd import CbamTensors
from raccgan.kernels.triton_runtime import Config

# 16 elements a thread at most: with 32 the backward sweeps take 242 registers of 255.
ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
SCORES = Config({"PIXEL_TILE": 256}, 4)
ITEMS = Config({"ITEMS": 256}, 4)


def sweep_tile(config: Config, channels: int, pixels: int, channels_last: bool) -> Config:
    """Pixels and channels of a tile. A small image is cut into eight at least, for more programs than samples."""
    elements, eighth = config.tile["ELEMENTS"], runtime.power_of_two(runtime.cdiv(pixels, 8))
    if channels_last:
        most = elements // 32  # so many pixels at least share the sums that a tile leaves of each channel
        whole = (size for size in (128, 64, 32) if channels % size == 0 and size <= most)  # no lane without a channel
        channel_tile = next(whole, min(most, runtime.power_of_two(channels)))
        pixel_tile = min(elements // channel_tile, max(4, eighth))
    else:
        pixel_tile = min(256, max(32, eighth))
        channel_tile = min(elements // pixel_tile, runtime.power_of_two(channels))
    return config._replace(tile={"PIXEL_TILE": pixel_tile, "CHANNEL_TILE": channel_tile})


def mlp_tile(channels: int, hidden: int) -> Config:
    wide = runtime.power_of_two(hidden)
    return Config({"HIDDEN_TILE": wide, "CHANNEL_TILE": min(runtime.power_of_two(channels), max(16, 4096 // wide))}, 4)


def taps_tile(k: int) -> Config:
    taps = runtime.power_of_two(2 * k * k)
    return Config({"TAPS": taps, "STEP": max(1, 2048 // taps), "STEPS": 16}, 8)


class Plan(NamedTuple):
    """The sizes of a call, and its programs. Nothing but their number depends on the batch."""

    samples: int
    channels: int
    width: int
    pixels: int
    channels_last: bool
    hidden: int
    k: int
    fixed: bool
    grouped: bool  # whether each sample has moments of its own
    sweep_tile: Config
    mlp_tile: Config
    taps_tile: Config
    tiles: int  # of a sample, in a sweep over x
    score_tiles: int  # of a sample's scores
    tap_tiles: int  # of a sample's scores, for the gradient of the convolution's weight

    @classmethod
    def of(cls, tensors: CbamTensors, batch: bool) -> Plan:
        (n, c, height, width), last = tensors.x.shape, not tensors.x.is_contiguous()
        hidden, k, fixed = tensors.reduce_weight.shape[0], tensors.spatial_weight.shape[-1], tensors.mean is not None
        pixels, taps = height * width, taps_tile(k)
        sweep = sweep_tile(_config(c, pixels, last), c, pixels, last)
        per_tile = sweep.tile["PIXEL_TILE"], SCORES.tile["PIXEL_TILE"], taps.tile["STEP"] * taps.tile["STEPS"]
        sizes = (n, c, width, pixels, last, hidden, k, fixed, not (batch or fixed))
        return cls(*sizes, sweep, mlp_tile(c, hidden), taps, *(runtime.cdiv(pixels, size) for size in per_tile))

    @property
    def groups(self) -> int:
        """Of samples that share moments."""
        return self.samples if self.grouped else 1

    @property
    def group_size(self) -> int:
        return 1 if self.grouped else self.samples

    def sweep(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch a sweep over x: a program a tile."""
        layout = {"CHANNELS": self.channels, "CHANNELS_LAST": self.channels_last}
        runtime.launch(kernel, self.samples * self.tiles, *arguments, config=self.sweep_tile, **layout, **constants)


@cache
def _config(channels: int, pixels: int, channels_last: bool) -> Config:
    def work(config: Config) -> tuple[int, int]:
        pixel_tile = sweep_tile(config, channels, pixels, channels_last).tile["PIXEL_TILE"]
        return runtime.cdiv(pixels, pixel_tile), pixel_tile * channels

    return runtime.cheapest(ELEMENTS, work)
