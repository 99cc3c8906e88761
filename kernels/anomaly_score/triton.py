"""The triton backend of the anomaly score. It reads each tensor once forward, and once for the gradient.

A program takes a tile of one sample: some pixels of the images with all their channels, or some features. In the order
of programs a sample's image tiles come first. A second launch adds the sums of a sample's tiles in a fixed order. The
kernels have not run on a GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile them for sm_80 and
sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.anomaly_score.reference import Tensors, gradients, output_shapes
from raccgan.kernels.autograd import define, differentiate, inputs_of
from raccgan.kernels.triton_runtime import Config, cdiv, jit, launch, tile_of, tl


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.reference.anomaly_score`, in float32.

    Images are read in place where both are NCHW or both channels_last, copied otherwise. A sample's bits depend on the
    sample and its memory order, not on the batch.
    """
    return torch.ops.raccgan.anomaly_score_triton(x, x_hat, f, f_hat, want_map)


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
            _, _, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
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
            _, _, inside, at = tile_of(sample, pixel, first, pixels, CHANNELS, CHANNELS_LAST, CHANNEL_TILE)
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


_ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
_FINISH = Config({"PARTS": 128}, 1)


@cache
def _tile(channels: int, pixels: int, features: int, channels_last: bool) -> Config:
    """The image's tile, and the features'."""
    wide = min(32, runtime.power_of_two(channels)) if channels_last else 1

    def work(config: Config) -> tuple[int, int]:
        elements = config.tile["ELEMENTS"]
        return cdiv(pixels, elements // wide) + cdiv(features, elements), elements

    config = runtime.cheapest(_ELEMENTS, work)
    elements = config.tile["ELEMENTS"]
    return config._replace(tile={"PIXEL_TILE": elements // wide, "CHANNEL_TILE": wide, "FEATURE_TILE": elements})


def _plan(
    x: Tensor, f: Tensor | None, images: bool = True, features: bool = True
) -> tuple[tuple[int, ...], tuple[float, float], dict[str, Any]]:
    """Pixels, features and tiles of a sample, 0 of what is not computed; divisors of its means; options of a launch."""
    (n, c, h, w), last = x.shape, not x.is_contiguous()
    pixels, size = h * w, 0 if f is None or n == 0 else f[0].numel()
    config = _tile(c, pixels, size, last)
    image_tiles = cdiv(pixels, config.tile["PIXEL_TILE"]) if images else 0
    feature_tiles = cdiv(size, config.tile["FEATURE_TILE"]) if features else 0
    options = {"config": config, "CHANNELS": c, "CHANNELS_LAST": last}
    return (pixels, size, image_tiles, feature_tiles), (float(c * pixels), float(size)), options


def _all_alike(*tensors: Any) -> list[Any]:
    """Each pair as it is where both are dense in the same order; else copies that are."""
    found: list[Any] = []
    for a, b in (tensors[:2], tensors[2:]):
        images = a is not None and a.dim() == 4
        last = images and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b))
        found += (a, b) if a is None or last else (a.contiguous(), b.contiguous())
    return found


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    residual, feature, to_map = output_shapes(*inputs)
    x, x_hat, f, f_hat = _all_alike(*inputs[:4])
    n, (counts, sizes, options) = x.shape[0], _plan(x, f)
    programs = n * sum(counts[2:])
    partial = residual.new_empty(programs)
    found = to_map if inputs[4] else None, partial
    launch(sum_squares, programs, x, x_hat, f, f_hat, *found, *counts, **options)
    if f is None:
        feature.zero_()
    launch(find_means, n, partial, residual, f if f is None else feature, *counts[2:], *sizes, config=_FINISH)
    return residual, feature, to_map


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found, tensors, needs = _backward_shapes(*inputs), _all_alike(*inputs[:4]), inputs[7:]
    counts, sizes, options = _plan(tensors[0], tensors[2], any(needs[:2]), any(needs[2:]))
    grads = [None if grad is None else grad.contiguous() for grad in inputs[4:7]]
    wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    programs = inputs[0].shape[0] * sum(counts[2:])
    launch(find_gradients, programs, *tensors, *grads, *wanted, *counts, *sizes, **options)
    return found


def _backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    pairs = zip(_all_alike(*inputs[:4]), inputs[7:], strict=True)
    return tuple(inputs[0].new_empty(0) if t is None or not need else torch.empty_like(t) for t, need in pairs)


def _of_forward(
    ctx: Any, needs: Sequence[bool], of_residual: Tensor | None, of_feature: Tensor | None, of_map: Tensor | None
) -> Tensors:
    *tensors, want_map = inputs_of(ctx)
    of_map = of_map if want_map else None
    images, features = of_residual is not None or of_map is not None, of_feature is not None
    comes = [need and there for need, there in zip(needs, (images, images, features, features, False), strict=True)]
    if not any(comes):
        return ()
    found = torch.ops.raccgan.anomaly_score_triton_backward(*tensors, of_residual, of_feature, of_map, *comes[:4])
    return [grad if there else None for grad, there in zip(found, comes, strict=False)]


def _of_backward(ctx: Any, needs: Sequence[bool], *grad_grads: Tensor | None) -> Tensors:
    inputs = inputs_of(ctx)
    through = [grad if computed else None for grad, computed in zip(grad_grads, inputs[7:], strict=True)]
    return differentiate(lambda *given: gradients(given[:4], given[4:]), inputs[:7], through, needs[:7])


_OPS = (
    define(
        "anomaly_score_triton(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool want_map)"
        " -> (Tensor, Tensor, Tensor)",
        output_shapes,
        _of_forward,
    )(_forward),
    define(
        "anomaly_score_triton_backward(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, Tensor? grad_residual, "
        "Tensor? grad_feature, Tensor? grad_map, bool needs_x, bool needs_x_hat, bool needs_f, bool needs_f_hat)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _backward_shapes,
        _of_backward,
    )(_backward),
)
