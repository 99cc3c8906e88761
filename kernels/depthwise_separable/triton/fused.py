"""The whole op in one kernel: the depthwise tile is the left operand of a matrix product and never leaves the chip.

The kernel is one registered op. Its gradients are the ops of :mod:`ops` and PyTorch's matrix products, so every order
follows. :mod:`kernels` has the rules for all kernels of the op, and what they share.
"""

# Triton gives a kernel's arguments and its growing tuples their types, and has no star in a tuple.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.autograd import define, inputs_of
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.kernels import _convolved, _strip
from raccgan.kernels.depthwise_separable.triton.launch import PLAIN, SCHEMA, Affine, Convolution, Stride
from raccgan.kernels.depthwise_separable.triton.ops import correlation, depthwise, depthwise_vjp
from raccgan.kernels.layout import empty_image, images, rows
from raccgan.kernels.triton_runtime import Config, cdiv, jit, power_of_two, tl


def fuses(x: Tensor, pointwise: Tensor, kernel_size: int, stride: Stride) -> bool:
    """Whether one kernel is less work than two, by counting; no GPU has been asked.

    It saves writing the depthwise result and reading it, 2 transfers of each value to and from memory, and computes
    that result anew for each block of output channels. Reads of x again come from the first-level cache, by the data
    sheets about eight times as fast as memory (on an H100 128 bytes a clock from each of 132, against 3.35 TB/s), so a
    block more pays where it costs fewer than 16 of them. Beyond two blocks a library's matrix product is better.

    A gradient of the pointwise weight needs the depthwise result in memory; and float32 that may not be rounded to tf32
    is not multiplied on tensor cores at all: torch.compile cannot read that flag. ``kernel_size`` is the convolution's
    before resizing is folded into it.
    """
    if torch.is_grad_enabled() and pointwise.requires_grad:
        return False
    if x.dtype == torch.float32 and (torch.compiler.is_compiling() or precision() != "tf32"):
        return False
    d = pointwise.shape[0]
    again = cdiv(d, _outputs_of(x.shape[1], d)) - 1
    taps = (kernel_size if stride == PLAIN else kernel_size + 1) // stride.up
    reads = taps * (stride.down * 3 + taps) / 4  # of a value of x for one of the convolution, in strips of four rows
    return again <= 1 and again * reads <= 16


@jit
def _stacked(tiles, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """The tiles of a strip's rows as one [rows * columns, channels], row after row."""
    stacked = tiles[0]
    if TILE_ROWS == 2:
        stacked = tl.join(tiles[0], tiles[1]).permute(2, 0, 1).reshape(2 * TILE_COLUMNS, TILE_CHANNELS)
    if TILE_ROWS == 4:
        pairs = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))  # [.., .., low, high bit of the row]
        stacked = pairs.permute(3, 2, 0, 1).reshape(4 * TILE_COLUMNS, TILE_CHANNELS)
    return stacked


@jit
def separable_kernel(
    x, taps, scale, shift, center, pointwise, bias, residual, y, height, width, channels, out_channels, out_height,
    out_width, stride_n, stride_c, stride_w, residual_stride_n, residual_stride_c, residual_stride_w,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, BLOCKS: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, TILE_OUTPUTS: tl.constexpr, PRE_RELU: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y, channels_last: the strip of :func:`depthwise_kernel` is the left operand of a matrix product.

    The channels are BLOCKS blocks of TILE_CHANNELS. pointwise [D, C], bias [D] float32, residual of y's size. A block
    of output channels is a program: each computes the strip anew.
    """
    outputs = tl.cdiv(out_channels, TILE_OUTPUTS)
    d = tl.program_id(0) % outputs * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    program = tl.program_id(0) // outputs
    n, phase_row, phase_column, row, column, _ = _strip(  # all channels are one block
        program, TILE_CHANNELS, out_height, out_width, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    product = tl.zeros([TILE_ROWS * TILE_COLUMNS, TILE_OUTPUTS], tl.float32)
    for block in range(BLOCKS):
        c = block * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
        tiles = _convolved(
            x, taps, scale, shift, center, n, row, column, phase_row, phase_column, c, height, width, channels,
            stride_n, stride_c, stride_w, KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, PRE_RELU,
            RELU,
        )  # fmt: skip
        halved = ()
        for o in tl.static_range(TILE_ROWS):
            halved = halved + (tiles[o].to(pointwise.dtype.element_ty),)
        at = d.to(tl.int64)[None, :] * channels + c[:, None]
        weight = tl.load(pointwise + at, mask=(c < channels)[:, None] & (d < out_channels)[None, :], other=0.0)
        left = _stacked(halved, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS)
        product = tl.dot(left, weight, product, input_precision=PRECISION)
    position = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    out = (row + position // TILE_COLUMNS) * UP + phase_row
    columns = (column + position % TILE_COLUMNS) * UP + phase_column
    inside = ((out < out_height) & (columns < out_width))[:, None] & (d < out_channels)[None, :]
    if bias is not None:
        product += tl.load(bias + d, mask=d < out_channels, other=0.0)[None, :]
    pixel = out.to(tl.int64) * out_width + columns
    if residual is not None:
        at = (pixel * residual_stride_w)[:, None] + (d.to(tl.int64) * residual_stride_c)[None, :]
        at += n.to(tl.int64) * residual_stride_n
        product += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = (n.to(tl.int64) * out_height * out_width + pixel)[:, None] * out_channels + d[None, :]
    tl.store(y + at, product.to(y.dtype.element_ty), mask=inside)


def launch_fused(
    x: Tensor,
    convolution: Convolution,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affine: Affine,
    y: Tensor,
) -> None:
    """Write y; the others as of :func:`fused`."""
    n, d, height, width = y.shape
    c, up = x.shape[1], convolution.stride.up
    image, *strides = launch.by_pixel(x)
    added, *added_strides = launch.by_pixel(residual)
    config = _tile(c, d, cdiv(height, up), cdiv(width, up))
    programs = n * launch.strips_of(config, height, width, up) * cdiv(d, config.tile["TILE_OUTPUTS"])
    images = (image, convolution.taps(), *affine.tensors(), pointwise.contiguous(), launch.dense(bias), added, y)
    sizes = (*x.shape[2:], c, d, height, width, *strides, *added_strides)
    constants = {**convolution.constants(), **affine.relus(), "PRECISION": precision()}
    constants["BLOCKS"] = cdiv(c, config.tile["TILE_CHANNELS"])
    runtime.launch(separable_kernel, programs, *images, *sizes, config=config, **constants)


def _tile(c: int, d: int, height: int, width: int) -> Config:
    """Rows times columns positions, some channels at a time, and output channels; the widest uses each weight most."""
    rows, outputs = min(4, power_of_two(height)), _outputs_of(c, d)
    columns = max(16 // rows, min(16, power_of_two(width)))
    channels = max(16, min(32, power_of_two(c)))
    # 64 values of the product a thread; half of that where values are loaded one by one.
    warps = 8 if rows * columns * outputs >= 64 * 256 or not _even(c, d) else 4
    tile = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "TILE_CHANNELS": channels, "TILE_OUTPUTS": outputs}
    return Config(tile, num_warps=warps, num_stages=2)


def _outputs_of(c: int, d: int) -> int:
    """How many output channels a program computes."""
    return max(16, min(256 if _even(c, d) else 128, power_of_two(d)))


def _even(c: int, d: int) -> bool:
    """Whether Triton knows that channels come 16 bytes at a time."""
    return c % 16 == 0 and d % 16 == 0


def precision() -> str:
    """How float32 is multiplied, as PyTorch's own flags for CUDA's matrix products say at this moment."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _arguments(*inputs: Any) -> tuple[Tensor, Convolution, Tensor, Tensor | None, Tensor | None, Affine]:
    x, w, pointwise, bias, residual, *affine, down, up, _, _ = inputs
    return x, Convolution(w, Stride(down, up)), pointwise, bias, residual, Affine(*affine)


def _shape(x: Tensor, w: Tensor, pointwise: Tensor, *others: Any) -> Tensor:
    return empty_image(x, pointwise.shape[0], *others[-2:])


def _backward(ctx: Any, needs: Sequence[bool], grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, convolution, pointwise, _, _, affine = _arguments(*inputs_of(ctx))
    needs_x, needs_w, needs_pointwise, needs_bias, _, *needs_affine = needs[:7]
    inner = images(rows(grad_y) @ pointwise, grad_y) if needs_x or needs_w or any(needs_affine) else grad_y
    grad_x, grad_scale, grad_shift = depthwise_vjp(inner, x, convolution, affine, (needs_x, *needs_affine))
    grad_w = correlation(x, inner, convolution.kernel_size, convolution.stride, affine) if needs_w else None
    grad_pointwise = None
    if needs_pointwise:
        grad_pointwise = rows(grad_y).t() @ rows(depthwise(x, convolution, grad_y.shape[2], grad_y.shape[3], affine))
    grad_bias = rows(grad_y).sum(dim=0, dtype=torch.float32) if needs_bias else None
    return grad_x, grad_w, grad_pointwise, grad_bias, grad_y, grad_scale, grad_shift


@define(
    f"depthwise_triton_separable(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? residual, {SCHEMA}, "
    "int down, int up, SymInt height, SymInt width) -> Tensor",
    _shape,
    _backward,
)
def _fused(*inputs: Any) -> Tensor:
    y = _shape(*inputs)
    launch_fused(*_arguments(*inputs), y)
    return y


def fused(
    x: Tensor,
    convolution: Convolution,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affine: Affine,
    size: Sequence[int],
) -> Tensor:
    """pointwise D(phi(x), w) + bias + residual [N, D, height, width]; pointwise [D, C] of x's dtype, bias [D] float32.

    Gradients: any order. D(phi(x), w) is not kept for them, but computed again where pointwise's is needed.
    """
    d = pointwise.shape[0]
    bias = None if bias is None else bias.expand(d)
    residual = None if residual is None else residual.expand((x.shape[0], d, *size))
    return _fused(x, convolution.w, pointwise, bias, residual, *affine, *convolution.stride, *size)
