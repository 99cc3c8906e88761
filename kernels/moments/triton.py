"""The triton backend of the moments: one read of x for both, and one for their gradient.

d/dx <a, mean(x)> + <b, var(x)> = (a + 2 b (x - mean)) / M        over M = N * H * W pixels

A program takes a piece, some pixels of one sample with all their channels, and leaves a mean and the sum of the squared
deviations from it. A second launch joins the pieces in a fixed order (Chan et al., 1983). The kernels have not run on a
GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.moments import autograd
from raccgan.kernels.triton_runtime import Compilation, Config, jit, tl


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`raccgan.kernels.moments`. x is read in place where it is NCHW or channels_last, copied otherwise.

    The same bits in every run.
    """
    mean, var = torch.ops.raccgan.moments_triton(x)
    return mean, var


@jit
def _pieces(
    x,  # [N, C, P], or [N, P, C] where LAST
    partial,  # [N, pieces, 2, C]: mean, and squared deviations from it, over the piece
    P, pieces,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, start = program // pieces, program % pieces * PIXELS
    p = start + tl.arange(0, PIXELS)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = (n * P + p[:, None]) * C + c[None, :] if LAST else (n * C + c[None, :]) * P + p[:, None]
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(v, axis=0) / tl.minimum(PIXELS, P - start)
        away = tl.where(inside, v - mean[None, :], 0.0)
        tl.store(partial + program * 2 * C + c, mean, mask=c < C)
        tl.store(partial + program * 2 * C + C + c, tl.sum(away * away, axis=0), mask=c < C)


@jit
def _join(
    partial, mean, var,  # [C] each
    P, pieces,
    items,  # pieces of the batch
    count: float,  # pixels of the batch
    C: tl.constexpr, PIXELS: tl.constexpr, ITEMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moments of COLUMNS channels from those of all pieces."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([ITEMS, COLUMNS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS).to(tl.int64)
        size = tl.minimum(PIXELS, P - i % pieces * PIXELS)[:, None]
        at = partial + i[:, None] * 2 * C + c[None, :]
        sums += size * tl.load(at, mask=(i < items)[:, None] & (c < C)[None, :], other=0.0)
        first += ITEMS
    of_all = tl.sum(sums, axis=0) / count
    squares = tl.zeros([ITEMS, COLUMNS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS).to(tl.int64)
        size = tl.minimum(PIXELS, P - i % pieces * PIXELS)[:, None]
        inside = (i < items)[:, None] & (c < C)[None, :]
        at = partial + i[:, None] * 2 * C + c[None, :]
        away = tl.load(at, mask=inside, other=0.0) - of_all[None, :]
        squares += tl.where(inside, tl.load(at + C, mask=inside, other=0.0) + size * away * away, 0.0)
        first += ITEMS
    tl.store(mean + c, of_all, mask=c < C)
    tl.store(var + c, tl.sum(squares, axis=0) / count, mask=c < C)


@jit
def _gradient(
    g_mean, g_var, x, mean,
    g_x,  # as x
    P, pieces, count: float,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = (n * P + p[:, None]) * C + c[None, :] if LAST else (n * C + c[None, :]) * P + p[:, None]
        a = tl.load(g_mean + c, mask=c < C, other=0.0)[None, :]
        b = tl.load(g_var + c, mask=c < C, other=0.0)[None, :]
        away = (
            tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + c, mask=c < C, other=0.0)[None, :]
        )
        tl.store(g_x + at, ((a + 2 * b * away) / count).to(g_x.dtype.element_ty), mask=inside)


_ELEMENTS = (Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 4), Config({"ELEMENTS": 8192}, 8))
_JOIN = Config({"ITEMS": 64, "COLUMNS": 32}, 4)


def _tile(config: Config, c: int, p: int, last: bool) -> Config:
    """Pixels and channels of a piece."""
    elements = config.tile["ELEMENTS"]
    if last:
        channels = min(128, runtime.power_of_two(c))
        pixels = min(elements // channels, runtime.power_of_two(p))
    else:
        pixels = min(256, runtime.power_of_two(p))
        channels = min(elements // pixels, runtime.power_of_two(c))
    return config._replace(tile={"PIXELS": pixels, "CHANNELS": channels})


def _cut(x: Tensor) -> tuple[int, int, int, int, bool, Config]:
    """N, C, pixels, pieces of a sample, whether x is channels_last, and the piece."""
    (n, c, height, width), last = x.shape, not x.is_contiguous()
    config = _config(c, height * width, last)
    return n, c, height * width, runtime.cdiv(height * width, config.tile["PIXELS"]), last, config


@cache
def _config(c: int, p: int, last: bool) -> Config:
    def work(config: Config) -> tuple[int, int]:
        pixels = _tile(config, c, p, last).tile["PIXELS"]
        return runtime.cdiv(p, pixels), pixels * c

    return _tile(runtime.cheapest(_ELEMENTS, work), c, p, last)


def _in_order(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _in_order(x)
    mean, var = autograd.shapes(x)
    n, c, pixels, pieces, last, config = _cut(x)
    partial = mean.new_empty(n * pieces * 2 * c)
    runtime.launch(_pieces, n * pieces, x, partial, pixels, pieces, config=config, C=c, LAST=last)
    programs = runtime.cdiv(c, _JOIN.tile["COLUMNS"])
    merged = (partial, mean, var, pixels, pieces, n * pieces, float(n * pixels))
    runtime.launch(_join, programs, *merged, config=_JOIN, C=c, PIXELS=config.tile["PIXELS"])
    return mean, var


def _backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    x = _in_order(x)
    grad = torch.empty_like(x)
    n, c, pixels, pieces, last, config = _cut(x)
    images = (grad_mean.contiguous(), grad_var.contiguous(), x, mean.contiguous(), grad)
    sizes = (pixels, pieces, float(n * pixels))
    runtime.launch(_gradient, n * pieces, *images, *sizes, config=config, C=c, LAST=last)
    return grad


_OPS = [
    torch.library.custom_op(f"raccgan::moments_triton{name}", run, mutates_args=(), schema=schema)
    for name, run, schema in (
        ("", _forward, "(Tensor x) -> (Tensor, Tensor)"),
        ("_backward", _backward, "(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor"),
    )
]
autograd.register("moments_triton", lambda x: torch.empty_like(_in_order(x)))


def compilations() -> Iterator[Compilation]:
    """The kernels in every configuration, dtype and layout, for tests that compile them without a GPU."""
    with runtime.noted() as found:
        layers = ((96, 128, False), (128, 128, True), (128, 16, True), (64, 32, True))
        for dtype, (c, size, last) in product(runtime.DTYPES, layers):
            x, of_channels = runtime.meta(dtype, 2, c, size, size, last=last), runtime.meta(torch.float32, c)
            _forward(x)
            _backward(of_channels, of_channels, x, of_channels)
    return iter(found)
