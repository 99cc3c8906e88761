"""The moments of each channel in Triton: one read of x for both, and one for their gradient.

d/dx <a, mean(x)> + <b, var(x)> = (a + 2 b (x - mean)) / M        over M = N * H * W pixels

A program takes a piece, some pixels of one sample with all their channels, and leaves a mean and the squared deviations
from it; a second launch joins them in a fixed order (Chan et al., 1983). Not run on a GPU yet: the tests run
their PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.autograd import differentiate, needs_grad, register_autograd
from raccgan.kernels.dispatch import Call
from raccgan.kernels.moments import reference
from raccgan.kernels.triton_runtime import Compilation, Config, jit, tl


def supports(call: Call) -> str | None:
    """Why the Triton kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return runtime.supports(call)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`raccgan.kernels.moments`; float32, bfloat16 or float16, and any order of derivative.

    x is read in place where it is NCHW or channels_last, copied otherwise. The same bits in every run. The first
    derivative is a kernel; the second is PyTorch's operations.
    """
    mean, var = torch.ops.raccgan.moments_triton(x)
    return mean, var


# ---- kernels --------------------------------------------------------------------------------------------------------


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


# ---- launches -------------------------------------------------------------------------------------------------------

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


@cache
def _config(c: int, p: int, last: bool) -> Config:
    def work(config: Config) -> tuple[int, int]:
        pixels = _tile(config, c, p, last).tile["PIXELS"]
        return runtime.cdiv(p, pixels), pixels * c

    return _tile(runtime.cheapest(_ELEMENTS, work), c, p, last)


def _in_order(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


@torch.library.custom_op("raccgan::moments_triton", mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)")
def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _in_order(x)
    mean, var = _forward_shape(x)
    n, c, height, width = x.shape
    pixels, last = height * width, not x.is_contiguous()
    config = _config(c, pixels, last)
    pieces = runtime.cdiv(pixels, config.tile["PIXELS"])
    partial = mean.new_empty(n * pieces * 2 * c)
    runtime.launch(_pieces, n * pieces, x, partial, pixels, pieces, config=config, C=c, LAST=last)
    programs = runtime.cdiv(c, _JOIN.tile["COLUMNS"])
    merged = (partial, mean, var, pixels, pieces, n * pieces, float(n * pixels))
    runtime.launch(_join, programs, *merged, config=_JOIN, C=c, PIXELS=config.tile["PIXELS"])
    return mean, var


@_forward.register_fake
def _forward_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1],)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(
    "raccgan::moments_triton_backward",
    mutates_args=(),
    schema="(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor",
)
def _backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    x = _in_order(x)
    grad = torch.empty_like(x)
    n, c, height, width = x.shape
    pixels, last = height * width, not x.is_contiguous()
    config = _config(c, pixels, last)
    pieces = runtime.cdiv(pixels, config.tile["PIXELS"])
    images = (grad_mean.contiguous(), grad_var.contiguous(), x, mean.contiguous(), grad)
    sizes = (pixels, pieces, float(n * pixels))
    runtime.launch(_gradient, n * pieces, *images, *sizes, config=config, C=c, LAST=last)
    return grad


@_backward.register_fake
def _backward_shape(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(_in_order(x))


# ---- gradients ------------------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _forward_backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    grad: Tensor = torch.ops.raccgan.moments_triton_backward(grad_mean, grad_var, *ctx.saved_tensors)
    return grad


def _save_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx: Any, t: Tensor) -> tuple[Tensor | None, ...]:
    needed = [needs_grad(ctx, i) for i in range(4)]
    return tuple(differentiate(reference.gradient, ctx.saved_tensors, (t,), needed))


register_autograd(_forward, _forward_backward, _save_forward)
register_autograd(_backward, _backward_backward, _save_backward)


# ---- ahead of time --------------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """The sweeps in every configuration, dtype and layout."""
    types = {
        **dict.fromkeys(("partial", "mean", "var", "g_mean", "g_var"), "*fp32"),
        **dict.fromkeys(("P", "pieces", "items"), "i32"),
        "count": "fp32",
    }
    for config, dtype, (c, last) in product(_ELEMENTS, runtime.DTYPES, ((96, False), (128, True))):
        typed = {**types, **dict.fromkeys(("x", "g_x"), runtime.pointer(dtype))}
        for kernel in (_pieces, _gradient):
            yield Compilation.of(kernel, _tile(config, c, 2**14, last), typed, {"C": c, "LAST": last})
    yield Compilation.of(_join, _JOIN, types, {"C": 96, "PIXELS": 64})
