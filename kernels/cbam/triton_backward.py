"""CBAM's backward kernels in Triton; :mod:`raccgan.kernels.cbam.triton` launches them in the order they stand here.

From g = dL/dy, with u = x gate and s' the normalised scores:

    flow[n, p]    = spatial (1 - spatial) sum over c of g u                       to s' times the norm's weight
    d s           = alpha flow + beta + gamma (s - mean)                          through the norm and the moments
    e_max, e_mean = correlations of d s with the two planes' weights;             e_max over the ties of the max
    d u           = g spatial + e_mean + e_max [u is the pixel's max]
    d gate        = sum over p of x d u, through the MLP to d average and d max
    d x           = gate d u + d average / P + d max / ties [x is the channel's max]

Pieces, programs and layouts are those of the forward kernels. x is read three times and g twice: by ``flow_of``, which
also sums x g spatial over the pixels, by ``gather`` (x alone), and by ``apply_back``.
"""

from __future__ import annotations

from raccgan.kernels.cbam.triton_forward import offsets, spatial_gate
from raccgan.kernels.triton_runtime import jit, tl


@jit
def flow_of(
    x, g_y, gate, planes, scores, mean, var, norm_weight, norm_bias,
    flow,  # [N, P]
    ties,  # [N, P]: channels that reach the pixel's maximum
    through,  # [N, pieces, C]: sums of x g spatial over the piece
    partial,  # [N, pieces, 2]: sums of flow and of flow s'
    P, pieces, eps: float,
    GROUPED: tl.constexpr,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    open_, normalised = spatial_gate(scores, mean, var, norm_weight, norm_bias, n, p, P, eps, GROUPED)
    largest = tl.load(planes + n * 2 * P + p, mask=p < P, other=0.0)
    dot = tl.zeros([PIXELS], tl.float32)
    tied = tl.zeros([PIXELS], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = offsets(n, p, c, P, C, LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_y + at, mask=inside, other=0.0).to(tl.float32)
        u = v * tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
        dot += tl.sum(g * u, axis=1)
        tied += tl.sum(tl.where(inside & (u == largest[:, None]), 1.0, 0.0), axis=1)
        tl.store(through + program * C + c, tl.sum(g * v * open_[:, None], axis=0), mask=c < C)
    own = dot * open_ * (1.0 - open_)
    tl.store(flow + n * P + p, own, mask=p < P)
    tl.store(ties + n * P + p, tied, mask=p < P)
    tl.store(partial + program * 2, tl.sum(own, axis=0))
    tl.store(partial + program * 2 + 1, tl.sum(own * normalised, axis=0))


@jit
def join_norm(
    partial,  # as flow_of leaves it
    var, norm_weight,
    g_mean, g_var,  # [groups] each, or None
    coefficients,  # [groups, 3]: alpha, beta, gamma
    g_norm,  # [groups, 4]: to the norm's weight and bias, and to moments that were given
    items,  # pieces of a group
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
        if g_mean is not None:
            beta += tl.load(g_mean + group) / count
        if g_var is not None:
            gamma += 2 * tl.load(g_var + group) / count
    tl.store(coefficients + group * 3, alpha)
    tl.store(coefficients + group * 3 + 1, beta)
    tl.store(coefficients + group * 3 + 2, gamma)
    tl.store(g_norm + group * 4, product)
    tl.store(g_norm + group * 4 + 1, flow)
    tl.store(g_norm + group * 4 + 2, -alpha * flow)
    tl.store(g_norm + group * 4 + 3, -alpha * over * product / 2)


@jit
def to_scores(flow, scores, mean, coefficients, group, at, inside):
    """d s at ``at``, and 0 outside."""
    alpha, beta = tl.load(coefficients + group * 3), tl.load(coefficients + group * 3 + 1)
    gamma, middle = tl.load(coefficients + group * 3 + 2), tl.load(mean + group).to(tl.float32)
    own = tl.load(flow + at, mask=inside, other=0.0)
    away = tl.load(scores + at, mask=inside, other=0.0) - middle
    return tl.where(inside, alpha * own + beta + gamma * away, 0.0)


@jit
def score_back(
    flow, scores, mean, coefficients, spatial_weight, ties,
    g_planes,  # [N, 2, P]: e_max over its ties, and e_mean over C
    P, W, tiles,
    GROUPED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // tiles, program % tiles * PIXELS + tl.arange(0, PIXELS)
    group = n if GROUPED else n * 0
    row, column = p // W, p % W
    e_max = tl.zeros([PIXELS], tl.float32)
    e_mean = tl.zeros([PIXELS], tl.float32)
    for i in range(K):
        for j in tl.static_range(0, K):
            y, x = row - i + K // 2, column - j + K // 2
            inside = (p < P) & (y >= 0) & (y * W < P) & (x >= 0) & (x < W)
            d = to_scores(flow, scores, mean, coefficients, group, n * P + y * W + x, inside)
            tap = spatial_weight + i * K + j
            e_max += tl.load(tap).to(tl.float32) * d
            e_mean += tl.load(tap + K * K).to(tl.float32) * d
    tied = tl.load(ties + n * P + p, mask=p < P, other=1.0)
    tl.store(g_planes + n * 2 * P + p, e_max / tied, mask=p < P)
    tl.store(g_planes + (n * 2 + 1) * P + p, e_mean / C, mask=p < P)


@jit
def spatial_back(
    flow, scores, planes, mean, coefficients,
    partial,  # [N, tiles, 2 K K]: the tile's part of the spatial weight's gradient
    P, W, tiles,
    GROUPED: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A program takes STEPS times STEP pixels of a sample through all taps; TAPS is a power of two not below 2 K K."""
    program = tl.program_id(0).to(tl.int64)
    n = program // tiles
    group = n if GROUPED else n * 0
    tap = tl.arange(0, TAPS)
    plane, i, j = tap // (K * K), tap % (K * K) // K, tap % K
    sums = tl.zeros([TAPS, STEP], tl.float32)
    for step in range(STEPS):
        p = (program % tiles * STEPS + step) * STEP + tl.arange(0, STEP)
        d = to_scores(flow, scores, mean, coefficients, group, n * P + p, p < P)
        y = (p // W)[None, :] + i[:, None] - K // 2
        x = (p % W)[None, :] + j[:, None] - K // 2
        inside = (tap < 2 * K * K)[:, None] & (p < P)[None, :] & (y >= 0) & (y * W < P) & (x >= 0) & (x < W)
        at = (n * 2 + plane[:, None]) * P + y * W + x
        sums += tl.load(planes + at, mask=inside, other=0.0) * d[None, :]
    tl.store(partial + program * 2 * K * K + tap, tl.sum(sums, axis=1), mask=tap < 2 * K * K)


@jit
def gather(
    x, gate, planes, g_planes, pooled,
    sums,  # [N, pieces, 2, C]: sums of x (e_mean + e_max [u is the max]), and pixels that reach the channel's maximum
    P, pieces,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    largest = tl.load(planes + n * 2 * P + p, mask=p < P, other=0.0)
    e_max = tl.load(g_planes + n * 2 * P + p, mask=p < P, other=0.0)
    e_mean = tl.load(g_planes + (n * 2 + 1) * P + p, mask=p < P, other=0.0)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        v = tl.load(x + offsets(n, p, c, P, C, LAST), mask=inside, other=0.0).to(tl.float32)
        u = v * tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
        maximum = tl.load(pooled + n * 2 * C + C + c, mask=c < C, other=0.0)
        e = e_mean[:, None] + tl.where(u == largest[:, None], e_max[:, None], 0.0)
        tied = tl.where(inside & (v == maximum[None, :]), 1.0, 0.0)
        tl.store(sums + program * 2 * C + c, tl.sum(v * e, axis=0), mask=c < C)
        tl.store(sums + program * 2 * C + C + c, tl.sum(tied, axis=0), mask=c < C)


@jit
def gate_back(
    through, sums,  # as flow_of and gather leave them
    gate, hidden, reduce_weight, expand_weight,
    g_logits,  # [N, C]: to the argument of the gate's sigmoid
    g_hidden,  # [N, 2, R]: to the MLP's first layer before its ReLU, from average and from maximum
    g_pooled,  # [N, 2, C]: to average and maximum
    tied,  # [N, C]: pixels that reach the channel's maximum
    pieces,
    C: tl.constexpr, R: tl.constexpr, REDUCED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The way back through the channel gate of a sample."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, REDUCED)
    to_hidden = tl.zeros([REDUCED], tl.float32)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        to_gate = tl.zeros([CHANNELS], tl.float32)
        count = tl.zeros([CHANNELS], tl.float32)
        piece = 0
        while piece < pieces:
            at = n * pieces + piece
            to_gate += tl.load(through + at * C + c, mask=c < C, other=0.0)
            to_gate += tl.load(sums + at * 2 * C + c, mask=c < C, other=0.0)
            count += tl.load(sums + at * 2 * C + C + c, mask=c < C, other=0.0)
            piece += 1
        own = tl.load(gate + n * C + c, mask=c < C, other=0.0)
        to_logits = to_gate * own * (1.0 - own)
        tl.store(g_logits + n * C + c, to_logits, mask=c < C)
        tl.store(tied + n * C + c, count, mask=c < C)
        inside = (r < R)[:, None] & (c < C)[None, :]
        weight = tl.load(expand_weight + c[None, :] * R + r[:, None], mask=inside, other=0.0).to(tl.float32)
        to_hidden += tl.sum(weight * to_logits[None, :], axis=1)
    of_average = tl.load(hidden + n * 2 * R + r, mask=r < R, other=0.0)
    of_maximum = tl.load(hidden + n * 2 * R + R + r, mask=r < R, other=0.0)
    to_average = tl.where(of_average > 0, to_hidden, 0.0)
    to_maximum = tl.where(of_maximum > 0, to_hidden, 0.0)
    tl.store(g_hidden + n * 2 * R + r, to_average, mask=r < R)
    tl.store(g_hidden + n * 2 * R + R + r, to_maximum, mask=r < R)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (c < C)[:, None] & (r < R)[None, :]
        weight = tl.load(reduce_weight + r[None, :] * C + c[:, None], mask=inside, other=0.0).to(tl.float32)
        tl.store(g_pooled + n * 2 * C + c, tl.sum(weight * to_average[None, :], axis=1), mask=c < C)
        tl.store(g_pooled + n * 2 * C + C + c, tl.sum(weight * to_maximum[None, :], axis=1), mask=c < C)


@jit
def apply_back(
    x, g_y, gate, planes, scores, mean, var, norm_weight, norm_bias, g_planes, pooled, g_pooled, tied,
    g_x,  # as x
    P, pieces, pixels: float, eps: float,
    GROUPED: tl.constexpr,
    AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr,  # whether they are x's own, and not given
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n, p = program // pieces, program % pieces * PIXELS + tl.arange(0, PIXELS)
    open_, _ = spatial_gate(scores, mean, var, norm_weight, norm_bias, n, p, P, eps, GROUPED)
    largest = tl.load(planes + n * 2 * P + p, mask=p < P, other=0.0)
    e_max = tl.load(g_planes + n * 2 * P + p, mask=p < P, other=0.0)
    e_mean = tl.load(g_planes + (n * 2 + 1) * P + p, mask=p < P, other=0.0)
    for first in range(0, C, CHANNELS):
        c = first + tl.arange(0, CHANNELS)
        inside = (p < P)[:, None] & (c < C)[None, :]
        at = offsets(n, p, c, P, C, LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_y + at, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(gate + n * C + c, mask=c < C, other=0.0)[None, :]
        to_u = g * open_[:, None] + e_mean[:, None]
        to_u += tl.where(v * own == largest[:, None], e_max[:, None], 0.0)
        to_x = own * to_u
        if AVERAGE:
            to_x += (tl.load(g_pooled + n * 2 * C + c, mask=c < C, other=0.0) / pixels)[None, :]
        if MAXIMUM:
            share = tl.load(g_pooled + n * 2 * C + C + c, mask=c < C, other=0.0)
            share = share / tl.load(tied + n * C + c, mask=c < C, other=1.0)
            maximum = tl.load(pooled + n * 2 * C + C + c, mask=c < C, other=0.0)
            to_x += tl.where(v == maximum[None, :], share[None, :], 0.0)
        tl.store(g_x + at, to_x.to(g_x.dtype.element_ty), mask=inside)
