"""The triton backend of the moments: one read of x for both (:mod:`raccgan.kernels.triton_moments`), and one for their
gradient.

d/dx <a, mean(x)> + <b, var(x)> = (a + 2 b (x - mean)) / M        over M = N * H * W pixels

The kernels have not run on a GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile them for sm_80 and
sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.moments import autograd
from raccgan.kernels.triton_moments import fill_moments, sweep_tile
from raccgan.kernels.triton_runtime import Compilation, empty_in_order, in_order, jit, pixels_of, tile_of, tl


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`raccgan.kernels.moments`. x is read in place where it is NCHW or channels_last, copied otherwise.

    The same bits in every run.
    """
    mean, var = torch.ops.raccgan.moments_triton(x)
    return mean, var


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


def compilations() -> Iterator[Compilation]:
    """The kernels in every configuration, dtype and layout, for tests that compile them without a GPU."""
    with runtime.noted() as found:
        layers = ((96, 128, False), (128, 128, True), (128, 16, True), (64, 32, True))
        for dtype, (c, size, last) in product(runtime.DTYPES, layers):
            x, of_channels = runtime.meta(dtype, 2, c, size, size, last=last), runtime.meta(torch.float32, c)
            _forward(x)
            _backward(of_channels, of_channels, x, of_channels)
    return iter(found)
