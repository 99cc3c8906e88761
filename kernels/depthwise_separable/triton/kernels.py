"""The Triton kernels of the depthwise-separable op that read through a window.

:mod:`ops` says what they compute, and :mod:`launch` launches them.

All kernels read images through strides, fastest where channels are contiguous. They convert to float32 right after each
load and accumulate in float32. They address with 64 bits, and use no atomic operation. height and width are the sizes
of the image that is read through a window, out_height and out_width those of the other image.

A program works on a strip: TILE_ROWS rows of TILE_COLUMNS pixels of TILE_CHANNELS channels, with one tile of pixels and
channels a row. A row that is read serves every row of the strip whose window contains it. For 7 x 7 and four rows that
is 17.5 reads a result instead of 49.
"""

# Triton gives a kernel's arguments and its growing tuples their types, and has no star in a tuple.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from raccgan.kernels.triton_runtime import jit, tl


@jit
def _relu(value):
    return tl.where(value <= 0, 0.0, value)  # NaN stays NaN


@jit
def _prologue(value, inside, scale, shift, center, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    """relu((pre_relu(value) - center) * scale + shift), zero outside the image: padding comes after the prologue."""
    if PRE_RELU:
        value = _relu(value)
    if AFFINE:
        value = tl.where(inside, (value - center) * scale + shift, 0.0)
    if RELU:
        value = _relu(value)
    return value


@jit
def _affine(scale, shift, n, c, channels, AFFINE: tl.constexpr):
    """scale and shift [1, channels] of sample n, for :func:`_prologue`."""
    a, b = 1.0, 0.0
    if AFFINE:
        at = n.to(tl.int64) * channels + c
        a = tl.load(scale + at, mask=c < channels, other=0.0)[None, :]
        b = tl.load(shift + at, mask=c < channels, other=0.0)[None, :]
    return a, b


@jit
def _center(center, n, c, channels, CENTERED: tl.constexpr):
    """What sample n is measured from, [1, channels]."""
    m = 0.0
    if CENTERED:
        m = tl.load(center + n.to(tl.int64) * channels + c, mask=c < channels, other=0.0)[None, :]
    return m


@jit
def _columns(columns, end, c, channels, stride_c, stride_w):
    """Of a row [columns, channels]: offsets, and what is there, which columns are before ``end``.

    A row is then a scalar offset and a scalar condition more.
    """
    there = ((columns >= 0) & (columns < end))[:, None] & (c < channels)[None, :]
    return (columns.to(tl.int64) * stride_w)[:, None] + (c.to(tl.int64) * stride_c)[None, :], there


@jit
def _strip(
    program, channels, out_height, out_width, UP: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The strip of a program: sample, phase of row and column, first row, first column, first channel.

    The phases of a strip are neighbours, as they read the same pixels, and so are the strips of an image.
    """
    across = tl.cdiv(tl.cdiv(out_width, UP), TILE_COLUMNS)
    down = tl.cdiv(tl.cdiv(out_height, UP), TILE_ROWS)
    phase = program % (UP * UP)
    program = program // (UP * UP)
    column = program % across
    program = program // across
    row = program % down
    program = program // down
    blocks = tl.cdiv(channels, TILE_CHANNELS)
    channel = program % blocks * TILE_CHANNELS
    return program // blocks, phase // UP, phase % UP, row * TILE_ROWS, column * TILE_COLUMNS, channel


@jit
def _convolved(
    x, taps, scale, shift, center, row, column, phase_row, phase_column, c, height, width, channels, stride_c, stride_w,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """A tile for each row of a strip of the convolution of one sample, at ``row`` and on, ``column`` and on.

    UP = 2 computes one of the four phases of the transposed convolution of stride 2: every other one of the taps,
    beginning where the phase begins.
    """
    PADDING: tl.constexpr = (KERNEL_SIZE - 1) // 2
    TAPS: tl.constexpr = KERNEL_SIZE // UP  # taps a side that one result uses
    first_row = row * STRIDE - PADDING
    first_column = column * STRIDE - PADDING
    tap_row, tap_column = 0, 0
    if UP == 2:
        first_row = row + (phase_row + PADDING % 2) // 2 - (PADDING + 1) // 2
        first_column = column + (phase_column + PADDING % 2) // 2 - (PADDING + 1) // 2
        tap_row = (phase_row + PADDING + 1) % 2
        tap_column = (phase_column + PADDING + 1) % 2
    columns = first_column + tl.arange(0, TILE_COLUMNS) * STRIDE
    tiles = (tl.zeros([TILE_COLUMNS, TILE_CHANNELS], tl.float32),) * TILE_ROWS
    for s in range(TAPS):
        column_of_taps = ()
        for t in tl.static_range(TAPS):
            tap = (tap_row + UP * t) * KERNEL_SIZE + tap_column + UP * s
            of_tap = tl.load(taps + tap * channels + c, mask=c < channels, other=0.0)
            column_of_taps = column_of_taps + (of_tap[None, :],)
        at, there = _columns(columns + s, width, c, channels, stride_c, stride_w)
        for r in tl.static_range(STRIDE * (TILE_ROWS - 1) + TAPS):
            row_of_x = first_row + r
            inside = there & (row_of_x >= 0) & (row_of_x < height)
            value = tl.load(x + row_of_x.to(tl.int64) * width * stride_w + at, mask=inside, other=0.0).to(tl.float32)
            if PRE_RELU or AFFINE or RELU:
                value = _prologue(value, inside, scale, shift, center, PRE_RELU, AFFINE, RELU)
            added = ()
            for o in tl.static_range(TILE_ROWS):
                if r - STRIDE * o >= 0 and r - STRIDE * o < TAPS:
                    added = added + (tiles[o] + value * column_of_taps[r - STRIDE * o],)
                else:
                    added = added + (tiles[o],)
            tiles = added
    return tiles


@jit
def depthwise_kernel(
    x, taps, scale, shift, center, y, height, width, channels, out_height, out_width, stride_n, stride_c, stride_w,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr,
    RELU: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """y, channels_last, from x; taps [K * K, C]; scale, shift, center [N, C] float32."""
    n, phase_row, phase_column, row, column, channel = _strip(
        tl.program_id(0), channels, out_height, out_width, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    c = channel + tl.arange(0, TILE_CHANNELS)
    a, b = _affine(scale, shift, n, c, channels, AFFINE)
    m = _center(center, n, c, channels, CENTERED)
    tiles = _convolved(
        x + n.to(tl.int64) * stride_n, taps, a, b, m, row, column, phase_row, phase_column, c, height, width, channels,
        stride_c, stride_w, KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, PRE_RELU, AFFINE, RELU,
    )  # fmt: skip
    columns = (column + tl.arange(0, TILE_COLUMNS)) * UP + phase_column
    for o in tl.static_range(TILE_ROWS):
        out = (row + o) * UP + phase_row
        inside = ((out < out_height) & (columns < out_width))[:, None] & (c < channels)[None, :]
        pixel = (n.to(tl.int64) * out_height + out) * out_width + columns
        tl.store(y + pixel[:, None] * channels + c[None, :], tiles[o].to(y.dtype.element_ty), mask=inside)


@jit
def _open(x, inside, scale, shift, center, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr):
    """Where the prologue of x lets a gradient through: at its first ReLU, and at its second one."""
    first = inside
    if PRE_RELU:
        first = inside & ~(x <= 0)
        x = _relu(x)
    if AFFINE:
        x = (x - center) * scale + shift
    second = inside
    if RELU:
        second = inside & ~(x <= 0)
    return first, second


@jit
def _from_center(value, first, center, CENTERED: tl.constexpr):
    """What scale multiplies of an image that goes the way of x: m0 value, from the center where x is."""
    value = tl.where(first, value, 0.0)
    if CENTERED:
        value -= center
    return value


@jit
def adjoint_kernel(
    grad, taps, other, factor, x, scale, shift, center, out, partial, height, width, channels, out_height, out_width,
    grad_stride_n, grad_stride_c, grad_stride_w, other_stride_n, other_stride_c, other_stride_w, x_stride_n, x_stride_c,
    x_stride_w, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr,
    RELU: tl.constexpr, CENTERED: tl.constexpr, FACTOR: tl.constexpr, IMAGE: tl.constexpr, SUMS: tl.constexpr,
    OTHER_CENTERED: tl.constexpr,
):  # fmt: skip
    """:func:`vjp_kernel` of what :func:`depthwise_kernel` makes of grad, which stays in registers.

    other, x and out have the size of the result; factor [N, C]; partial [2, N, strips of a sample, C] float32.
    """
    n, phase_row, phase_column, row, column, channel = _strip(
        tl.program_id(0), channels, out_height, out_width, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    c = channel + tl.arange(0, TILE_CHANNELS)
    tiles = _convolved(
        grad + n.to(tl.int64) * grad_stride_n, taps, 1.0, 0.0, 0.0, row, column, phase_row, phase_column, c, height,
        width, channels, grad_stride_c, grad_stride_w, KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS,
        False, False, False,
    )  # fmt: skip
    factors, _ = _affine(factor, factor, n, c, channels, FACTOR)
    of_scale, of_shift = _affine(scale, shift, n, c, channels, AFFINE)
    centers = _center(center, n, c, channels, CENTERED)
    columns = (column + tl.arange(0, TILE_COLUMNS)) * UP + phase_column
    at_x, there = _columns(columns, out_width, c, channels, x_stride_c, x_stride_w)
    at_other, _ = _columns(columns, out_width, c, channels, other_stride_c, other_stride_w)
    at_out = columns[:, None].to(tl.int64) * channels + c[None, :]
    with_other = tl.zeros([TILE_COLUMNS, TILE_CHANNELS], tl.float32)
    alone = tl.zeros([TILE_COLUMNS, TILE_CHANNELS], tl.float32)
    for o in tl.static_range(TILE_ROWS):
        to = (row + o) * UP + phase_row
        inside = there & (to < out_height)
        pixel = to.to(tl.int64) * out_width
        value = tl.load(x + n.to(tl.int64) * x_stride_n + pixel * x_stride_w + at_x, mask=inside, other=0.0)
        first, second = _open(value.to(tl.float32), inside, of_scale, of_shift, centers, PRE_RELU, AFFINE, RELU)
        upper = tl.where(second, tiles[o], 0.0)
        lower = tl.where(first, upper, 0.0)
        if IMAGE:
            at = (n.to(tl.int64) * out_height * out_width + pixel) * channels + at_out
            tl.store(out + at, (lower * factors).to(out.dtype.element_ty), mask=inside)
        if SUMS:
            at = n.to(tl.int64) * other_stride_n + pixel * other_stride_w + at_other
            measured = tl.load(other + at, mask=inside, other=0.0)
            with_other += upper * _from_center(measured.to(tl.float32), first, centers, OTHER_CENTERED)
            alone += upper
    if SUMS:
        strips = UP * UP * tl.cdiv(tl.cdiv(out_width, UP), TILE_COLUMNS) * tl.cdiv(tl.cdiv(out_height, UP), TILE_ROWS)
        samples = tl.num_programs(0) // (strips * tl.cdiv(channels, TILE_CHANNELS))
        at = (n.to(tl.int64) * strips + tl.program_id(0) % strips) * channels + c
        tl.store(partial + at, tl.sum(with_other, axis=0), mask=c < channels)
        tl.store(partial + samples.to(tl.int64) * strips * channels + at, tl.sum(alone, axis=0), mask=c < channels)


@jit
def correlation_kernel(
    x, grad, scale, shift, center, partial, strips, height, width, channels, out_height, out_width, x_stride_n,
    x_stride_c, x_stride_w, grad_stride_n, grad_stride_c, grad_stride_w, KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, STRIPS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr, RELU: tl.constexpr,
    CENTERED: tl.constexpr, ON_GRAD: tl.constexpr,
):  # fmt: skip
    """partial [programs, K * K, C] float32: over a program's STRIPS strips, sums of grad times what it meets of x.

    The prologue is x's, or grad's where ON_GRAD. A column of the window is a sweep over the
    strips, which the first one leaves in the cache.
    """
    PADDING: tl.constexpr = (KERNEL_SIZE - 1) // 2
    blocks = tl.cdiv(channels, TILE_CHANNELS)
    program = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    across = tl.cdiv(out_width, TILE_COLUMNS)
    down = tl.cdiv(out_height, TILE_ROWS)
    for s in range(KERNEL_SIZE):
        sums = (tl.zeros([TILE_COLUMNS, TILE_CHANNELS], tl.float32),) * KERNEL_SIZE
        for i in range(STRIPS):
            strip = program * STRIPS + i
            n = tl.minimum(strip, strips - 1) // (across * down)
            there = tl.where(strip < strips, out_width, 0)  # columns of a strip; none beyond the last one
            row = strip // across % down * TILE_ROWS
            columns = strip % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
            a, b = _affine(scale, shift, n, c, channels, AFFINE)
            m = _center(center, n, c, channels, CENTERED)
            grad_of_n = grad + n.to(tl.int64) * grad_stride_n
            x_of_n = x + n.to(tl.int64) * x_stride_n
            at, of_grad = _columns(columns, there, c, channels, grad_stride_c, grad_stride_w)
            ours = ()
            for o in tl.static_range(TILE_ROWS):
                inside = of_grad & (row + o < out_height)
                pixel = (row + o).to(tl.int64) * out_width * grad_stride_w
                value = tl.load(grad_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if ON_GRAD:
                    value = _prologue(value, inside, a, b, m, PRE_RELU, AFFINE, RELU)
                ours = ours + (value,)
            at, of_x = _columns(columns * STRIDE - PADDING + s, width, c, channels, x_stride_c, x_stride_w)
            for r in tl.static_range(STRIDE * (TILE_ROWS - 1) + KERNEL_SIZE):
                row_of_x = row * STRIDE - PADDING + r
                inside = of_x & (row_of_x >= 0) & (row_of_x < height)
                pixel = row_of_x.to(tl.int64) * width * x_stride_w
                value = tl.load(x_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if not ON_GRAD:
                    value = _prologue(value, inside, a, b, m, PRE_RELU, AFFINE, RELU)
                added = ()
                for t in tl.static_range(KERNEL_SIZE):
                    if r - t >= 0 and r - t <= STRIDE * (TILE_ROWS - 1) and (r - t) % STRIDE == 0:
                        added = added + (sums[t] + value * ours[(r - t) // STRIDE],)
                    else:
                        added = added + (sums[t],)
                sums = added
        for t in tl.static_range(KERNEL_SIZE):
            at = (program.to(tl.int64) * KERNEL_SIZE * KERNEL_SIZE + t * KERNEL_SIZE + s) * channels + c
            tl.store(partial + at, tl.sum(sums[t], axis=0), mask=c < channels)
