"""The Triton kernel that computes all of y: the depthwise tile is the left operand of a matrix product.

:mod:`kernels` has the rules for all kernels of the op, and what they share.
"""

# Triton gives a kernel's arguments and its growing tuples their types, and has no star in a tuple.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from raccgan.kernels.depthwise_separable.triton.kernels import _affine, _center, _convolved, _strip
from raccgan.kernels.triton_runtime import jit, tl


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
    AFFINE: tl.constexpr, RELU: tl.constexpr, CENTERED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
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
    x += n.to(tl.int64) * stride_n
    product = tl.zeros([TILE_ROWS * TILE_COLUMNS, TILE_OUTPUTS], tl.float32)
    for block in range(BLOCKS):
        c = block * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
        a, b = _affine(scale, shift, n, c, channels, AFFINE)
        m = _center(center, n, c, channels, CENTERED)
        tiles = _convolved(
            x, taps, a, b, m, row, column, phase_row, phase_column, c, height, width, channels, stride_c, stride_w,
            KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, PRE_RELU, AFFINE, RELU,
        )  # fmt: skip
        halved = ()
        for o in tl.static_range(TILE_ROWS):
            halved = halved + (tiles[o].to(OPERAND),)
        at = d.to(tl.int64)[None, :] * channels + c[:, None]
        weight = tl.load(pointwise + at, mask=(c < channels)[:, None] & (d < out_channels)[None, :], other=0.0)
        left = _stacked(halved, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS)
        product = tl.dot(left, weight.to(OPERAND), product, input_precision=PRECISION)
    position = tl.arange(0, TILE_ROWS * TILE_COLUMNS)
    out = (row + position // TILE_COLUMNS) * UP + phase_row
    columns = (column + position % TILE_COLUMNS) * UP + phase_column
    inside = ((out < out_height) & (columns < out_width))[:, None] & (d < out_channels)[None, :]
    if BIAS:
        product += tl.load(bias + d, mask=d < out_channels, other=0.0)[None, :]
    pixel = out.to(tl.int64) * out_width + columns
    if RESIDUAL:
        at = (pixel * residual_stride_w)[:, None] + (d.to(tl.int64) * residual_stride_c)[None, :]
        at += n.to(tl.int64) * residual_stride_n
        product += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = (n.to(tl.int64) * out_height * out_width + pixel)[:, None] * out_channels + d[None, :]
    tl.store(y + at, product.to(y.dtype.element_ty), mask=inside)
