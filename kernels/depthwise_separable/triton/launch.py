"""How the kernels of the depthwise-separable family are launched: programs, strides, and the second stage of sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable.triton import elementwise, fused_kernel, kernels, tiles
from raccgan.kernels.depthwise_separable.triton.arguments import Affine, Convolution, Stride, Term, dense
from raccgan.kernels.triton_runtime import Config, cdiv, power_of_two, tl

Run = Callable[..., None]
"""Who takes a launch: the runtime, or what only notes what would be compiled for it."""

PROGRAMS = 512
"""About how many programs a reduction over the batch is cut into: some four on each multiprocessor of a large GPU."""

BATCH = 16
"""Of what size a batch is taken to be where a sample's bits may not depend on it."""


def depthwise(x: Tensor, convolution: Convolution, affine: Affine, y: Tensor, run: Run = runtime.launch) -> None:
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
    constants = {"KERNEL_SIZE": convolution.kernel_size, "STRIDE": down, "UP": up, **affine.flags()}
    sizes = (*x.shape[2:], c, height, width)
    run(kernels.depthwise_kernel, programs, *images, *sizes, *strides, config=config, **constants)


def adjoint(
    grad: Tensor,
    convolution: Convolution,
    term: Term,
    x: Tensor,
    affine: Affine,
    out: Tensor,
    needs_sums: bool,
    run: Run = runtime.launch,
) -> tuple[Tensor, Tensor]:
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless needed. As :func:`ops.adjoint`."""
    n, c, height, width = x.shape
    if x.numel() == 0:
        return _no_sums(x, needs_sums)
    grad, *strides = _by_pixel(grad)
    other, *other_strides = _by_pixel(x if term.image is None else term.image)
    x, *x_strides = _by_pixel(x)
    down, up = convolution.stride
    across = cdiv(height, up), cdiv(width, up)
    config = tiles.strip(c, *across, strides[1] == 1)
    pieces = tiles.strips_of(config, *across) * up * up
    partial = _partial(grad, n, pieces, c, needs_sums)
    images = (grad, convolution.taps(), other, term.dense(), x, *affine.dense(), out, partial)
    constants = {"KERNEL_SIZE": convolution.kernel_size, "STRIDE": down, "UP": up, **affine.flags()}
    run(
        kernels.adjoint_kernel,
        n * pieces * cdiv(c, config.tile["TILE_CHANNELS"]),
        *images,
        *(*grad.shape[2:], c, height, width),
        *(*strides, *other_strides, *x_strides),
        config=config,
        **constants,
        **_vjp_flags(term, out, needs_sums),
    )
    return _summed(partial) if needs_sums else _no_sums(x, False)


def correlation(x: Tensor, grad: Tensor, k: int, stride: Stride, affine: Affine, run: Run = runtime.launch) -> Tensor:
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
    run(
        kernels.correlation_kernel,
        partial.shape[0] * blocks,
        *(wide, small, *affine.dense(), partial),
        *(strips, *wide.shape[2:], c, height, width),
        *(*wide_strides, *small_strides),
        config=config,
        **constants,
    )
    found = partial.sum(dim=0).t()
    return (found.flip(1) if flipped else found).contiguous().view(c, 1, k, k)


def prologue_vjp(
    grad: Tensor, term: Term, x: Tensor, affine: Affine, out: Tensor, needs_sums: bool, run: Run = runtime.launch
) -> tuple[Tensor, Tensor]:
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless needed. As :func:`ops.prologue_vjp`."""
    n, c, height, width = x.shape
    if x.numel() == 0:
        return _no_sums(x, needs_sums)
    grad, *strides = _by_pixel(grad)
    other, *other_strides = _by_pixel(grad if term.image is None else term.image)
    x, *x_strides = _by_pixel(x)
    config = tiles.block(c, height * width, strides[1] == 1)
    pieces = cdiv(height * width, config.tile["TILE_PIXELS"])
    partial = _partial(grad, n, pieces, c, needs_sums)
    run(
        elementwise.vjp_kernel,
        n * pieces * cdiv(c, config.tile["TILE_CHANNELS"]),
        *(grad, other, term.dense(), x, *affine.dense(), out, partial),
        *(height * width, c, *strides, *other_strides, *x_strides),
        config=config,
        **affine.flags(),
        **_vjp_flags(term, out, needs_sums),
    )
    return _summed(partial) if needs_sums else _no_sums(x, False)


def prologue_jvp(
    first: Term,
    second: Term,
    added: Tensor | None,
    x: Tensor,
    affine: Affine,
    out: Tensor,
    run: Run = runtime.launch,
) -> None:
    """Write ``out``; arguments as of :func:`ops.prologue_jvp`."""
    n, c, height, width = x.shape
    x, *x_strides = _by_pixel(x)
    image, *strides = _by_pixel(x if first.image is None else first.image)
    other, *other_strides = _by_pixel(x if second.image is None else second.image)
    config = tiles.block(c, height * width, strides[1] == 1)
    programs = n * cdiv(height * width, config.tile["TILE_PIXELS"]) * cdiv(c, config.tile["TILE_CHANNELS"])
    constants = {
        "IMAGE": first.image is not None,
        "FACTOR": first.factor is not None,
        "OTHER": second.image is not None,
        "OTHER_FACTOR": second.factor is not None,
        "OTHER_CENTERED": second.centered,
        "ADDED": added is not None,
    }
    run(
        elementwise.jvp_kernel,
        programs,
        *(image, first.dense(), dense(added), other, second.dense(), x, *affine.dense(), out),
        *(height * width, c, *strides, *other_strides, *x_strides),
        config=config,
        **affine.flags(),
        **constants,
    )


def moments(x: Tensor, pre_relu: bool, run: Run = runtime.launch) -> tuple[Tensor, Tensor]:
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
    run(elementwise.moments_kernel, n * pieces * blocks, *images, PIECE=piece, PRE_RELU=pre_relu, config=config)
    merging = Config({"TILE_CHANNELS": min(64, power_of_two(c))}, num_warps=1, num_stages=1)
    programs = n * cdiv(c, merging.tile["TILE_CHANNELS"])
    merged = (of_pieces, deviation, mean, var, pieces, pixels, c)
    run(elementwise.merge_moments_kernel, programs, *merged, PIECE=piece, config=merging)
    return mean, var


def fused(
    x: Tensor,
    convolution: Convolution,
    pointwise: Tensor,
    bias: Tensor | None,
    affine: Affine,
    residual: Tensor | None,
    y: Tensor,
    run: Run = runtime.launch,
) -> None:
    """Write y; arguments as of :func:`fused.fused`."""
    if y.numel() == 0:
        return
    n, d, height, width = y.shape
    c = x.shape[1]
    x, *strides = _by_pixel(x)
    added, *added_strides = _by_pixel(y if residual is None else residual)
    down, up = convolution.stride
    across = cdiv(height, up), cdiv(width, up)
    config = tiles.product(c, d, *across)
    constants = {
        "BLOCKS": cdiv(c, config.tile["TILE_CHANNELS"]),
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "OPERAND": operand(x.dtype),
        "PRECISION": precision(),
    }
    run(
        fused_kernel.separable_kernel,
        n * tiles.strips_of(config, *across) * up * up * cdiv(d, config.tile["TILE_OUTPUTS"]),
        *(x, convolution.taps(), *affine.dense(), pointwise.contiguous(), dense(bias), added, y),
        *(*x.shape[2:], c, d, height, width, *strides, *added_strides),
        config=config,
        **{"KERNEL_SIZE": convolution.kernel_size, "STRIDE": down, "UP": up, **affine.flags(), **constants},
    )


def operand(dtype: torch.dtype) -> object:
    """What the matrix product multiplies."""
    if dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def precision() -> str:
    """How float32 is multiplied, as PyTorch's own flags for CUDA's matrix products say at this moment."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _vjp_flags(term: Term, out: Tensor, needs_sums: bool) -> dict[str, bool]:
    return {
        "FACTOR": term.factor is not None,
        "IMAGE": out.dim() == 4,
        "SUMS": needs_sums,
        "OTHER_CENTERED": term.centered,
    }


def _partial(like: Tensor, n: int, pieces: int, c: int, needed: bool) -> Tensor:
    """Room for the first stage of two sums over the pixels."""
    return like.new_empty((2, n, pieces, c) if needed else (1,), dtype=torch.float32)


def _summed(partial: Tensor) -> tuple[Tensor, Tensor]:
    """The second stage of two sums: [2, N, pieces, C] over the pieces."""
    first, second = partial.sum(dim=2)
    return first.clone(), second.clone()  # an op's results may not share memory


def _no_sums(x: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if zeros else (0,)
    return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)


def _by_pixel(t: Tensor) -> tuple[Tensor, int, int, int]:
    """[N, C, H, W] and its strides of sample, channel and pixel; copied where the pixels do not lie evenly."""
    _, _, height, width = t.shape
    if height > 1 and width > 1 and t.stride(2) != width * t.stride(3):
        t = t.contiguous(memory_format=torch.channels_last)
    return t, t.stride(0), t.stride(1), t.stride(3) if width > 1 else t.stride(2)
