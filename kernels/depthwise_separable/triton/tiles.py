"""The tiles of the depthwise-separable op's Triton kernels.

A thread holds about eight neighbouring values of a tile: 16 bytes of channels in half precision. A shape has one tile,
which does not depend on the batch. ``triton.autotune`` does not choose among several tiles for two reasons. The order
of a sum follows the tile, so the timing of one run would decide the bits of a result. And the scratch memory of a
launch's sums is sized by the tile before the launch.
"""

from __future__ import annotations

from torch import Tensor

from raccgan.kernels.triton_runtime import Config, cdiv, power_of_two


def strip(c: int, height: int, width: int, channels_last: bool, most: int = 4) -> Config:
    """Of a depthwise convolution or correlation over height x width positions: at most ``most`` rows, 1, 2 or 4."""
    if channels_last:
        channels = min(64, power_of_two(c))
        columns = min(power_of_two(width), max(16, 256 // channels))
    else:
        columns = min(64, power_of_two(width))
        channels = min(power_of_two(c), max(1, 512 // columns))
    rows = min(most, _rows(height))
    tile = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "TILE_CHANNELS": channels}
    return Config(tile, num_warps=_warps(columns * channels // 8), num_stages=1)


def most_rows(down: int, center: Tensor | None) -> int:
    """The most rows of a strip: four of a window of stride 2 and a center spill registers."""
    return 4 if center is None or down == 1 else 2


def block(c: int, pixels: int, channels_last: bool) -> Config:
    """Of an elementwise kernel."""
    if channels_last:
        channels = min(64, power_of_two(c))
        length = min(power_of_two(pixels), 2048 // channels)
    else:
        length = min(1024, power_of_two(pixels))
        channels = min(power_of_two(c), 2048 // length)
    tile = {"TILE_PIXELS": length, "TILE_CHANNELS": channels}
    return Config(tile, num_warps=_warps(length * channels // 16), num_stages=1)


def product(c: int, d: int, height: int, width: int) -> Config:
    """Of the fused kernel: rows times columns positions, some channels at a time, and output channels.

    The widest strip uses each weight most.
    """
    rows, outputs = _rows(height), outputs_of(c, d)
    columns = max(16 // rows, min(16, power_of_two(width)))
    channels = max(16, min(32, power_of_two(c)))
    # 64 values of the product a thread; half of that where values are loaded one by one.
    warps = 8 if rows * columns * outputs >= 64 * 256 or not _even(c, d) else 4
    tile = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "TILE_CHANNELS": channels, "TILE_OUTPUTS": outputs}
    return Config(tile, num_warps=warps, num_stages=2)


def outputs_of(c: int, d: int) -> int:
    """How many output channels a program of the fused kernel computes."""
    return max(16, min(256 if _even(c, d) else 128, power_of_two(d)))


def strips_of(config: Config, height: int, width: int) -> int:
    """Strips of one sample of height x width positions, of one block of channels."""
    return cdiv(height, config.tile["TILE_ROWS"]) * cdiv(width, config.tile["TILE_COLUMNS"])


def _even(c: int, d: int) -> bool:
    """Whether Triton knows that channels come 16 bytes at a time."""
    return c % 16 == 0 and d % 16 == 0


def _rows(height: int) -> int:
    return min(4, power_of_two(height))


def _warps(threads: int) -> int:
    return max(1, min(8, power_of_two(threads // 32)))
