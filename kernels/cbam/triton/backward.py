"""CBAM's backward kernels in Triton; :mod:`.op` launches them in the order in which they stand here.

From g = dL/dy, with u = x gate and s' the normalised scores:

    flow[n, p]    = spatial (1 - spatial) sum over c of g u                       to s' times the norm's weight
    d s           = alpha flow + beta + gamma (s - mean)                          through the norm and the moments
    e_max, e_mean = correlations of d s with the two planes' weights;             e_max over the ties of the max
    d u           = g spatial + e_mean + e_max [u is the pixel's max]
    d gate        = sum over p of x d u, through the MLP to d average and d max
    d x           = gate d u + d average / P + d max / ties [x is the channel's max]

Tiles, programs and layouts are those of the forward kernels. x is read three times and g twice: by ``find_flow``, which
also sums x g spatial over the pixels, by ``gather`` (x alone), and by ``apply_back``.
"""

from __future__ import annotations

from raccgan.kernels.cbam.triton.forward import gated_tile, spatial_gate
from raccgan.kernels.triton_runtime import jit, pixels_of, tl


@jit
def find_flow(
    x, grad_y, gate, planes, scores, mean, var, norm_weight, norm_bias,
    flow,  # [N, P]
    ties,  # [N, P]: channels that reach the pixel's maximum
    through,  # [N, tiles, C]: sums of x g spatial over the tile
    partial,  # [N, tiles, 2]: sums of flow and of flow s'
    pixels, tiles, eps: float,
    GROUPED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    spatial, normalised = spatial_gate(scores, mean, var, norm_weight, norm_bias, sample, pixel, pixels, eps, GROUPED)
    largest = tl.load(planes + sample * 2 * pixels + pixel, mask=in_image, other=0.0)
    dot = tl.zeros([PIXEL_TILE], tl.float32)
    tied = tl.zeros([PIXEL_TILE], tl.float32)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, at, value, own = gated_tile(
            x, gate, sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE
        )
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        gated = value * own
        dot += tl.sum(grad * gated, axis=1)
        tied += tl.sum(tl.where(inside & (gated == largest[:, None]), 1.0, 0.0), axis=1)
        of_gate = tl.sum(grad * value * spatial[:, None], axis=0)
        tl.store(through + program * CHANNELS + channel, of_gate, mask=in_channels)
    to_normalised = dot * spatial * (1.0 - spatial)
    tl.store(flow + sample * pixels + pixel, to_normalised, mask=in_image)
    tl.store(ties + sample * pixels + pixel, tied, mask=in_image)
    tl.store(partial + program * 2, tl.sum(to_normalised, axis=0))
    tl.store(partial + program * 2 + 1, tl.sum(to_normalised * normalised, axis=0))


@jit
def join_norm(
    partial,  # as find_flow leaves it
    var, norm_weight,
    grad_mean, grad_var,  # [groups] each, or None
    coefficients,  # [groups, 3]: alpha, beta, gamma
    grad_norm,  # [groups, 4]: to the norm's weight and bias, and to moments that were given
    items,  # tiles of a group
    count: float,  # scores of a group
    eps: float,
    FIXED: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """The way back through the norm of a group of scores; moments that were given leave alpha alone."""
    group = tl.program_id(0).to(tl.int64)
    flows = tl.zeros([ITEMS], tl.float32)
    products = tl.zeros([ITEMS], tl.float32)
    first = 0
    while first < items:
        i = first + tl.arange(0, ITEMS)
        at = partial + (group * items + i) * 2
        flows += tl.load(at, mask=i < items, other=0.0)
        products += tl.load(at + 1, mask=i < items, other=0.0)
        first += ITEMS
    flow, product = tl.sum(flows, axis=0), tl.sum(products, axis=0)
    over = tl.rsqrt(tl.load(var + group).to(tl.float32) + eps)
    alpha = tl.load(norm_weight).to(tl.float32) * over
    beta, gamma = alpha * 0.0, alpha * 0.0
    if not FIXED:
        beta -= alpha * flow / count
        gamma -= alpha * over * product / count
        if grad_mean is not None:
            beta += tl.load(grad_mean + group) / count
        if grad_var is not None:
            gamma += 2 * tl.load(grad_var + group) / count
    tl.store(coefficients + group * 3, alpha)
    tl.store(coefficients + group * 3 + 1, beta)
    tl.store(coefficients + group * 3 + 2, gamma)
    tl.store(grad_norm + group * 4, product)
    tl.store(grad_norm + group * 4 + 1, flow)
    tl.store(grad_norm + group * 4 + 2, -alpha * flow)
    tl.store(grad_norm + group * 4 + 3, -alpha * over * product / 2)


@jit
def to_scores(flow, scores, mean, coefficients, group, at, inside):
    """d s at ``at``, and 0 outside."""
    alpha, beta = tl.load(coefficients + group * 3), tl.load(coefficients + group * 3 + 1)
    gamma, center = tl.load(coefficients + group * 3 + 2), tl.load(mean + group).to(tl.float32)
    own = tl.load(flow + at, mask=inside, other=0.0)
    away = tl.load(scores + at, mask=inside, other=0.0) - center
    return tl.where(inside, alpha * own + beta + gamma * away, 0.0)


@jit
def score_back(
    flow, scores, mean, coefficients, spatial_weight, ties,
    grad_planes,  # [N, 2, P]: e_max over its ties, and e_mean over C
    pixels, width, tiles,
    GROUPED: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, PIXEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    group = sample if GROUPED else sample * 0
    row, column = pixel // width, pixel % width
    e_max = tl.zeros([PIXEL_TILE], tl.float32)
    e_mean = tl.zeros([PIXEL_TILE], tl.float32)
    for i in range(KERNEL_SIZE):
        for j in tl.static_range(0, KERNEL_SIZE):
            y, x = row - i + KERNEL_SIZE // 2, column - j + KERNEL_SIZE // 2
            inside = in_image & (y >= 0) & (y * width < pixels) & (x >= 0) & (x < width)
            d = to_scores(flow, scores, mean, coefficients, group, sample * pixels + y * width + x, inside)
            tap = spatial_weight + i * KERNEL_SIZE + j
            e_max += tl.load(tap).to(tl.float32) * d
            e_mean += tl.load(tap + KERNEL_SIZE * KERNEL_SIZE).to(tl.float32) * d
    tied = tl.load(ties + sample * pixels + pixel, mask=in_image, other=1.0)
    tl.store(grad_planes + sample * 2 * pixels + pixel, e_max / tied, mask=in_image)
    tl.store(grad_planes + (sample * 2 + 1) * pixels + pixel, e_mean / CHANNELS, mask=in_image)


@jit
def spatial_back(
    flow, scores, planes, mean, coefficients,
    partial,  # [N, tiles, 2 K K]: the tile's part of the spatial weight's gradient
    pixels, width, tiles,
    GROUPED: tl.constexpr, KERNEL_SIZE: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program takes STEPS times STEP pixels of a sample through all taps, TAPS at least, a power of two."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // tiles
    group = sample if GROUPED else sample * 0
    plane_taps = KERNEL_SIZE * KERNEL_SIZE
    tap = tl.arange(0, TAPS)
    is_tap = tap < 2 * plane_taps
    plane, i, j = tap // plane_taps, tap % plane_taps // KERNEL_SIZE, tap % KERNEL_SIZE
    sums = tl.zeros([TAPS, STEP], tl.float32)
    for step in range(STEPS):
        pixel = (program % tiles * STEPS + step) * STEP + tl.arange(0, STEP)
        in_image = pixel < pixels
        d = to_scores(flow, scores, mean, coefficients, group, sample * pixels + pixel, in_image)
        y = (pixel // width)[None, :] + i[:, None] - KERNEL_SIZE // 2
        x = (pixel % width)[None, :] + j[:, None] - KERNEL_SIZE // 2
        inside = is_tap[:, None] & in_image[None, :] & (y >= 0) & (y * width < pixels) & (x >= 0) & (x < width)
        at = (sample * 2 + plane[:, None]) * pixels + y * width + x
        sums += tl.load(planes + at, mask=inside, other=0.0) * d[None, :]
    tl.store(partial + program * 2 * plane_taps + tap, tl.sum(sums, axis=1), mask=is_tap)


@jit
def gather(
    x, gate, planes, grad_planes, pooled,
    sums,  # [N, tiles, 2, C]: sums of x (e_mean + e_max [u is the max]), and pixels that reach the channel's maximum
    pixels, tiles,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    largest = tl.load(planes + sample * 2 * pixels + pixel, mask=in_image, other=0.0)
    e_max = tl.load(grad_planes + sample * 2 * pixels + pixel, mask=in_image, other=0.0)
    e_mean = tl.load(grad_planes + (sample * 2 + 1) * pixels + pixel, mask=in_image, other=0.0)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, _, value, own = gated_tile(
            x, gate, sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE
        )
        gated = value * own
        maximum = tl.load(pooled + sample * 2 * CHANNELS + CHANNELS + channel, mask=in_channels, other=0.0)
        e = e_mean[:, None] + tl.where(gated == largest[:, None], e_max[:, None], 0.0)
        tied = tl.where(inside & (value == maximum[None, :]), 1.0, 0.0)
        tl.store(sums + program * 2 * CHANNELS + channel, tl.sum(value * e, axis=0), mask=in_channels)
        tl.store(sums + program * 2 * CHANNELS + CHANNELS + channel, tl.sum(tied, axis=0), mask=in_channels)


@jit
def gate_back(
    through, sums,  # as find_flow and gather leave them
    gate, hidden, reduce_weight, expand_weight,
    grad_logits,  # [N, C]: to the argument of the gate's sigmoid
    grad_hidden,  # [N, 2, R]: to the MLP's first layer before its ReLU, from average and from maximum
    grad_pooled,  # [N, 2, C]: to average and maximum
    tied,  # [N, C]: pixels that reach the channel's maximum
    tiles,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, HIDDEN_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    """The way back through the channel gate of a sample."""
    sample = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, HIDDEN_TILE)
    in_hidden = unit < HIDDEN
    to_hidden = tl.zeros([HIDDEN_TILE], tl.float32)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel = first + tl.arange(0, CHANNEL_TILE)
        in_channels = channel < CHANNELS
        to_gate = tl.zeros([CHANNEL_TILE], tl.float32)
        count = tl.zeros([CHANNEL_TILE], tl.float32)
        tile = 0
        while tile < tiles:
            at = sample * tiles + tile
            to_gate += tl.load(through + at * CHANNELS + channel, mask=in_channels, other=0.0)
            to_gate += tl.load(sums + at * 2 * CHANNELS + channel, mask=in_channels, other=0.0)
            count += tl.load(sums + at * 2 * CHANNELS + CHANNELS + channel, mask=in_channels, other=0.0)
            tile += 1
        own = tl.load(gate + sample * CHANNELS + channel, mask=in_channels, other=0.0)
        to_logits = to_gate * own * (1.0 - own)
        tl.store(grad_logits + sample * CHANNELS + channel, to_logits, mask=in_channels)
        tl.store(tied + sample * CHANNELS + channel, count, mask=in_channels)
        inside = in_hidden[:, None] & in_channels[None, :]
        at = expand_weight + channel[None, :] * HIDDEN + unit[:, None]
        weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        to_hidden += tl.sum(weight * to_logits[None, :], axis=1)
    of_average = tl.load(hidden + sample * 2 * HIDDEN + unit, mask=in_hidden, other=0.0)
    of_maximum = tl.load(hidden + sample * 2 * HIDDEN + HIDDEN + unit, mask=in_hidden, other=0.0)
    to_average = tl.where(of_average > 0, to_hidden, 0.0)
    to_maximum = tl.where(of_maximum > 0, to_hidden, 0.0)
    tl.store(grad_hidden + sample * 2 * HIDDEN + unit, to_average, mask=in_hidden)
    tl.store(grad_hidden + sample * 2 * HIDDEN + HIDDEN + unit, to_maximum, mask=in_hidden)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel = first + tl.arange(0, CHANNEL_TILE)
        in_channels = channel < CHANNELS
        inside = in_channels[:, None] & in_hidden[None, :]
        at = reduce_weight + unit[None, :] * CHANNELS + channel[:, None]
        weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = grad_pooled + sample * 2 * CHANNELS + channel
        tl.store(at, tl.sum(weight * to_average[None, :], axis=1), mask=in_channels)
        tl.store(at + CHANNELS, tl.sum(weight * to_maximum[None, :], axis=1), mask=in_channels)


@jit
def apply_back(
    x, grad_y, gate, planes, scores, mean, var, norm_weight, norm_bias, grad_planes, pooled, grad_pooled, tied,
    grad_x,  # as x
    pixels, tiles, pixel_count: float, eps: float,
    GROUPED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, pixel, in_image = pixels_of(program, tiles, pixels, PIXEL_TILE)
    spatial, _normalised = spatial_gate(scores, mean, var, norm_weight, norm_bias, sample, pixel, pixels, eps, GROUPED)
    largest = tl.load(planes + sample * 2 * pixels + pixel, mask=in_image, other=0.0)
    e_max = tl.load(grad_planes + sample * 2 * pixels + pixel, mask=in_image, other=0.0)
    e_mean = tl.load(grad_planes + (sample * 2 + 1) * pixels + pixel, mask=in_image, other=0.0)
    for first in range(0, CHANNELS, CHANNEL_TILE):
        channel, in_channels, inside, at, value, own = gated_tile(
            x, gate, sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE
        )
        grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        to_gated = grad * spatial[:, None] + e_mean[:, None]
        to_gated += tl.where(value * own == largest[:, None], e_max[:, None], 0.0)
        to_x = own * to_gated
        of_sample = sample * 2 * CHANNELS + channel
        to_x += (tl.load(grad_pooled + of_sample, mask=in_channels, other=0.0) / pixel_count)[None, :]
        share = tl.load(grad_pooled + of_sample + CHANNELS, mask=in_channels, other=0.0)
        share = share / tl.load(tied + sample * CHANNELS + channel, mask=in_channels, other=1.0)
        maximum = tl.load(pooled + of_sample + CHANNELS, mask=in_channels, other=0.0)
        to_x += tl.where(value == maximum[None, :], share[None, :], 0.0)
        tl.store(grad_x + at, to_x.to(grad_x.dtype.element_ty), mask=inside)
