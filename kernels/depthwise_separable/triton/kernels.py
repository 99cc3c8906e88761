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
def _of_sample(values, n, c, channels, OTHERWISE: tl.constexpr):
    """Of values [N, C] those of sample n, [1, channels]; OTHERWISE without values."""
    found = OTHERWISE
    if values is not None:
        found = tl.load(values + n.to(tl.int64) * channels + c, mask=c < channels, other=0.0)[None, :]
    return found


@jit
def _affine(scale, shift, center, n, c, channels):
    return (
        _of_sample(scale, n, c, channels, 1.0),
        _of_sample(shift, n, c, channels, 0.0),
        _of_sample(center, n, c, channels, 0.0),
    )


@jit
def _columns(columns, end, c, channels, stride_c, stride_w):
    """Of a row [columns, channels]: offsets, and what is there, before ``end``. A row is one scalar of each more."""
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
    x, taps, scale, shift, center, n, row, column, phase_row, phase_column, c, height, width, channels, stride_n,
    stride_c, stride_w, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """A tile for each row of a strip of the convolution of sample n, at ``row`` and on, ``column`` and on.

    UP = 2 computes one of the four phases of the transposed convolution of stride 2: every other one of the taps,
    beginning where the phase begins. Without taps the tiles are x itself, of KERNEL_SIZE 1.
    """
    x += n.to(tl.int64) * stride_n
    a, b, m = _affine(scale, shift, center, n, c, channels)
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
            if taps is not None:
                of_tap = tl.load(taps + tap * channels + c, mask=c < channels, other=0.0)[None, :]
            else:
                of_tap = 1.0
            column_of_taps = column_of_taps + (of_tap,)
        at, there = _columns(columns + s, width, c, channels, stride_c, stride_w)
        for r in tl.static_range(STRIDE * (TILE_ROWS - 1) + TAPS):
            row_of_x = first_row + r
            inside = there & (row_of_x >= 0) & (row_of_x < height)
            value = tl.load(x + row_of_x.to(tl.int64) * width * stride_w + at, mask=inside, other=0.0).to(tl.float32)
            value = _prologue(value, inside, a, b, m, PRE_RELU, scale is not None, RELU)
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
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """y, channels_last, from x; taps [K * K, C]; scale, shift, center [N, C] float32 or None."""
    n, phase_row, phase_column, row, column, channel = _strip(
        tl.program_id(0), channels, out_height, out_width, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    c = channel + tl.arange(0, TILE_CHANNELS)
    tiles = _convolved(
        x, taps, scale, shift, center, n, row, column, phase_row, phase_column, c, height, width, channels, stride_n,
        stride_c, stride_w, KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS, PRE_RELU, RELU,
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
def vjp_kernel(
    grad, taps, other, factor, x, scale, shift, center, out, partial, height, width, channels, out_height, out_width,
    grad_stride_n, grad_stride_c, grad_stride_w, other_stride_n, other_stride_c, other_stride_w, x_stride_n, x_stride_c,
    x_stride_w, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr, TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, RELU: tl.constexpr,
    OTHER_CENTERED: tl.constexpr,
):  # fmt: skip
    """out = m m0 g factor, channels_last, unless out is None; unless partial is None, over the pixels of a strip the
    sums of m g (m0 other - center) and of m g.

    g is what :func:`depthwise_kernel` makes of grad, or grad itself without taps; it stays in registers. m0 and m are
    where the prologue of x lets gradients through. other, x and out have the size of g; factor [N, C];
    partial [2, N, strips of a sample, C] float32.
    """
    n, phase_row, phase_column, row, column, channel = _strip(
        tl.program_id(0), channels, out_height, out_width, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS
    )
    c = channel + tl.arange(0, TILE_CHANNELS)
    tiles = _convolved(
        grad, taps, None, None, None, n, row, column, phase_row, phase_column, c, height, width, channels,
        grad_stride_n, grad_stride_c, grad_stride_w, KERNEL_SIZE, STRIDE, UP, TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS,
        False, False,
    )  # fmt: skip
    factors = _of_sample(factor, n, c, channels, 1.0)
    a, b, m = _affine(scale, shift, center, n, c, channels)
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
        first, second = _open(value.to(tl.float32), inside, a, b, m, PRE_RELU, scale is not None, RELU)
        upper = tl.where(second, tiles[o], 0.0)
        lower = tl.where(first, upper, 0.0)
        if out is not None:
            at = (n.to(tl.int64) * out_height * out_width + pixel) * channels + at_out
            tl.store(out + at, (lower * factors).to(out.dtype.element_ty), mask=inside)
        if other is not None:
            at = n.to(tl.int64) * other_stride_n + pixel * other_stride_w + at_other
            measured = tl.load(other + at, mask=inside, other=0.0)
            with_other += upper * _from_center(measured.to(tl.float32), first, m, OTHER_CENTERED)
        alone += upper
    if partial is not None:
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
    TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, RELU: tl.constexpr, ON_GRAD: tl.constexpr,
):  # fmt: skip
    """partial [programs, K * K, C] float32: over a program's STRIPS strips, sums of grad times what it meets of x.

    The prologue is x's, or grad's where ON_GRAD. A column of the window is a sweep over the strips, which the first one
    leaves in the cache.
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
            a, b, m = _affine(scale, shift, center, n, c, channels)
            grad_of_n = grad + n.to(tl.int64) * grad_stride_n
            x_of_n = x + n.to(tl.int64) * x_stride_n
            at, of_grad = _columns(columns, there, c, channels, grad_stride_c, grad_stride_w)
            ours = ()
            for o in tl.static_range(TILE_ROWS):
                inside = of_grad & (row + o < out_height)
                pixel = (row + o).to(tl.int64) * out_width * grad_stride_w
                value = tl.load(grad_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if ON_GRAD:
                    value = _prologue(value, inside, a, b, m, PRE_RELU, scale is not None, RELU)
                ours = ours + (value,)
            at, of_x = _columns(columns * STRIDE - PADDING + s, width, c, channels, x_stride_c, x_stride_w)
            for r in tl.static_range(STRIDE * (TILE_ROWS - 1) + KERNEL_SIZE):
                row_of_x = row * STRIDE - PADDING + r
                inside = of_x & (row_of_x >= 0) & (row_of_x < height)
                pixel = row_of_x.to(tl.int64) * width * x_stride_w
                value = tl.load(x_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if not ON_GRAD:
                    value = _prologue(value, inside, a, b, m, PRE_RELU, scale is not None, RELU)
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


@jit
def _at(n, p, c, stride_n, stride_c, stride_p):
    return n.to(tl.int64) * stride_n + (p.to(tl.int64) * stride_p)[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@jit
def jvp_kernel(
    image, factor, added, other, other_factor, x, scale, shift, center, out, pixels, channels, image_stride_n,
    image_stride_c, image_stride_p, other_stride_n, other_stride_c, other_stride_p, x_stride_n, x_stride_c, x_stride_p,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, RELU: tl.constexpr,
    OTHER_CENTERED: tl.constexpr,
):  # fmt: skip
    """out = m (m0 image factor + (m0 other - center) other_factor + added), without what is None."""
    blocks, pieces = tl.cdiv(channels, TILE_CHANNELS), tl.cdiv(pixels, TILE_PIXELS)
    n = tl.program_id(0) // (blocks * pieces)
    p = tl.program_id(0) // blocks % pieces * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    c = tl.program_id(0) % blocks * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    a, b, m = _affine(scale, shift, center, n, c, channels)
    first, second = inside, inside
    if PRE_RELU or RELU:
        value = tl.load(x + _at(n, p, c, x_stride_n, x_stride_c, x_stride_p), mask=inside, other=0.0).to(tl.float32)
        first, second = _open(value, inside, a, b, m, PRE_RELU, scale is not None, RELU)
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    if image is not None:
        value = tl.load(image + _at(n, p, c, image_stride_n, image_stride_c, image_stride_p), mask=inside, other=0.0)
        total += tl.where(first, value.to(tl.float32) * _of_sample(factor, n, c, channels, 1.0), 0.0)
    if other is not None:
        value = tl.load(other + _at(n, p, c, other_stride_n, other_stride_c, other_stride_p), mask=inside, other=0.0)
        value = _from_center(value.to(tl.float32), first, m, OTHER_CENTERED)
        total += value * _of_sample(other_factor, n, c, channels, 1.0)
    total = tl.where(second, total + _of_sample(added, n, c, channels, 0.0), 0.0)
    pixel = n.to(tl.int64) * pixels + p
    tl.store(out + pixel[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=inside)
