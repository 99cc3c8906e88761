"""Arguments, tiles and launches of the depthwise-separable op's Triton kernels. A registered op takes the fields of a
tuple one by one.

A thread holds about eight neighbouring values of a tile: 16 bytes of channels in half precision. A shape has one tile,
which does not depend on the batch. ``triton.autotune`` does not choose among several tiles for two reasons. The order
of a sum follows the tile, so the timing of one run would decide the bits of a result. And the scratch memory of a
launch's sums is sized by the tile before the launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable.triton import kernels
from raccgan.kernels.triton_runtime import Config, cdiv, launch, power_of_two

# About how many programs a reduction over the batch is cut into: some four on each multiprocessor of a large GPU.
PROGRAMS = 512


class Affine(NamedTuple):
    """A prologue as the kernels have it: relu((pre_relu(.) - center) * scale + shift), a norm being folded in."""

    scale: Tensor | None = None  # [N, C] float32, with shift or not at all
    shift: Tensor | None = None  # [N, C] float32
    center: Tensor | None = None  # [N, C] float32, without a gradient
    pre_relu: bool = False
    relu: bool = False

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(map(dense, self[:3]))

    def relus(self) -> dict[str, bool]:
        return {"PRE_RELU": self.pre_relu, "RELU": self.relu}


NO_AFFINE = Affine()
SCHEMA = "Tensor? scale, Tensor? shift, Tensor? center, bool pre_relu, bool relu"  # an Affine in an op's schema


class Stride(NamedTuple):
    """Of a depthwise convolution: stride 2 (down), or transposed with stride 2 (up), or neither."""

    down: int = 1
    up: int = 1

    def transposed(self) -> Stride:
        return Stride(self.up, self.down)


PLAIN = Stride()


class Convolution(NamedTuple):
    """A depthwise convolution by w [C, 1, K, K] float32, K odd for stride 1, else even; without w, as in vjp, none."""

    w: Tensor | None = None
    stride: Stride = PLAIN

    def transposed(self) -> Convolution:
        """The one that takes this one's gradient to its image."""
        return Convolution(None if self.w is None else self.w.flip(2, 3), self.stride.transposed())

    @property
    def kernel_size(self) -> int:
        return 1 if self.w is None else self.w.shape[-1]

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time constants."""
        return {"KERNEL_SIZE": self.kernel_size, "STRIDE": self.stride.down, "UP": self.stride.up}

    def taps(self) -> Tensor | None:
        """[K * K, C], where the channels that a program reads lie side by side."""
        return None if self.w is None else self.w.flatten(1).t().contiguous()


class Term(NamedTuple):
    """An image [N, C, H, W], None where it is left out, and a factor [N, C], None where it is 1."""

    image: Tensor | None = None
    factor: Tensor | None = None
    centered: bool = False  # whether image - center stands for it


NO_TERM = Term()


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def by_pixel(t: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """[N, C, H, W] and its strides of sample, channel and pixel; copied where the pixels do not lie evenly."""
    if t is None:
        return None, 0, 0, 0
    _, _, height, width = t.shape
    if height > 1 and width > 1 and t.stride(2) != width * t.stride(3):
        t = t.contiguous(memory_format=torch.channels_last)
    return t, t.stride(0), t.stride(1), t.stride(3) if width > 1 else t.stride(2)


def strips_of(config: Config, height: int, width: int, up: int = 1) -> int:
    """How many strips of a tile one sample has, of one block of channels."""
    rows, columns = config.tile["TILE_ROWS"], config.tile["TILE_COLUMNS"]
    return up * up * cdiv(cdiv(height, up), rows) * cdiv(cdiv(width, up), columns)


def _strip(
    c: int, height: int, width: int, channels_last: bool, *, up: int = 1, most: int = 4
) -> tuple[Config, int, int]:
    """The tile of a depthwise convolution or correlation with ``most`` rows at most, its strips and blocks a sample."""
    columns = power_of_two(cdiv(width, up))
    if channels_last:
        channels = min(64, power_of_two(c))
        columns = min(columns, max(16, 256 // channels))
    else:
        columns = min(64, columns)
        channels = min(power_of_two(c), max(1, 512 // columns))
    tile = {"TILE_ROWS": min(most, power_of_two(cdiv(height, up))), "TILE_COLUMNS": columns, "TILE_CHANNELS": channels}
    config = Config(tile, num_warps=_warps(columns * channels // 8), num_stages=1)
    return config, strips_of(config, height, width, up), cdiv(c, channels)


def _most_rows(down: int, affine: Affine) -> int:
    """Four rows of a window of stride 2 and a center spill registers."""
    return 4 if affine.center is None or down == 1 else 2


def _warps(threads: int) -> int:
    return max(1, min(8, power_of_two(threads // 32)))


def depthwise(x: Tensor, convolution: Convolution, affine: Affine, y: Tensor) -> None:
    """Write y; arguments as of :func:`ops.depthwise`."""
    (n, c, height, width), (down, up) = y.shape, convolution.stride
    image, *strides = by_pixel(x)
    config, strips, blocks = _strip(c, height, width, strides[1] == 1, up=up, most=_most_rows(down, affine))
    arguments = (image, convolution.taps(), *affine.tensors(), y, *x.shape[2:], c, height, width, *strides)
    constants = {**convolution.constants(), **affine.relus()}
    launch(kernels.depthwise_kernel, n * strips * blocks, *arguments, config=config, **constants)


def vjp(
    grad: Tensor, convolution: Convolution, term: Term, x: Tensor, affine: Affine, out: Tensor, needs_sums: bool
) -> tuple[Tensor, Tensor]:
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless needed. As :func:`ops.vjp`."""
    n, c, height, width = x.shape
    (image, *strides), (other, *other_strides), (own, *x_strides) = map(by_pixel, (grad, term.image, x))
    config, strips, blocks = _strip(c, height, width, strides[1] == 1, up=convolution.stride.up)
    partial = x.new_empty((2, n, strips, c), dtype=torch.float32) if needs_sums else None
    images = (image, convolution.taps(), other, dense(term.factor), own, *affine.tensors())
    sizes = (*grad.shape[2:], c, height, width, *strides, *other_strides, *x_strides)
    arguments = (*images, out if out.dim() == 4 else None, partial, *sizes)
    constants = {**convolution.constants(), **affine.relus(), "OTHER_CENTERED": term.centered}
    launch(kernels.vjp_kernel, n * strips * blocks, *arguments, config=config, **constants)
    if partial is None:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    first, second = partial.sum(dim=2)  # the second stage of two sums
    return first.clone(), second.clone()  # an op's results may not share memory


def correlation(x: Tensor, grad: Tensor, k: int, stride: Stride, affine: Affine) -> Tensor:
    """[C, 1, k, k] float32; arguments as of :func:`ops.correlation`.

    Of the transposed convolution it is that of the other one with x and grad in each other's place, flipped.
    """
    flipped = stride.up == 2
    wide, small = (grad, x) if flipped else (x, grad)
    (image, *strides), (other, *other_strides) = map(by_pixel, (wide, small))
    n, c, height, width = small.shape
    channels_last, most = strides[1] == 1 and other_strides[1] == 1, _most_rows(stride.down, affine)
    config, strips, blocks = _strip(c, height, width, channels_last, most=most)
    each = power_of_two(cdiv(n * strips * blocks, PROGRAMS))
    partial = x.new_empty((cdiv(n * strips, each), k * k, c), dtype=torch.float32)
    sizes = (n * strips, *wide.shape[2:], c, height, width, *strides, *other_strides)
    arguments = (image, other, *affine.tensors(), partial, *sizes)
    constants = {"KERNEL_SIZE": k, "STRIDE": max(stride), "STRIPS": each, "ON_GRAD": flipped, **affine.relus()}
    launch(kernels.correlation_kernel, len(partial) * blocks, *arguments, config=config, **constants)
    found = partial.sum(dim=0).t()
    return (found.flip(1) if flipped else found).contiguous().view(c, 1, k, k)


def jvp(first: Term, second: Term, added: Tensor | None, x: Tensor, affine: Affine, out: Tensor) -> None:
    """Write ``out``; arguments as of :func:`ops.jvp`."""
    n, c, height, width = x.shape
    (image, *strides), (other, *other_strides), (own, *x_strides) = map(by_pixel, (first.image, second.image, x))
    pixels = height * width
    if (strides if first.image is not None else x_strides)[1] == 1:
        channels = min(64, power_of_two(c))
        length = min(power_of_two(pixels), 2048 // channels)
    else:
        length = min(1024, power_of_two(pixels))
        channels = min(power_of_two(c), 2048 // length)
    tile = {"TILE_PIXELS": length, "TILE_CHANNELS": channels}
    config = Config(tile, num_warps=_warps(length * channels // 16), num_stages=1)
    factors = (dense(first.factor), dense(added), other, dense(second.factor))
    arguments = (image, *factors, own, *affine.tensors(), out, pixels, c, *strides, *other_strides, *x_strides)
    constants = {**affine.relus(), "OTHER_CENTERED": second.centered}
    programs = n * cdiv(pixels, length) * cdiv(c, channels)
    launch(kernels.jvp_kernel, programs, *arguments, config=config, **constants)
