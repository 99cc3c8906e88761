"""Launches the Triton kernels of the depthwise-separable op: programs, strides, and the second stage of sums."""

from __future__ import annotations

import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable.triton import elementwise, fused_kernel, kernels, tiles
from raccgan.kernels.depthwise_separable.triton.arguments import Affine, Convolution, Stride, Term, dense
from raccgan.kernels.triton_runtime import Config, cdiv, launch, power_of_two, tl

PROGRAMS = 512
"""About how many programs a reduction over the batch is cut into: some four on each multiprocessor of a large GPU."""

BATCH = 16
"""Of what size a batch is taken to be where a sample's bits may not depend on it."""


def depthwise(x: Tensor, convolution: Convolution, affine: Affine, y: Tensor) -> None:
    """Write y; arguments as of :func:`ops.depthwise`."""
    if y.numel() == 0:
        return
    x, *strides = _by_pixel(x)
    n, c, height, width = y.shape
    down, up = convolution.stride
    across = cdiv(height, up), cdiv(width, up)
    config = tiles.strip(c, *across, strides[1] == 1, tiles.most_rows(down, affine.center))
    programs = n * tiles.strips_of(config, *across) * cdiv(c, config.tile["TILE_CHANNELS"]) * up * up
    images = (x, convolution.taps(), *affine.dense(), y)
    constants = {**convolution.constants(), **affine.flags()}
    sizes = (*x.shape[2:], c, height, width)
    launch(kernels.depthwise_kernel, programs, *images, *sizes, *strides, config=config, **constants)


def vjp(
    grad: Tensor, convolution: Convolution | None, term: Term, x: Tensor, affine: Affine, out: Tensor, needs_sums: bool
) -> tuple[Tensor, Tensor]:
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless needed. As :func:`ops.vjp`."""
    n, c, height, width = x.shape
    if x.numel() == 0:
        return _no_sums(x, needs_sums)
    grad, *strides = _by_pixel(grad)
    other, *other_strides = _by_pixel(x if term.image is None else term.image)
    x, *x_strides = _by_pixel(x)
    images = [grad, other, term.dense(), x, *affine.dense(), out]
    constants: dict[str, int] = {
        **affine.flags(),
        "FACTOR": term.factor is not None,
        "IMAGE": out.dim() == 4,
        "SUMS": needs_sums,
        "OTHER_CENTERED": term.centered,
    }
    if convolution is None:
        kernel, sizes = elementwise.vjp_kernel, (height * width, c)
        config = tiles.block(c, height * width, strides[1] == 1)
        pieces = cdiv(height * width, config.tile["TILE_PIXELS"])
    else:
        kernel, sizes = kernels.adjoint_kernel, (*grad.shape[2:], c, height, width)
        up = convolution.stride.up
        across = cdiv(height, up), cdiv(width, up)
        config = tiles.strip(c, *across, strides[1] == 1)
        pieces = tiles.strips_of(config, *across) * up * up
        images.insert(1, convolution.taps())
        constants |= convolution.constants()
    programs = n * pieces * cdiv(c, config.tile["TILE_CHANNELS"])
    partial = x.new_empty((2, n, pieces, c) if needs_sums else (1,), dtype=torch.float32)
    arguments = (*images, partial, *sizes, *strides, *other_strides, *x_strides)
    launch(kernel, programs, *arguments, config=config, **constants)
    if not needs_sums:
        return _no_sums(x, False)
    first, second = partial.sum(dim=2)  # the second stage of two sums
    return first.clone(), second.clone()  # an op's results may not share memory


def correlation(x: Tensor, grad: Tensor, k: int, stride: Stride, affine: Affine) -> Tensor:
    """[C, 1, k, k] float32; arguments as of :func:`ops.correlation`.

    Of the transposed convolution it is that of the other one with x and grad in each other's place, flipped.
    """
    c, flipped = x.shape[1], stride.up == 2
    if x.numel() == 0 or grad.numel() == 0:
        return x.new_zeros((c, 1, k, k), dtype=torch.float32)
    wide, *wide_strides = _by_pixel(grad if flipped else x)
    small, *small_strides = _by_pixel(x if flipped else grad)
    n, _, height, width = small.shape
    channels_last = wide_strides[1] == 1 and small_strides[1] == 1
    config = tiles.strip(c, height, width, channels_last, tiles.most_rows(stride.down, affine.center))
    blocks = cdiv(c, config.tile["TILE_CHANNELS"])
    strips = n * tiles.strips_of(config, height, width)
    each = power_of_two(cdiv(strips * blocks, PROGRAMS))
    partial = x.new_empty((cdiv(strips, each), k * k, c), dtype=torch.float32)
    constants = {"KERNEL_SIZE": k, "STRIDE": max(stride), "STRIPS": each, "ON_GRAD": flipped, **affine.flags()}
    images = (wide, small, *affine.dense(), partial)
    sizes = (strips, *wide.shape[2:], c, height, width, *wide_strides, *small_strides)
    launch(kernels.correlation_kernel, len(partial) * blocks, *images, *sizes, config=config, **constants)
    found = partial.sum(dim=0).t()
    return (found.flip(1) if flipped else found).contiguous().view(c, 1, k, k)


def jvp(first: Term, second: Term, added: Tensor | None, x: Tensor, affine: Affine, out: Tensor) -> None:
    """Write ``out``; arguments as of :func:`ops.jvp`."""
    n, c, height, width = x.shape
    x, *x_strides = _by_pixel(x)
    image, *strides = _by_pixel(x if first.image is None else first.image)
    other, *other_strides = _by_pixel(x if second.image is None else second.image)
    config = tiles.block(c, height * width, strides[1] == 1)
    programs = n * cdiv(height * width, config.tile["TILE_PIXELS"]) * cdiv(c, config.tile["TILE_CHANNELS"])
    given = {"IMAGE": first.image, "FACTOR": first.factor, "OTHER": second.image, "OTHER_FACTOR": second.factor}
    constants = {name: t is not None for name, t in {**given, "ADDED": added}.items()}
    images = (image, first.dense(), dense(added), other, second.dense(), x, *affine.dense(), out)
    sizes = (height * width, c, *strides, *other_strides, *x_strides)
    constants |= {**affine.flags(), "OTHER_CENTERED": second.centered}
    launch(elementwise.jvp_kernel, programs, *images, *sizes, config=config, **constants)


def moments(x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C] float32; NaN of no pixels, as PyTorch's are."""
    n, c, height, width = x.shape
    mean, var = (x.new_full((n, c), torch.nan, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return mean, var
    pixels = height * width
    x, *strides = _by_pixel(x)
    config = tiles.block(c, pixels, strides[1] == 1)
    blocks = cdiv(c, config.tile["TILE_CHANNELS"])
    piece = max(config.tile["TILE_PIXELS"], power_of_two(pixels * blocks * BATCH // PROGRAMS))
    pieces = cdiv(pixels, piece)
    of_pieces, deviation = (x.new_empty((n, pieces, c), dtype=torch.float32) for _ in range(2))
    images = (x, of_pieces, deviation, pixels, c, *strides)
    launch(elementwise.moments_kernel, n * pieces * blocks, *images, PIECE=piece, PRE_RELU=pre_relu, config=config)
    merging = Config({"TILE_CHANNELS": min(64, power_of_two(c))}, num_warps=1, num_stages=1)
    programs = n * cdiv(c, merging.tile["TILE_CHANNELS"])
    merged = (of_pieces, deviation, mean, var, pieces, pixels, c)
    launch(elementwise.merge_moments_kernel, programs, *merged, PIECE=piece, config=merging)
    return mean, var


def fused(
    x: Tensor,
    convolution: Convolution,
    pointwise: Tensor,
    bias: Tensor | None,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Write y; arguments as of :func:`fused.fused`."""
    if y.numel() == 0:
        return
    n, d, height, width = y.shape
    c = x.shape[1]
    x, *strides = _by_pixel(x)
    added, *added_strides = _by_pixel(y if residual is None else residual)
    up = convolution.stride.up
    across = cdiv(height, up), cdiv(width, up)
    config = tiles.product(c, d, *across)
    constants = {
        **convolution.constants(),
        **affine.flags(),
        "BLOCKS": cdiv(c, config.tile["TILE_CHANNELS"]),
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "OPERAND": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype],
        "PRECISION": precision(),
    }
    programs = n * tiles.strips_of(config, *across) * up * up * cdiv(d, config.tile["TILE_OUTPUTS"])
    images = (x, convolution.taps(), *affine.dense(), pointwise.contiguous(), dense(bias), added, y)
    sizes = (*x.shape[2:], c, d, height, width, *strides, *added_strides)
    launch(fused_kernel.separable_kernel, programs, *images, *sizes, config=config, **constants)


def precision() -> str:
    """How float32 is multiplied, as PyTorch's own flags for CUDA's matrix products say at this moment."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _no_sums(x: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if zeros else (0,)
    return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)


def _by_pixel(t: Tensor) -> tuple[Tensor, int, int, int]:
    """[N, C, H, W] and its strides of sample, channel and pixel; copied where the pixels do not lie evenly."""
    _, _, height, width = t.shape
    if height > 1 and width > 1 and t.stride(2) != width * t.stride(3):
        t = t.contiguous(memory_format=torch.channels_last)
    return t, t.stride(0), t.stride(1), t.stride(3) if width > 1 else t.stride(2)
