"""The Triton kernels of the depthwise-separable op that compute each pixel on its own, and their sums.

:mod:`ops` says what they compute, and :mod:`kernels` has the rules for all kernels of the op.
"""

# Triton gives a kernel's arguments their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from raccgan.kernels.depthwise_separable.triton.kernels import _affine, _center, _from_center, _open, _relu
from raccgan.kernels.triton_runtime import jit, tl


@jit
def _pixels(program, pixels, channels, TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr):
    """The tile of a program of an elementwise kernel: sample, piece, pixels and channels."""
    blocks = tl.cdiv(channels, TILE_CHANNELS)
    pieces = tl.cdiv(pixels, TILE_PIXELS)
    piece = program // blocks % pieces
    p = piece * TILE_PIXELS + tl.arange(0, TILE_PIXELS)
    return program // (blocks * pieces), piece, p, program % blocks * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)


@jit
def _at(n, p, c, stride_n, stride_c, stride_p):
    return n.to(tl.int64) * stride_n + (p.to(tl.int64) * stride_p)[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@jit
def vjp_kernel(
    grad, other, factor, x, scale, shift, center, out, partial, pixels, channels, grad_stride_n, grad_stride_c,
    grad_stride_p, other_stride_n, other_stride_c, other_stride_p, x_stride_n, x_stride_c, x_stride_p,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr,
    RELU: tl.constexpr, CENTERED: tl.constexpr, FACTOR: tl.constexpr, IMAGE: tl.constexpr, SUMS: tl.constexpr,
    OTHER_CENTERED: tl.constexpr,
):  # fmt: skip
    """out = m m0 grad factor, channels_last, where IMAGE; where SUMS, over the pixels of a tile the sums of
    m grad (m0 other - center) and of m grad.

    m0 and m are where the prologue of x lets gradients through. partial [2, N, pieces, C] float32; factor [N, C].
    """
    n, piece, p, c = _pixels(tl.program_id(0), pixels, channels, TILE_PIXELS, TILE_CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    factors, _ = _affine(factor, factor, n, c, channels, FACTOR)
    of_scale, of_shift = _affine(scale, shift, n, c, channels, AFFINE)
    centers = _center(center, n, c, channels, CENTERED)
    first, second = inside, inside
    if PRE_RELU or RELU:
        value = tl.load(x + _at(n, p, c, x_stride_n, x_stride_c, x_stride_p), mask=inside, other=0.0).to(tl.float32)
        first, second = _open(value, inside, of_scale, of_shift, centers, PRE_RELU, AFFINE, RELU)
    upper = tl.load(grad + _at(n, p, c, grad_stride_n, grad_stride_c, grad_stride_p), mask=inside, other=0.0)
    upper = tl.where(second, upper.to(tl.float32), 0.0)
    if IMAGE:
        lower = tl.where(first, upper, 0.0)
        pixel = n.to(tl.int64) * pixels + p
        tl.store(out + pixel[:, None] * channels + c[None, :], (lower * factors).to(out.dtype.element_ty), mask=inside)
    if SUMS:
        measured = tl.load(other + _at(n, p, c, other_stride_n, other_stride_c, other_stride_p), mask=inside, other=0.0)
        measured = _from_center(measured.to(tl.float32), first, centers, OTHER_CENTERED)
        pieces = tl.cdiv(pixels, TILE_PIXELS)
        at = (n.to(tl.int64) * pieces + piece) * channels + c
        tl.store(partial + at, tl.sum(upper * measured, axis=0), mask=c < channels)
        samples = tl.num_programs(0) // (pieces * tl.cdiv(channels, TILE_CHANNELS))
        tl.store(partial + samples.to(tl.int64) * pieces * channels + at, tl.sum(upper, axis=0), mask=c < channels)


@jit
def jvp_kernel(
    image, factor, added, other, other_factor, x, scale, shift, center, out, pixels, channels, image_stride_n,
    image_stride_c, image_stride_p, other_stride_n, other_stride_c, other_stride_p, x_stride_n, x_stride_c, x_stride_p,
    TILE_PIXELS: tl.constexpr, TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr, AFFINE: tl.constexpr,
    RELU: tl.constexpr, CENTERED: tl.constexpr, IMAGE: tl.constexpr, FACTOR: tl.constexpr, OTHER: tl.constexpr,
    OTHER_FACTOR: tl.constexpr, OTHER_CENTERED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """out = m (m0 image factor + (m0 other - center) other_factor + added), without what has its flag off."""
    n, _, p, c = _pixels(tl.program_id(0), pixels, channels, TILE_PIXELS, TILE_CHANNELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    of_scale, of_shift = _affine(scale, shift, n, c, channels, AFFINE)
    centers = _center(center, n, c, channels, CENTERED)
    first, second = inside, inside
    if PRE_RELU or RELU:
        value = tl.load(x + _at(n, p, c, x_stride_n, x_stride_c, x_stride_p), mask=inside, other=0.0).to(tl.float32)
        first, second = _open(value, inside, of_scale, of_shift, centers, PRE_RELU, AFFINE, RELU)
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    if IMAGE:
        factors, _ = _affine(factor, factor, n, c, channels, FACTOR)
        total = tl.load(image + _at(n, p, c, image_stride_n, image_stride_c, image_stride_p), mask=inside, other=0.0)
        total = tl.where(first, total.to(tl.float32) * factors, 0.0)
    if OTHER:
        factors, _ = _affine(other_factor, other_factor, n, c, channels, OTHER_FACTOR)
        more = tl.load(other + _at(n, p, c, other_stride_n, other_stride_c, other_stride_p), mask=inside, other=0.0)
        total += _from_center(more.to(tl.float32), first, centers, OTHER_CENTERED) * factors
    addends, _ = _affine(added, added, n, c, channels, ADDED)
    if ADDED:
        total += addends
    total = tl.where(second, total, 0.0)
    pixel = n.to(tl.int64) * pixels + p
    tl.store(out + pixel[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=inside)


@jit
def moments_kernel(
    x, mean, deviation, pixels, channels, stride_n, stride_c, stride_p, PIECE: tl.constexpr, TILE_PIXELS: tl.constexpr,
    TILE_CHANNELS: tl.constexpr, PRE_RELU: tl.constexpr,
):  # fmt: skip
    """Of each piece of PIECE pixels: mean and sum of squared deviations from it, [N, pieces, C] float32.

    Two sweeps, of which the second finds the piece in the cache: no cancellation, however far from zero x is.
    """
    n, piece, _, c = _pixels(tl.program_id(0), pixels, channels, PIECE, TILE_CHANNELS)
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    for i in range(PIECE // TILE_PIXELS):
        begin = piece * PIECE + i * TILE_PIXELS
        value, inside = _piece(x, n, begin, c, pixels, channels, stride_n, stride_c, stride_p, TILE_PIXELS, PRE_RELU)
        total += value
    count = tl.minimum(pixels - piece * PIECE, PIECE).to(tl.float32)
    center = tl.sum(total, axis=0) / count
    total = tl.zeros([TILE_PIXELS, TILE_CHANNELS], tl.float32)
    for i in range(PIECE // TILE_PIXELS):
        begin = piece * PIECE + i * TILE_PIXELS
        value, inside = _piece(x, n, begin, c, pixels, channels, stride_n, stride_c, stride_p, TILE_PIXELS, PRE_RELU)
        value = tl.where(inside, value - center[None, :], 0.0)
        total += value * value
    at = (n.to(tl.int64) * tl.cdiv(pixels, PIECE) + piece) * channels + c
    tl.store(mean + at, center, mask=c < channels)
    tl.store(deviation + at, tl.sum(total, axis=0), mask=c < channels)


@jit
def _piece(
    x, n, begin, c, pixels, channels, stride_n, stride_c, stride_p, TILE_PIXELS: tl.constexpr, PRE_RELU: tl.constexpr,
):  # fmt: skip
    p = begin + tl.arange(0, TILE_PIXELS)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(x + _at(n, p, c, stride_n, stride_c, stride_p), mask=inside, other=0.0).to(tl.float32)
    if PRE_RELU:
        value = _relu(value)
    return value, inside


@jit
def merge_moments_kernel(
    mean, deviation, merged_mean, var, pieces, pixels, channels, PIECE: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance [N, C] of the pieces together (Chan et al., 1979), in their order."""
    blocks = tl.cdiv(channels, TILE_CHANNELS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    center = tl.zeros([TILE_CHANNELS], tl.float32)
    total = tl.zeros([TILE_CHANNELS], tl.float32)
    piece = 0
    while piece < pieces:
        at = (n * pieces + piece) * channels + c
        before = tl.minimum(piece * PIECE, pixels).to(tl.float32)
        count = tl.minimum(pixels - piece * PIECE, PIECE).to(tl.float32)
        apart = tl.load(mean + at, mask=c < channels, other=0.0) - center
        center += apart * (count / (before + count))
        total += tl.load(deviation + at, mask=c < channels, other=0.0)
        total += apart * apart * (before * count / (before + count))
        piece += 1
    tl.store(merged_mean + n * channels + c, center, mask=c < channels)
    tl.store(var + n * channels + c, total / pixels, mask=c < channels)
