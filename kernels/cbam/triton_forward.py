"""CBAM's forward kernels in Triton; :mod:`raccgan.kernels.cbam.triton` launches them in the order they stand here.

A program of a sweep over x takes one piece, some pixels of one sample, and goes through all its channels. x is
[N, C, P], or [N, P, C] where LAST; everything else that is made is float32. Three sweeps:

    pool     average and maximum of each channel         then the gate, from the sums of a sample's pieces
    planes   maximum and mean of each pixel, gated       then the scores, a k x k convolution, and their moments
    apply    y = x * gate * sigmoid(normalised scores)

``planes`` takes the pieces in the reverse order, so that what ``pool`` read last, and the cache still holds, is read
first; ``apply`` turns once more.
"""

from __future__ import annotations

from raccgan.kernels.triton_runtime import jit, tl


@jit
def offsets(n, p, c, P, C: tl.constexpr, LAST: tl.constexpr):
    """[PIXELS, CHANNELS] offsets of pixels p and channels c of sample n."""
    return (n * P + p[:, None]) * C + c[None, :] if LAST else (n * C + c[None, :]) * P + p[:, None]


@jit
def pool(
    x,
    sums,  # [N, pieces, 2, C]: sum and maximum over the piece
    P, pieces,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        v = tl.load(x + offsets(n, p, c, P, C, LAST), mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + program * 2 * C + c, tl.sum(v, axis=0), mask=c < C)
        largest = tl.max(tl.where(inside, v, -float("inf")), axis=0)
        tl.store(sums + program * 2 * C + C + c, largest, mask=c < C)


@jit
def pooled_of(sums, average, maximum, n, c, pieces, pixels, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Average and maximum of channels c: as they were given, or from the sums of the sample's pieces."""
    total = tl.zeros([CHANNELS], tl.float32)
    largest = tl.full([CHANNELS], -float("inf"), tl.float32)
    if sums is not None:
        piece = 0
        while piece < pieces:
            at = (n * pieces + piece) * 2 * C + c
            total += tl.load(sums + at, mask=c < C, other=0.0)
            largest = tl.maximum(largest, tl.load(sums + at + C, mask=c < C, other=0.0))
            piece += 1
    total = total / pixels
    if average is not None:
        total = tl.load(average + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    if maximum is not None:
        largest = tl.load(maximum + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    return total, tl.where(c < C, largest, 0.0)


@jit
def gate_channels(
    sums,  # as pool leaves it, or None where both of the next are given
    average, maximum,  # [N, C] each, or None
    reduce_weight, reduce_bias, expand_weight, expand_bias,
    gate,  # [N, C]
    pooled,  # [N, 2, C]: average and maximum
    hidden,  # [N, 2, R]: the MLP's first layer of both, after its ReLU
    pieces, pixels: float,
    C: tl.constexpr, R: tl.constexpr, REDUCED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The channel gate of a sample; REDUCED is a power of two not below R."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, REDUCED)
    of_average = tl.zeros([REDUCED], tl.float32)
    of_maximum = tl.zeros([REDUCED], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        mean, largest = pooled_of(sums, average, maximum, n, c, pieces, pixels, C, CHANNELS)
        tl.store(pooled + n * 2 * C + c, mean, mask=c < C)
        tl.store(pooled + n * 2 * C + C + c, largest, mask=c < C)
        inside = (r < R)[:, None] & (c < C)[None, :]
        weight = tl.load(reduce_weight + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        of_average += tl.sum(weight * mean[None, :], axis=1)
        of_maximum += tl.sum(weight * largest[None, :], axis=1)
    bias = tl.load(reduce_bias + r, mask=r < R, other=0.0).to(tl.float32)
    of_average = tl.maximum(of_average + bias, 0.0)
    of_maximum = tl.maximum(of_maximum + bias, 0.0)
    tl.store(hidden + n * 2 * R + r, of_average, mask=r < R)
    tl.store(hidden + n * 2 * R + R + r, of_maximum, mask=r < R)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (c < C)[:, None] & (r < R)[None, :]
        weight = tl.load(expand_weight + c[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
        logits = tl.sum(weight * (of_average + of_maximum)[None, :], axis=1)
        logits += 2 * tl.load(expand_bias + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(gate + n * C + c, tl.sigmoid(logits), mask=c < C)


@jit
def planes_of(
    x, gate,
    planes,  # [N, 2, P]: maximum and mean over the channels of x * gate
    P, pieces,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    largest = tl.full([PIXELS], -float("inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        v = tl.load(x + offsets(n, p, c, P, C, LAST), mask=inside, other=0.0).to(tl.float32)
        u = v * tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.max(tl.where(inside, u, -float("inf")), axis=1))
        total += tl.sum(u, axis=1)
    tl.store(planes + n * 2 * P + p, largest, mask=p < P)
    tl.store(planes + (n * 2 + 1) * P + p, total / C, mask=p < P)


@jit
def score(
    planes, spatial_weight,
    scores,  # [N, P]
    partial,  # [N, tiles, 2]: mean and squared deviations from it over the tile, or None
    P, W, tiles,
    K: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The convolution of the two planes, with zeros around the image; a program takes PIXELS of a sample."""
    program = tl.program_id(0).to(tl.int64)
    n, first = program // tiles, program % tiles * PIXELS
    p = first + tl.arange(0, PIXELS)
    row, column = p // W, p % W
    value = tl.zeros([PIXELS], tl.float32)
    for i in range(K):
        for j in tl.static_range(0, K):
            y, x = row + i - K // 2, column + j - K // 2
            inside = (p < P) & (y >= 0) & (y * W < P) & (x >= 0) & (x < W)
            at = planes + n * 2 * P + y * W + x
            tap = spatial_weight + i * K + j
            value += tl.load(tap).to(tl.float32) * tl.load(at, mask=inside, other=0.0)
            value += tl.load(tap + K * K).to(tl.float32) * tl.load(at + P, mask=inside, other=0.0)
    tl.store(scores + n * P + p, value, mask=p < P)
    if partial is not None:
        mean = tl.sum(tl.where(p < P, value, 0.0), axis=0) / tl.minimum(PIXELS, P - first)
        deviation = tl.where(p < P, value - mean, 0.0)
        tl.store(partial + program * 2, mean)
        tl.store(partial + program * 2 + 1, tl.sum(deviation * deviation, axis=0))


@jit
def join_moments(
    partial,  # as score leaves it
    mean, var,  # [groups] each
    kept,  # [2, groups]: the same again
    P, tiles, items,  # items: tiles of a group
    count: float,  # scores of a group
    PIXELS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Moments of a group of scores, a sample's or the batch's, from those of its tiles (Chan et al., 1983)."""
    group = tl.program_id(0).to(tl.int64)
    at = partial + group * items * 2
    sums = tl.zeros([ITEMS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS)
        size = tl.minimum(PIXELS, P - i % tiles * PIXELS)
        sums += tl.load(at + 2 * i, mask=i < items, other=0.0) * size
        first += ITEMS
    of_all = tl.sum(sums, axis=0) / count
    squares = tl.zeros([ITEMS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS)
        size = tl.minimum(PIXELS, P - i % tiles * PIXELS)
        away = tl.load(at + 2 * i, mask=i < items, other=0.0) - of_all
        own = tl.load(at + 2 * i + 1, mask=i < items, other=0.0)
        squares += tl.where(i < items, own + away * away * size, 0.0)
        first += ITEMS
    of_squares = tl.sum(squares, axis=0) / count
    tl.store(mean + group, of_all)
    tl.store(var + group, of_squares)
    tl.store(kept + group, of_all)
    tl.store(kept + tl.num_programs(0) + group, of_squares)


@jit
def spatial_gate(scores, mean, var, norm_weight, norm_bias, n, p, P, eps, GROUPED: tl.constexpr):
    """The gate of pixels p, and their normalised scores; each sample has moments of its own where GROUPED."""
    group = n if GROUPED else 0
    over = tl.rsqrt(tl.load(var + group).to(tl.float32) + eps)
    normalised = (tl.load(scores + n * P + p, mask=p < P, other=0.0) - tl.load(mean + group).to(tl.float32)) * over
    slope, bias = tl.load(norm_weight).to(tl.float32), tl.load(norm_bias).to(tl.float32)
    return tl.sigmoid(normalised * slope + bias), normalised


@jit
def apply(
    x, gate, scores, mean, var, norm_weight, norm_bias,
    y,  # as x
    P, pieces, eps: float,
    GROUPED: tl.constexpr,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    open_, _ = spatial_gate(scores, mean, var, norm_weight, norm_bias, n, p, P, eps, GROUPED)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = offsets(n, p, c, P, C, LAST)
        u = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        u *= tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
        tl.store(y + at, (u * open_[:, None]).to(y.dtype.element_ty), mask=inside)
