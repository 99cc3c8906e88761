"""CBAM's forward kernels in Triton; :mod:`.op` launches them in the order in which they stand here.

A program of a sweep over x takes one tile, some pixels of one sample, and goes through all its channels. x is
[N, C, P], or [N, P, C] where CHANNELS_LAST, P = H * W pixels. All other results are float32. Three sweeps:

    pool          average and maximum of each channel      then the gate, from the sums of a sample's tiles
    find_planes   maximum and mean of each pixel, gated    then the scores, a k x k convolution, and their moments
    apply         y = x * gate * sigmoid(normalised scores)

``find_planes`` takes the tiles in reverse order: what ``pool`` read last is still in the cache, and is read first.
``apply`` turns once more.
"""

from __future__ import annotations

from raccgan.kernels.triton_runtime import jit, pixels_of, tile_of, tl


@jit
def gated_tile(
    x, gate, sample, pixel, first, pixels,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    """:func:`tile_of`, the tile's values, and the gate of its channels."""
    channel, in_channels, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(gate + sample * CHANNELS + channel, mask=in_channels, other=0.0)[None, :]
    return channel, in_channels, inside, at, value, own


@jit
def pool(
    x,
    sums,  # [N, tiles, 2, C]: sum and maximum over the tile
    pixels, tiles,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, _ = pixels_of(program, tiles, pixels, PIXEL_TILE)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + program * 2 * CHANNELS + channel, tl.sum(value, axis=0), mask=in_channels)
        largest = tl.max(tl.where(inside, value, -float("inf")), axis=0)
        tl.store(sums + program * 2 * CHANNELS + CHANNELS + channel, largest, mask=in_channels)


@jit
def find_gate(
    sums,  # as pool leaves it
    reduce_weight, reduce_bias, expand_weight, expand_bias,
    gate,  # [N, C]
    pooled,  # [N, 2, C]: average and maximum
    hidden,  # [N, 2, R]: the MLP's first layer of both, after its ReLU
    tiles, pixel_count: float,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    """The channel gate of a sample; HIDDEN_TILE is a power of two not below HIDDEN."""
    sample = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, HIDDEN_TILE)
    in_hidden = unit < HIDDEN
    of_average = tl.zeros([HIDDEN_TILE], tl.float32)
    of_maximum = tl.zeros([HIDDEN_TILE], tl.float32)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel = first + tl.arange(0, CHANNEL_TILE)
        in_channels = channel < CHANNELS
        total = tl.zeros([CHANNEL_TILE], tl.float32)
        largest = tl.full([CHANNEL_TILE], -float("inf"), tl.float32)
        tile = 0
        while tile < tiles:
            at = (sample * tiles + tile) * 2 * CHANNELS + channel
            total += tl.load(sums + at, mask=in_channels, other=0.0)
            largest = tl.maximum(largest, tl.load(sums + at + CHANNELS, mask=in_channels, other=0.0))
            tile += 1
        mean, largest = total / pixel_count, tl.where(in_channels, largest, 0.0)
        tl.store(pooled + sample * 2 * CHANNELS + channel, mean, mask=in_channels)
        tl.store(pooled + sample * 2 * CHANNELS + CHANNELS + channel, largest, mask=in_channels)
        inside = in_hidden[:, None] & in_channels[None, :]
        of_weight = reduce_weight + unit[:, None] * CHANNELS + channel[None, :]
        weight = tl.load(of_weight, mask=inside, other=0.0).to(tl.float32)
        of_average += tl.sum(weight * mean[None, :], axis=1)
        of_maximum += tl.sum(weight * largest[None, :], axis=1)
    bias = tl.load(reduce_bias + unit, mask=in_hidden, other=0.0).to(tl.float32)
    of_average = tl.maximum(of_average + bias, 0.0)
    of_maximum = tl.maximum(of_maximum + bias, 0.0)
    tl.store(hidden + sample * 2 * HIDDEN + unit, of_average, mask=in_hidden)
    tl.store(hidden + sample * 2 * HIDDEN + HIDDEN + unit, of_maximum, mask=in_hidden)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel = first + tl.arange(0, CHANNEL_TILE)
        in_channels = channel < CHANNELS
        inside = in_channels[:, None] & in_hidden[None, :]
        at = expand_weight + channel[:, None] * HIDDEN + unit[None, :]
        weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        logits = tl.sum(weight * (of_average + of_maximum)[None, :], axis=1)
        logits += 2 * tl.load(expand_bias + channel, mask=in_channels, other=0.0).to(tl.float32)
        tl.store(gate + sample * CHANNELS + channel, tl.sigmoid(logits), mask=in_channels)


@jit
def find_planes(
    x, gate,
    planes,  # [N, 2, P]: maximum and mean over the channels of x * gate
    pixels, tiles,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    largest = tl.full([PIXEL_TILE], -float("inf"), tl.float32)
    total = tl.zeros([PIXEL_TILE], tl.float32)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        _, _, inside, _, value, own = gated_tile(
            x, gate, sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE
        )
        gated = value * own
        largest = tl.maximum(largest, tl.max(tl.where(inside, gated, -float("inf")), axis=1))
        total += tl.sum(gated, axis=1)
    tl.store(planes + sample * 2 * pixels + pixel, largest, mask=in_image)
    tl.store(planes + (sample * 2 + 1) * pixels + pixel, total / CHANNELS, mask=in_image)


@jit
def find_scores(
    planes, spatial_weight,
    scores,  # [N, P]
    partial,  # [N, tiles, 2]: mean and squared deviations from it over the tile, or None
    pixels, width, tiles,
    KERNEL_SIZE: tl.constexpr, PIXEL_TILE: tl.constexpr,
):  # fmt: skip
    """The convolution of the two planes, with zeros around the image; a program takes a tile of a sample."""
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    row, column = pixel // width, pixel % width
    value = tl.zeros([PIXEL_TILE], tl.float32)
    for i in range(KERNEL_SIZE):
        for j in tl.static_range(0, KERNEL_SIZE):
            y, x = row + i - KERNEL_SIZE // 2, column + j - KERNEL_SIZE // 2
            inside = in_image & (y >= 0) & (y * width < pixels) & (x >= 0) & (x < width)
            of_maximum = planes + sample * 2 * pixels + y * width + x
            of_mean = of_maximum + pixels
            tap = spatial_weight + i * KERNEL_SIZE + j
            value += tl.load(tap).to(tl.float32) * tl.load(of_maximum, mask=inside, other=0.0)
            tap += KERNEL_SIZE * KERNEL_SIZE
            value += tl.load(tap).to(tl.float32) * tl.load(of_mean, mask=inside, other=0.0)
    tl.store(scores + sample * pixels + pixel, value, mask=in_image)
    if partial is not None:
        count = tl.minimum(PIXEL_TILE, pixels - program % tiles * PIXEL_TILE)
        mean = tl.sum(tl.where(in_image, value, 0.0), axis=0) / count
        deviation = tl.where(in_image, value - mean, 0.0)
        tl.store(partial + program * 2, mean)
        tl.store(partial + program * 2 + 1, tl.sum(deviation * deviation, axis=0))


@jit
def spatial_gate(scores, mean, var, norm_weight, norm_bias, sample, pixel, pixels, eps, GROUPED: tl.constexpr):
    """The gate of some pixels, and their normalised scores; each sample has moments of its own where GROUPED."""
    group = sample if GROUPED else 0
    over = tl.rsqrt(tl.load(var + group).to(tl.float32) + eps)
    score = tl.load(scores + sample * pixels + pixel, mask=pixel < pixels, other=0.0)
    normalised = (score - tl.load(mean + group).to(tl.float32)) * over
    slope, bias = tl.load(norm_weight).to(tl.float32), tl.load(norm_bias).to(tl.float32)
    return tl.sigmoid(normalised * slope + bias), normalised


@jit
def apply(
    x, gate, scores, mean, var, norm_weight, norm_bias,
    y,  # as x
    pixels, tiles, eps: float,
    GROUPED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, _in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    spatial, _normalised = spatial_gate(scores, mean, var, norm_weight, norm_bias, sample, pixel, pixels, eps, GROUPED)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        _, _, inside, at, value, own = gated_tile(
            x, gate, sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE
        )
        tl.store(y + at, (value * own * spatial[:, None]).to(y.dtype.element_ty), mask=inside)
