"""How a call of CBAM's Triton kernels is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

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


@dataclass(frozen=True)
class Plan:
    """The sizes of a call, and its programs. Nothing but their number depends on the batch."""

    shape: torch.Size  # of x
    channels_last: bool
    hidden: int
    k: int
    batch: bool
    fixed: bool

    @classmethod
    def of(cls, tensors: CbamTensors, batch: bool) -> Plan:
        x, hidden, k = tensors.x, tensors.reduce_weight.shape[0], tensors.spatial_weight.shape[-1]
        return cls(x.shape, not x.is_contiguous(), hidden, k, batch, tensors.mean is not None)

    @property
    def samples(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def width(self) -> int:
        return self.shape[3]

    @cached_property
    def pixels(self) -> int:
        return self.shape[2] * self.shape[3]

    @cached_property
    def sweep_tile(self) -> Config:
        config = _config(self.channels, self.pixels, self.channels_last)
        return sweep_tile(config, self.channels, self.pixels, self.channels_last)

    @cached_property
    def mlp_tile(self) -> Config:
        return mlp_tile(self.channels, self.hidden)

    @cached_property
    def taps_tile(self) -> Config:
        return taps_tile(self.k)

    @cached_property
    def tiles(self) -> int:
        """Of a sample, in a sweep over x."""
        return runtime.cdiv(self.pixels, self.sweep_tile.tile["PIXEL_TILE"])

    @cached_property
    def score_tiles(self) -> int:
        """Of a sample's scores."""
        return runtime.cdiv(self.pixels, SCORES.tile["PIXEL_TILE"])

    @cached_property
    def tap_tiles(self) -> int:
        """Of a sample's scores, for the gradient of the convolution's weight."""
        return runtime.cdiv(self.pixels, self.taps_tile.tile["STEP"] * self.taps_tile.tile["STEPS"])

    @property
    def grouped(self) -> bool:
        """Whether each sample has moments of its own."""
        return not (self.batch or self.fixed)

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
