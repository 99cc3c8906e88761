"""The Triton kernels of the depthwise-separable family that look through a window.

:mod:`triton_ops` says what they compute, :mod:`triton_launch` launches them.

All of them read images through strides, fastest where channels are contiguous; add in float32, and turn to it right
after each load, as the interpreter's bfloat16 arithmetic is wrong; and address with 64 bits. H and W are the sides of
what is read through a window, h and v those of the other image. None of them uses an atomic operation.

A strip is what a program works on: R rows of BW pixels of BC channels, one [BW, BC] tile a row. A row that is read
serves every row of the strip whose window it is in: for 7 x 7 and R = 4 that is 17.5 reads a result instead of 49.
"""

# Triton gives a kernel's arguments and its growing tuples their types, and has no star in a tuple.
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from raccgan.kernels.triton_runtime import jit, tl


@jit
def _rectified(v):
    return tl.where(v <= 0, 0.0, v)  # NaN stays NaN


@jit
def _prologue(v, inside, scale, shift, centre, PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr):
    """act((pre(v) - centre) * scale + shift), zero outside the image: padding comes after the prologue."""
    if PRE:
        v = _rectified(v)
    if AFFINE:
        v = tl.where(inside, (v - centre) * scale + shift, 0.0)
    if ACT:
        v = _rectified(v)
    return v


@jit
def _affine(scale, shift, n, c, C, AFFINE: tl.constexpr):
    """scale and shift [1, BC] of sample n, for :func:`_prologue`."""
    a, b = 1.0, 0.0
    if AFFINE:
        at = n.to(tl.int64) * C + c
        a = tl.load(scale + at, mask=c < C, other=0.0)[None, :]
        b = tl.load(shift + at, mask=c < C, other=0.0)[None, :]
    return a, b


@jit
def _centre(centre, n, c, C, CENTRED: tl.constexpr):
    """What sample n is measured from, [1, BC]."""
    m = 0.0
    if CENTRED:
        m = tl.load(centre + n.to(tl.int64) * C + c, mask=c < C, other=0.0)[None, :]
    return m


@jit
def _columns(columns, end, c, C, stride_c, stride_w):
    """[BW, BC] of a row: offsets of columns and channels, and whether they are there, columns being so before ``end``.

    A row is then a scalar offset and a scalar condition more.
    """
    there = ((columns >= 0) & (columns < end))[:, None] & (c < C)[None, :]
    return (columns.to(tl.int64) * stride_w)[:, None] + (c.to(tl.int64) * stride_c)[None, :], there


@jit
def _strip(pid, C, h, v, U: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """The strip of program ``pid``: sample, phase of row and column, first row, first column, first channel.

    The phases of a strip are neighbours, as they read the same pixels, and so are the strips of an image.
    """
    across = tl.cdiv(tl.cdiv(v, U), BW)
    down = tl.cdiv(tl.cdiv(h, U), R)
    phase = pid % (U * U)
    pid = pid // (U * U)
    column = pid % across
    pid = pid // across
    row = pid % down
    pid = pid // down
    blocks = tl.cdiv(C, BC)
    return pid // blocks, phase // U, phase % U, row * R, column * BW, pid % blocks * BC


@jit
def _convolved(
    x, taps, scale, shift, centre, row, column, phase_row, phase_column, c, H, W, C, stride_c, stride_w,
    K: tl.constexpr, S: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """R tiles [BW, BC] of the convolution of one sample, at positions ``row`` and on, ``column`` and on.

    S is the stride. U = 2 computes one of the four phases of the transposed convolution of stride 2: every other one of
    the K x K taps, beginning where the phase begins.
    """
    P: tl.constexpr = (K - 1) // 2
    T: tl.constexpr = K // U  # taps a side that one result uses
    first_row = row * S - P
    first_column = column * S - P
    tap_row, tap_column = 0, 0
    if U == 2:
        first_row = row + (phase_row + P % 2) // 2 - (P + 1) // 2
        first_column = column + (phase_column + P % 2) // 2 - (P + 1) // 2
        tap_row = (phase_row + P + 1) % 2
        tap_column = (phase_column + P + 1) % 2
    columns = first_column + tl.arange(0, BW) * S
    tiles = (tl.zeros([BW, BC], tl.float32),) * R
    for s in range(T):
        column_of_taps = ()
        for t in tl.static_range(T):
            tap = (tap_row + U * t) * K + tap_column + U * s
            column_of_taps = column_of_taps + (tl.load(taps + tap * C + c, mask=c < C, other=0.0)[None, :],)
        at, there = _columns(columns + s, W, c, C, stride_c, stride_w)
        for r in tl.static_range(S * (R - 1) + T):
            row_of_x = first_row + r
            inside = there & (row_of_x >= 0) & (row_of_x < H)
            value = tl.load(x + row_of_x.to(tl.int64) * W * stride_w + at, mask=inside, other=0.0).to(tl.float32)
            if PRE or AFFINE or ACT:
                value = _prologue(value, inside, scale, shift, centre, PRE, AFFINE, ACT)
            added = ()
            for o in tl.static_range(R):
                if r - S * o >= 0 and r - S * o < T:
                    added = added + (tiles[o] + value * column_of_taps[r - S * o],)
                else:
                    added = added + (tiles[o],)
            tiles = added
    return tiles


@jit
def depthwise_kernel(
    x, taps, scale, shift, centre, y, H, W, C, h, v, stride_n, stride_c, stride_w,
    K: tl.constexpr, S: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """y [N, C, h, v], channels_last, from x [N, C, H, W]; taps [K * K, C]; scale, shift, centre [N, C] float32."""
    n, phase_row, phase_column, row, column, channel = _strip(tl.program_id(0), C, h, v, U, R, BW, BC)
    c = channel + tl.arange(0, BC)
    a, b = _affine(scale, shift, n, c, C, AFFINE)
    m = _centre(centre, n, c, C, CENTRED)
    tiles = _convolved(
        x + n.to(tl.int64) * stride_n, taps, a, b, m, row, column, phase_row, phase_column, c, H, W, C,
        stride_c, stride_w, K, S, U, R, BW, BC, PRE, AFFINE, ACT,
    )  # fmt: skip
    columns = (column + tl.arange(0, BW)) * U + phase_column
    for o in tl.static_range(R):
        out = (row + o) * U + phase_row
        inside = ((out < h) & (columns < v))[:, None] & (c < C)[None, :]
        pixel = (n.to(tl.int64) * h + out) * v + columns
        tl.store(y + pixel[:, None] * C + c[None, :], tiles[o].to(y.dtype.element_ty), mask=inside)


@jit
def _passes(x, inside, scale, shift, centre, PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr):
    """Where the prologue of x lets a gradient through: at its first ReLU, and at its second one."""
    first = inside
    if PRE:
        first = inside & ~(x <= 0)
        x = _rectified(x)
    if AFFINE:
        x = (x - centre) * scale + shift
    second = inside
    if ACT:
        second = inside & ~(x <= 0)
    return first, second


@jit
def _measured(v, first, centre, CENTRED: tl.constexpr):
    """What scale multiplies of an image that goes the way of x: m0 v, from the centre where x is measured from it."""
    v = tl.where(first, v, 0.0)
    if CENTRED:
        v -= centre
    return v


@jit
def adjoint_kernel(
    g, taps, a, s, x, scale, shift, centre, out, partial, H, W, C, h, v,
    g_stride_n, g_stride_c, g_stride_w, a_stride_n, a_stride_c, a_stride_w, x_stride_n, x_stride_c, x_stride_w,
    K: tl.constexpr, S: tl.constexpr, U: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr,
    FACTOR: tl.constexpr, IMAGE: tl.constexpr, SUMS: tl.constexpr, A_CENTRED: tl.constexpr,
):  # fmt: skip
    """:func:`cotangent_kernel` of what :func:`depthwise_kernel` makes of g [N, C, H, W], which stays in registers.

    a and x [N, C, h, v] and out likewise; partial [2, N, strips of a sample, C] float32.
    """
    n, phase_row, phase_column, row, column, channel = _strip(tl.program_id(0), C, h, v, U, R, BW, BC)
    c = channel + tl.arange(0, BC)
    tiles = _convolved(
        g + n.to(tl.int64) * g_stride_n, taps, 1.0, 0.0, 0.0, row, column, phase_row, phase_column, c, H, W, C,
        g_stride_c, g_stride_w, K, S, U, R, BW, BC, False, False, False,
    )  # fmt: skip
    factor, _ = _affine(s, s, n, c, C, FACTOR)
    of_scale, of_shift = _affine(scale, shift, n, c, C, AFFINE)
    middle = _centre(centre, n, c, C, CENTRED)
    columns = (column + tl.arange(0, BW)) * U + phase_column
    at_x, there = _columns(columns, v, c, C, x_stride_c, x_stride_w)
    at_a, _ = _columns(columns, v, c, C, a_stride_c, a_stride_w)
    at_out = columns[:, None].to(tl.int64) * C + c[None, :]
    with_a = tl.zeros([BW, BC], tl.float32)
    alone = tl.zeros([BW, BC], tl.float32)
    for o in tl.static_range(R):
        to = (row + o) * U + phase_row
        inside = there & (to < h)
        pixel = to.to(tl.int64) * v
        value = tl.load(x + n.to(tl.int64) * x_stride_n + pixel * x_stride_w + at_x, mask=inside, other=0.0)
        first, second = _passes(value.to(tl.float32), inside, of_scale, of_shift, middle, PRE, AFFINE, ACT)
        upper = tl.where(second, tiles[o], 0.0)
        lower = tl.where(first, upper, 0.0)
        if IMAGE:
            at = (n.to(tl.int64) * h * v + pixel) * C + at_out
            tl.store(out + at, (lower * factor).to(out.dtype.element_ty), mask=inside)
        if SUMS:
            other = tl.load(a + n.to(tl.int64) * a_stride_n + pixel * a_stride_w + at_a, mask=inside, other=0.0)
            with_a += upper * _measured(other.to(tl.float32), first, middle, A_CENTRED)
            alone += upper
    if SUMS:
        strips = U * U * tl.cdiv(tl.cdiv(v, U), BW) * tl.cdiv(tl.cdiv(h, U), R)
        samples = tl.num_programs(0) // (strips * tl.cdiv(C, BC))
        at = (n.to(tl.int64) * strips + tl.program_id(0) % strips) * C + c
        tl.store(partial + at, tl.sum(with_a, axis=0), mask=c < C)
        tl.store(partial + samples.to(tl.int64) * strips * C + at, tl.sum(alone, axis=0), mask=c < C)


@jit
def correlation_kernel(
    x, g, scale, shift, centre, partial, strips, H, W, C, h, v,
    x_stride_n, x_stride_c, x_stride_w, g_stride_n, g_stride_c, g_stride_w,
    K: tl.constexpr, S: tl.constexpr, STRIPS: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr, CENTRED: tl.constexpr, ON_G: tl.constexpr,
):  # fmt: skip
    """partial [programs, K * K, C] float32: over a program's STRIPS strips of g, sums of g times what it meets of x.

    x [N, C, H, W], g [N, C, h, v]. The prologue is x's, or g's where ON_G. A column of the window is a sweep over the
    strips, which the first one leaves in the cache.
    """
    P: tl.constexpr = (K - 1) // 2
    blocks = tl.cdiv(C, BC)
    program = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    across = tl.cdiv(v, BW)
    down = tl.cdiv(h, R)
    for s in range(K):
        sums = (tl.zeros([BW, BC], tl.float32),) * K
        for i in range(STRIPS):
            strip = program * STRIPS + i
            n = tl.minimum(strip, strips - 1) // (across * down)
            there = tl.where(strip < strips, v, 0)  # columns of a strip; none beyond the last one
            row = strip // across % down * R
            columns = strip % across * BW + tl.arange(0, BW)
            a, b = _affine(scale, shift, n, c, C, AFFINE)
            m = _centre(centre, n, c, C, CENTRED)
            g_of_n = g + n.to(tl.int64) * g_stride_n
            x_of_n = x + n.to(tl.int64) * x_stride_n
            at, of_g = _columns(columns, there, c, C, g_stride_c, g_stride_w)
            ours = ()
            for o in tl.static_range(R):
                inside = of_g & (row + o < h)
                pixel = (row + o).to(tl.int64) * v * g_stride_w
                value = tl.load(g_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if ON_G:
                    value = _prologue(value, inside, a, b, m, PRE, AFFINE, ACT)
                ours = ours + (value,)
            at, of_x = _columns(columns * S - P + s, W, c, C, x_stride_c, x_stride_w)
            for r in tl.static_range(S * (R - 1) + K):
                row_of_x = row * S - P + r
                inside = of_x & (row_of_x >= 0) & (row_of_x < H)
                pixel = row_of_x.to(tl.int64) * W * x_stride_w
                value = tl.load(x_of_n + pixel + at, mask=inside, other=0.0).to(tl.float32)
                if not ON_G:
                    value = _prologue(value, inside, a, b, m, PRE, AFFINE, ACT)
                added = ()
                for t in tl.static_range(K):
                    if r - t >= 0 and r - t <= S * (R - 1) and (r - t) % S == 0:
                        added = added + (sums[t] + value * ours[(r - t) // S],)
                    else:
                        added = added + (sums[t],)
                sums = added
        for t in tl.static_range(K):
            at = (program.to(tl.int64) * K * K + t * K + s) * C + c
            tl.store(partial + at, tl.sum(sums[t], axis=0), mask=c < C)


@jit
def _stacked(tiles, R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """R tiles [BW, BC] as one [R * BW, BC], row after row."""
    stacked = tiles[0]
    if R == 2:
        stacked = tl.join(tiles[0], tiles[1]).permute(2, 0, 1).reshape(2 * BW, BC)
    if R == 4:
        pairs = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))  # [BW, BC, low, high bit of the row]
        stacked = pairs.permute(3, 2, 0, 1).reshape(4 * BW, BC)
    return stacked


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def separable_kernel(
    x, taps, scale, shift, centre, pointwise, bias, residual, y, partial, H, W, C, D, h, v,
    stride_n, stride_c, stride_w, r_stride_n, r_stride_d, r_stride_w,
    K: tl.constexpr, S: tl.constexpr, U: tl.constexpr, BLOCKS: tl.constexpr, R: tl.constexpr, BW: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATISTICS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y [N, D, h, v], channels_last: the strip of :func:`depthwise_kernel` is the left operand of a matrix product.

    The C channels are BLOCKS blocks of BC. pointwise [D, C], bias [D] float32, residual [N, D, h, v]. partial
    [3, N, strips, D] float32: sum, sum of squares and max of what is stored. A block of output channels is a program:
    each computes the strip anew.
    """
    outputs = tl.cdiv(D, BD)
    d = tl.program_id(0) % outputs * BD + tl.arange(0, BD)
    pid = tl.program_id(0) // outputs
    n, phase_row, phase_column, row, column, _ = _strip(pid, BC, h, v, U, R, BW, BC)  # all channels are one block
    x += n.to(tl.int64) * stride_n
    product = tl.zeros([R * BW, BD], tl.float32)
    for block in range(BLOCKS):
        c = block * BC + tl.arange(0, BC)
        a, b = _affine(scale, shift, n, c, C, AFFINE)
        m = _centre(centre, n, c, C, CENTRED)
        tiles = _convolved(
            x, taps, a, b, m, row, column, phase_row, phase_column, c, H, W, C, stride_c, stride_w,
            K, S, U, R, BW, BC, PRE, AFFINE, ACT,
        )  # fmt: skip
        halved = ()
        for o in tl.static_range(R):
            halved = halved + (tiles[o].to(OPERAND),)
        at = d.to(tl.int64)[None, :] * C + c[:, None]
        weight = tl.load(pointwise + at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0).to(OPERAND)
        product = tl.dot(_stacked(halved, R, BW, BC), weight, product, input_precision=PRECISION)
    position = tl.arange(0, R * BW)
    out = (row + position // BW) * U + phase_row
    columns = (column + position % BW) * U + phase_column
    inside = ((out < h) & (columns < v))[:, None] & (d < D)[None, :]
    if BIAS:
        product += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
    pixel = out.to(tl.int64) * v + columns
    if RESIDUAL:
        at = n.to(tl.int64) * r_stride_n + (pixel * r_stride_w)[:, None] + (d.to(tl.int64) * r_stride_d)[None, :]
        product += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    stored = product.to(y.dtype.element_ty)
    tl.store(y + (n.to(tl.int64) * h * v + pixel)[:, None] * D + d[None, :], stored, mask=inside)
    if STATISTICS:
        strips = tl.num_programs(0) // outputs  # of all samples: [N, strips of one] is one axis
        at = partial + pid.to(tl.int64) * D + d
        value = tl.where(inside, stored.to(tl.float32), 0.0)
        tl.store(at, tl.sum(value, axis=0), mask=d < D)
        tl.store(at + strips.to(tl.int64) * D, tl.sum(value * value, axis=0), mask=d < D)
        value = tl.where(inside, value, float("-inf"))
        tl.store(at + strips.to(tl.int64) * 2 * D, tl.reduce(value, 0, _larger), mask=d < D)
