"""The Triton kernels of the depthwise-separable family that work on each pixel alone, and their sums.

What they compute is in :mod:`triton_ops`; the rules for all kernels of the family are in :mod:`triton_kernels`.
"""

# Triton gives a kernel's arguments their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from raccgan.kernels.depthwise_separable.triton_kernels import _affine, _centre, _measured, _passes, _rectified
from raccgan.kernels.triton_runtime import jit, tl


@jit
def _pixels(pid, pixels, C, BP: tl.constexpr, BC: tl.constexpr):
    """The block of program ``pid`` of an elementwise kernel: sample, piece, pixels [BP], channels [BC]."""
    blocks = tl.cdiv(C, BC)
    pieces = tl.cdiv(pixels, BP)
    piece = pid // blocks % pieces
    return pid // (blocks * pieces), piece, piece * BP + tl.arange(0, BP), pid % blocks * BC + tl.arange(0, BC)


@jit
def _at(n, p, c, stride_n, stride_c, stride_p):
    return n.to(tl.int64) * stride_n + (p.to(tl.int64) * stride_p)[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@jit
def cotangent_kernel(
    g, a, s, x, scale, shift, centre, out, partial, pixels, C,
    g_stride_n, g_stride_c, g_stride_p, a_stride_n, a_stride_c, a_stride_p, x_stride_n, x_stride_c, x_stride_p,
    BP: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    CENTRED: tl.constexpr, FACTOR: tl.constexpr, IMAGE: tl.constexpr, SUMS: tl.constexpr, A_CENTRED: tl.constexpr,
):  # fmt: skip
    """out = m m0 g s, channels_last, where IMAGE; the sums of m g (m0 a - centre) and of m g over BP pixels where SUMS.

    m0 and m are where x's prologue lets gradients through. partial [2, N, pieces, C] float32; s [N, C] where FACTOR.
    """
    n, piece, p, c = _pixels(tl.program_id(0), pixels, C, BP, BC)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    factor, _ = _affine(s, s, n, c, C, FACTOR)
    of_scale, of_shift = _affine(scale, shift, n, c, C, AFFINE)
    middle = _centre(centre, n, c, C, CENTRED)
    first, second = inside, inside
    if PRE or ACT:
        value = tl.load(x + _at(n, p, c, x_stride_n, x_stride_c, x_stride_p), mask=inside, other=0.0).to(tl.float32)
        first, second = _passes(value, inside, of_scale, of_shift, middle, PRE, AFFINE, ACT)
    upper = tl.load(g + _at(n, p, c, g_stride_n, g_stride_c, g_stride_p), mask=inside, other=0.0).to(tl.float32)
    upper = tl.where(second, upper, 0.0)
    if IMAGE:
        lower = tl.where(first, upper, 0.0)
        pixel = n.to(tl.int64) * pixels + p
        tl.store(out + pixel[:, None] * C + c[None, :], (lower * factor).to(out.dtype.element_ty), mask=inside)
    if SUMS:
        other = tl.load(a + _at(n, p, c, a_stride_n, a_stride_c, a_stride_p), mask=inside, other=0.0).to(tl.float32)
        pieces = tl.cdiv(pixels, BP)
        at = (n.to(tl.int64) * pieces + piece) * C + c
        tl.store(partial + at, tl.sum(upper * _measured(other, first, middle, A_CENTRED), axis=0), mask=c < C)
        samples = tl.num_programs(0) // (pieces * tl.cdiv(C, BC))
        tl.store(partial + samples.to(tl.int64) * pieces * C + at, tl.sum(upper, axis=0), mask=c < C)


@jit
def tangent_kernel(
    a, s, b, other, r, x, scale, shift, centre, out, pixels, C,
    a_stride_n, a_stride_c, a_stride_p, o_stride_n, o_stride_c, o_stride_p, x_stride_n, x_stride_c, x_stride_p,
    BP: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr, AFFINE: tl.constexpr, ACT: tl.constexpr,
    CENTRED: tl.constexpr, FIRST: tl.constexpr, FACTOR: tl.constexpr, OTHER: tl.constexpr, OTHER_FACTOR: tl.constexpr,
    OTHER_CENTRED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """out = m (m0 a s + (m0 other - centre) r + b), channels_last; without what has its flag off."""
    n, _, p, c = _pixels(tl.program_id(0), pixels, C, BP, BC)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    of_scale, of_shift = _affine(scale, shift, n, c, C, AFFINE)
    middle = _centre(centre, n, c, C, CENTRED)
    first, second = inside, inside
    if PRE or ACT:
        value = tl.load(x + _at(n, p, c, x_stride_n, x_stride_c, x_stride_p), mask=inside, other=0.0).to(tl.float32)
        first, second = _passes(value, inside, of_scale, of_shift, middle, PRE, AFFINE, ACT)
    total = tl.zeros([BP, BC], tl.float32)
    if FIRST:
        factor, _ = _affine(s, s, n, c, C, FACTOR)
        total = tl.load(a + _at(n, p, c, a_stride_n, a_stride_c, a_stride_p), mask=inside, other=0.0).to(tl.float32)
        total = tl.where(first, total * factor, 0.0)
    if OTHER:
        factor, _ = _affine(r, r, n, c, C, OTHER_FACTOR)
        more = tl.load(other + _at(n, p, c, o_stride_n, o_stride_c, o_stride_p), mask=inside, other=0.0)
        total += _measured(more.to(tl.float32), first, middle, OTHER_CENTRED) * factor
    added, _ = _affine(b, b, n, c, C, ADDED)
    if ADDED:
        total += added
    total = tl.where(second, total, 0.0)
    pixel = n.to(tl.int64) * pixels + p
    tl.store(out + pixel[:, None] * C + c[None, :], total.to(out.dtype.element_ty), mask=inside)


@jit
def moments_kernel(
    x, mean, deviation, pixels, C, stride_n, stride_c, stride_p,
    PIECE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Of each piece of PIECE pixels: mean and sum of squared deviations from it, [N, pieces, C] float32.

    Two sweeps, of which the second finds the piece in the cache: no cancellation, however far from zero x is.
    """
    n, piece, _, c = _pixels(tl.program_id(0), pixels, C, PIECE, BC)
    total = tl.zeros([BP, BC], tl.float32)
    for i in range(PIECE // BP):
        value, inside = _piece(x, n, piece * PIECE + i * BP, c, pixels, C, stride_n, stride_c, stride_p, BP, PRE)
        total += value
    count = tl.minimum(pixels - piece * PIECE, PIECE).to(tl.float32)
    centre = tl.sum(total, axis=0) / count
    total = tl.zeros([BP, BC], tl.float32)
    for i in range(PIECE // BP):
        value, inside = _piece(x, n, piece * PIECE + i * BP, c, pixels, C, stride_n, stride_c, stride_p, BP, PRE)
        value = tl.where(inside, value - centre[None, :], 0.0)
        total += value * value
    at = (n.to(tl.int64) * tl.cdiv(pixels, PIECE) + piece) * C + c
    tl.store(mean + at, centre, mask=c < C)
    tl.store(deviation + at, tl.sum(total, axis=0), mask=c < C)


@jit
def _piece(x, n, begin, c, pixels, C, stride_n, stride_c, stride_p, BP: tl.constexpr, PRE: tl.constexpr):
    p = begin + tl.arange(0, BP)
    inside = (p < pixels)[:, None] & (c < C)[None, :]
    value = tl.load(x + _at(n, p, c, stride_n, stride_c, stride_p), mask=inside, other=0.0).to(tl.float32)
    if PRE:
        value = _rectified(value)
    return value, inside


@jit
def merge_moments_kernel(mean, deviation, merged_mean, var, pieces, pixels, C, PIECE: tl.constexpr, BC: tl.constexpr):
    """Mean and variance [N, C] of the pieces together (Chan et al., 1979), in their order."""
    blocks = tl.cdiv(C, BC)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    centre = tl.zeros([BC], tl.float32)
    total = tl.zeros([BC], tl.float32)
    piece = 0
    while piece < pieces:
        at = (n * pieces + piece) * C + c
        before = tl.minimum(piece * PIECE, pixels).to(tl.float32)
        count = tl.minimum(pixels - piece * PIECE, PIECE).to(tl.float32)
        apart = tl.load(mean + at, mask=c < C, other=0.0) - centre
        centre += apart * (count / (before + count))
        total += tl.load(deviation + at, mask=c < C, other=0.0)
        total += apart * apart * (before * count / (before + count))
        piece += 1
    tl.store(merged_mean + n * C + c, centre, mask=c < C)
    tl.store(var + n * C + c, total / pixels, mask=c < C)
