"""The anomaly score's Triton kernels; :mod:`.launch` launches them.

A program takes a tile of one sample: some pixels of the images with all their channels, or some features. In the order
of programs a sample's image tiles come first.
"""

from __future__ import annotations

from raccgan.kernels.triton_runtime import jit, offsets, tl


@jit
def sum_squares(
    x, x_hat,  # [N, C, P], or [N, P, C] where CHANNELS_LAST
    f, f_hat,  # [N, E], or None
    to_map,  # [N, P], or None
    partial,  # [N, image_tiles + feature_tiles]
    pixels, features, image_tiles, feature_tiles,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr, FEATURE_TILE: tl.constexpr,
):  # fmt: skip
    """partial[n, tile] = sum of squared differences over the tile; the map of the tile, where it is wanted."""
    tiles = image_tiles + feature_tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    if tile < image_tiles:
        pixel = tile * PIXEL_TILE + tl.arange(0, PIXEL_TILE)
        squares = tl.zeros([PIXEL_TILE, CHANNEL_TILE], tl.float32)
        for first in range(0, CHANNELS, CHANNEL_TILE):
            channel = first + tl.arange(0, CHANNEL_TILE)
            at = offsets(sample, pixel, channel, pixels, CHANNELS, CHANNELS_LAST)
            inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x_hat + at, mask=inside, other=0.0).to(tl.float32)
            squares += (a - b) * (a - b)
        of_pixel = tl.sum(squares, axis=1)
        if to_map is not None:
            tl.store(to_map + sample * pixels + pixel, of_pixel / CHANNELS, mask=pixel < pixels)
        tl.store(partial + tl.program_id(0), tl.sum(of_pixel, axis=0))
    elif f is not None:
        i = (tile - image_tiles) * FEATURE_TILE + tl.arange(0, FEATURE_TILE)
        a = tl.load(f + sample * features + i, mask=i < features, other=0.0).to(tl.float32)
        b = tl.load(f_hat + sample * features + i, mask=i < features, other=0.0).to(tl.float32)
        tl.store(partial + tl.program_id(0), tl.sum((a - b) * (a - b), axis=0))


@jit
def find_means(
    partial,  # as sum_squares leaves it
    residual, feature,  # [N] each; feature is None without features
    image_tiles, feature_tiles, image_size: float, feature_size: float,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Means over a sample's tiles, always added in the same order; one program a sample."""
    sample = tl.program_id(0)
    start = sample.to(tl.int64) * (image_tiles + feature_tiles)
    tl.store(residual + sample, _sum_of(partial + start, image_tiles, PARTS) / image_size)
    if feature is not None:
        tl.store(feature + sample, _sum_of(partial + start + image_tiles, feature_tiles, PARTS) / feature_size)


@jit
def _sum_of(values, count, PARTS: tl.constexpr):
    sums = tl.zeros([PARTS], tl.float32)
    first = 0
    while first < count:
        i = first + tl.arange(0, PARTS)
        sums += tl.load(values + i, mask=i < count, other=0.0)
        first += PARTS
    return tl.sum(sums, axis=0)


@jit
def find_gradients(
    x, x_hat, f, f_hat,  # as in sum_squares
    grad_residual, grad_feature,  # [N] each, or None
    grad_map,  # [N, P], or None
    grad_x, grad_x_hat, grad_f, grad_f_hat,  # as the four, or None where not needed
    pixels, features, image_tiles, feature_tiles, image_size: float, feature_size: float,
    CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PIXEL_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr, FEATURE_TILE: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile; where no image's is needed image_tiles is 0, and likewise feature_tiles."""
    tiles = image_tiles + feature_tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    if tile < image_tiles:
        pixel = tile * PIXEL_TILE + tl.arange(0, PIXEL_TILE)
        weight = tl.zeros([PIXEL_TILE], tl.float32)
        if grad_residual is not None:
            weight += tl.load(grad_residual + sample) / image_size
        if grad_map is not None:
            weight += tl.load(grad_map + sample * pixels + pixel, mask=pixel < pixels, other=0.0) / CHANNELS
        for first in range(0, CHANNELS, CHANNEL_TILE):
            channel = first + tl.arange(0, CHANNEL_TILE)
            at = offsets(sample, pixel, channel, pixels, CHANNELS, CHANNELS_LAST)
            inside = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
            _write(x, x_hat, grad_x, grad_x_hat, at, inside, weight[:, None])
    elif f is not None and grad_feature is not None:
        i = (tile - image_tiles) * FEATURE_TILE + tl.arange(0, FEATURE_TILE)
        of_sample = tl.load(grad_feature + sample) / feature_size  # a name of its own: both branches share their names
        _write(f, f_hat, grad_f, grad_f_hat, sample * features + i, i < features, of_sample)


@jit
def _write(a, b, grad_a, grad_b, at, inside, weight):
    """grad_a = 2 weight (a - b) and grad_b = -grad_a, where they are needed."""
    wide_a = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    wide_b = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    grad = 2 * weight * (wide_a - wide_b)
    if grad_a is not None:
        tl.store(grad_a + at, grad.to(grad_a.dtype.element_ty), mask=inside)
    if grad_b is not None:
        tl.store(grad_b + at, (-grad).to(grad_b.dtype.element_ty), mask=inside)
