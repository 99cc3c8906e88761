"""How the kernels of the depthwise-separable family are launched: tiles, programs, and the second stage of sums.

A thread holds about eight neighbouring values of a tile: 16 bytes of channels in half precision. There are one or two
tiles for a shape, see :mod:`raccgan.kernels.tuning`; the batch has no part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels import tuning
from raccgan.kernels.depthwise_separable import triton_elementwise as elementwise
from raccgan.kernels.depthwise_separable import triton_kernels as kernels
from raccgan.kernels.triton_runtime import Config, cdiv, power_of_two, tl

Run = Callable[..., None]
"""Who takes a launch: the runtime, or what only notes what would be compiled for it."""

PROGRAMS = 512
"""About how many programs a reduction over the batch is cut into: some four on each multiprocessor of a large GPU."""

BATCH = 16
"""Of what size a batch is taken to be where a sample's bits may not depend on it."""

T = TypeVar("T")


# ---- tiles ---------------------------------------------------------------------------------------------------------


def strips(c: int, h: int, v: int, dense_channels: bool, most: int = 4) -> list[Config]:
    """Of a depthwise convolution or correlation over h x v positions: R rows of BW pixels of BC channels.

    Four rows read least; two leave registers for twice as many programs at a time.
    """
    if dense_channels:
        channels = min(64, power_of_two(c))
        width = min(power_of_two(v), max(16, 256 // channels))
    else:
        width = min(64, power_of_two(v))
        channels = min(power_of_two(c), max(1, 512 // width))
    warps = _warps(width * channels // 8)
    rows = dict.fromkeys((min(most, _rows(h)), min(2, _rows(h))))
    return [Config({"R": r, "BW": width, "BC": channels}, num_warps=warps, num_stages=1) for r in rows]


def block(c: int, pixels: int, dense_channels: bool) -> Config:
    """Of an elementwise kernel: BP pixels of BC channels."""
    if dense_channels:
        channels = min(64, power_of_two(c))
        length = min(power_of_two(pixels), 2048 // channels)
    else:
        length = min(1024, power_of_two(pixels))
        channels = min(power_of_two(c), 2048 // length)
    return Config({"BP": length, "BC": channels}, num_warps=_warps(length * channels // 16), num_stages=1)


def products(c: int, d: int, h: int, v: int) -> list[Config]:
    """Of the fused kernel: R * BW positions, BC channels at a time, BD output channels.

    The widest strip uses each weight most; half of it leaves registers for more programs at a time.
    """
    down, outputs = _rows(h), output_block(c, d)
    widest = max(16 // down, min(16, power_of_two(v)))
    channels = max(16, min(32, power_of_two(c)))
    configs = []
    for width in dict.fromkeys((widest, widest // 2 if down * widest >= 64 else widest)):
        # 64 values of the product a thread; half of that where values are loaded one by one.
        warps = 8 if down * width * outputs >= 64 * 256 or not _even(c, d) else 4
        configs.append(Config({"R": down, "BW": width, "BC": channels, "BD": outputs}, num_warps=warps, num_stages=2))
    return configs


def output_block(c: int, d: int) -> int:
    """How many output channels a program of the fused kernel computes."""
    return max(16, min(256 if _even(c, d) else 128, power_of_two(d)))


def _even(c: int, d: int) -> bool:
    """Whether Triton knows that channels come 16 bytes at a time."""
    return c % 16 == 0 and d % 16 == 0


def _launched(
    name: str, candidates: list[Config], shape: Sequence[object], device: torch.device, go: Callable[[Config], T]
) -> T:
    """``go`` with the configuration that was measured as the fastest for the shape, or with the first.

    Ahead of time, where there is no device, with each of them.
    """
    if device.type == "meta":
        made = [go(config) for config in candidates]
        return made[0]
    return go(tuning.choose(f"depthwise_separable {name}", [kernels.__file__], shape, candidates, device, go))


def _most(stride: int, centre: Tensor | None) -> int:
    """The most rows of a strip: four of a window of stride 2 and a centre spill registers."""
    return 4 if centre is None or stride == 1 else 2


def _rows(h: int) -> int:
    return min(4, power_of_two(h))


def _warps(threads: int) -> int:
    return max(1, min(8, power_of_two(threads // 32)))


def operand(dtype: torch.dtype) -> object:
    """What the matrix product multiplies. The interpreter multiplies no bfloat16."""
    if runtime.INTERPRETED or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def precision() -> str:
    """How float32 is multiplied, as PyTorch's own flags for CUDA's matrix products say at this moment."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# ---- launches ------------------------------------------------------------------------------------------------------


def depthwise(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None, y: Tensor, stride: int,
    up: int, rectify_first: bool, rectify: bool, run: Run = runtime.launch,
) -> None:  # fmt: skip
    """Write y; arguments as of :func:`triton_ops.depthwise`."""
    if y.numel() == 0:
        return
    x, *strides = _by_pixel(x)
    n, c, h, v = y.shape
    down, across = cdiv(h, up), cdiv(v, up)

    def go(config: Config) -> None:
        run(
            kernels.depthwise_kernel, n * _tiles(config, c, down, across) * up * up, x, taps, _dense(scale),
            _dense(shift), _dense(centre), y, x.shape[2], x.shape[3], c, h, v, *strides, K=w.shape[-1], S=stride,
            U=up, PRE=rectify_first, AFFINE=scale is not None, ACT=rectify, CENTRED=centre is not None, config=config,
        )  # fmt: skip

    taps = _taps(w)
    shape = (w.shape[-1], stride, up, c, h, v, x.dtype, strides[1] == 1)
    candidates = strips(c, down, across, strides[1] == 1, _most(stride, centre))
    _launched("forward", candidates, shape, x.device, go)


def adjoint(
    g: Tensor, w: Tensor, a: Tensor | None, s: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, out: Tensor, stride: int, up: int, rectify_first: bool, rectify: bool, a_centred: bool,
    want_sums: bool, run: Run = runtime.launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless wanted. As :func:`triton_ops.adjoint`."""
    n, c, h, v = x.shape
    if x.numel() == 0:
        return _no_sums(x, want_sums)
    g, *strides = _by_pixel(g)
    other, *other_strides = _by_pixel(x if a is None else a)
    x, *x_strides = _by_pixel(x)
    down, across = cdiv(h, up), cdiv(v, up)

    def go(config: Config) -> Tensor:
        blocks = cdiv(c, config.tile["BC"])
        pieces = _tiles(config, c, down, across) // blocks * up * up
        partial = g.new_empty((2, n, pieces, c) if want_sums else (1,), dtype=torch.float32)
        run(
            kernels.adjoint_kernel, n * pieces * blocks, g, taps, other, _dense(s), x, _dense(scale), _dense(shift),
            _dense(centre), out, partial, g.shape[2], g.shape[3], c, h, v, *strides, *other_strides, *x_strides,
            K=w.shape[-1], S=stride, U=up, PRE=rectify_first, AFFINE=scale is not None, ACT=rectify,
            CENTRED=centre is not None, FACTOR=s is not None, IMAGE=out.dim() == 4, SUMS=want_sums,
            A_CENTRED=a_centred, config=config,
        )  # fmt: skip
        return partial

    taps = _taps(w)
    shape = (w.shape[-1], stride, up, c, h, v, x.dtype, strides[1] == 1)
    partial = _launched("adjoint", strips(c, down, across, strides[1] == 1), shape, x.device, go)
    return _summed(partial) if want_sums else _no_sums(x, False)


def correlation(
    x: Tensor, g: Tensor, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None, k: int, stride: int,
    up: int, rectify_first: bool, rectify: bool, run: Run = runtime.launch,
) -> Tensor:  # fmt: skip
    """[C, 1, k, k] float32; arguments as of :func:`triton_ops.correlation`.

    Of the transposed convolution it is that of the other one with x and g in each other's place, flipped.
    """
    c = x.shape[1]
    if x.numel() == 0 or g.numel() == 0:
        return x.new_zeros((c, 1, k, k), dtype=torch.float32)
    wide, small = (g, x) if up == 2 else (x, g)
    wide, *wide_strides = _by_pixel(wide)
    small, *small_strides = _by_pixel(small)
    n, _, h, v = small.shape
    dense_channels = wide_strides[1] == 1 and small_strides[1] == 1

    def go(config: Config) -> Tensor:
        blocks = cdiv(c, config.tile["BC"])
        strips_of_all = n * _tiles(config, c, h, v) // blocks
        each = power_of_two(cdiv(strips_of_all * blocks, PROGRAMS))
        partial = x.new_empty((cdiv(strips_of_all, each), k * k, c), dtype=torch.float32)
        run(
            kernels.correlation_kernel, partial.shape[0] * blocks, wide, small, _dense(scale), _dense(shift),
            _dense(centre), partial, strips_of_all, wide.shape[2], wide.shape[3], c, h, v, *wide_strides,
            *small_strides, K=k, S=max(stride, up), STRIPS=each, PRE=rectify_first, AFFINE=scale is not None,
            ACT=rectify, CENTRED=centre is not None, ON_G=up == 2, config=config,
        )  # fmt: skip
        return partial

    shape = (k, stride, up, c, h, v, x.dtype, dense_channels)
    candidates = strips(c, h, v, dense_channels, _most(stride, centre))
    partial = _launched("correlation", candidates, shape, x.device, go)
    found = partial.sum(dim=0).t()
    return (found.flip(1) if up == 2 else found).contiguous().view(c, 1, k, k)


def cotangent(
    g: Tensor, a: Tensor | None, s: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, out: Tensor, rectify_first: bool, rectify: bool, a_centred: bool, want_sums: bool,
    run: Run = runtime.launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write ``out`` unless it is [0]; the two sums [N, C], [0] unless wanted. As :func:`triton_ops.cotangent`."""
    n, c, h, v = x.shape
    if x.numel() == 0:
        return _no_sums(x, want_sums)
    g, *strides = _by_pixel(g)
    other, *other_strides = _by_pixel(g if a is None else a)
    x, *x_strides = _by_pixel(x)
    config = block(c, h * v, strides[1] == 1)
    pieces = cdiv(h * v, config.tile["BP"])
    partial = g.new_empty((2, n, pieces, c) if want_sums else (1,), dtype=torch.float32)
    run(
        elementwise.cotangent_kernel, n * pieces * cdiv(c, config.tile["BC"]), g, other, _dense(s), x, _dense(scale),
        _dense(shift), _dense(centre), out, partial, h * v, c, *strides, *other_strides, *x_strides,
        PRE=rectify_first, AFFINE=scale is not None, ACT=rectify, CENTRED=centre is not None, FACTOR=s is not None,
        IMAGE=out.dim() == 4, SUMS=want_sums, A_CENTRED=a_centred, config=config,
    )  # fmt: skip
    return _summed(partial) if want_sums else _no_sums(x, False)


def tangent(
    a: Tensor | None, s: Tensor | None, b: Tensor | None, other: Tensor | None, r: Tensor | None, x: Tensor,
    scale: Tensor | None, shift: Tensor | None, centre: Tensor | None, out: Tensor, rectify_first: bool, rectify: bool,
    other_centred: bool, run: Run = runtime.launch,
) -> None:  # fmt: skip
    """Write ``out``; arguments as of :func:`triton_ops.tangent`."""
    n, c, h, v = x.shape
    x, *x_strides = _by_pixel(x)
    first, *first_strides = _by_pixel(x if a is None else a)
    second, *second_strides = _by_pixel(x if other is None else other)
    config = block(c, h * v, first_strides[1] == 1)
    programs = n * cdiv(h * v, config.tile["BP"]) * cdiv(c, config.tile["BC"])
    run(
        elementwise.tangent_kernel, programs, first, _dense(s), _dense(b), second, _dense(r), x, _dense(scale),
        _dense(shift), _dense(centre), out, h * v, c, *first_strides, *second_strides, *x_strides,
        PRE=rectify_first, AFFINE=scale is not None, ACT=rectify, CENTRED=centre is not None, FIRST=a is not None,
        FACTOR=s is not None, OTHER=other is not None, OTHER_FACTOR=r is not None, OTHER_CENTRED=other_centred,
        ADDED=b is not None, config=config,
    )  # fmt: skip


def moments(x: Tensor, rectify_first: bool, run: Run = runtime.launch) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, C] float32; NaN of no pixels, as PyTorch's are."""
    n, c, h, v = x.shape
    mean, var = (x.new_full((n, c), torch.nan, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return mean, var
    x, *strides = _by_pixel(x)
    config = block(c, h * v, strides[1] == 1)
    blocks = cdiv(c, config.tile["BC"])
    piece = max(config.tile["BP"], power_of_two(h * v * blocks * BATCH // PROGRAMS))
    pieces = cdiv(h * v, piece)
    of_pieces, deviation = (x.new_empty((n, pieces, c), dtype=torch.float32) for _ in range(2))
    run(
        elementwise.moments_kernel, n * pieces * blocks, x, of_pieces, deviation, h * v, c, *strides,
        PIECE=piece, PRE=rectify_first, config=config,
    )  # fmt: skip
    merging = Config({"BC": min(64, power_of_two(c))}, num_warps=1, num_stages=1)
    run(
        elementwise.merge_moments_kernel, n * cdiv(c, merging.tile["BC"]), of_pieces, deviation, mean, var, pieces,
        h * v, c, PIECE=piece, config=merging,
    )  # fmt: skip
    return mean, var


def separable(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, residual: Tensor | None, y: Tensor, stride: int, up: int, rectify_first: bool,
    rectify: bool, statistics: bool, run: Run = runtime.launch,
) -> Sequence[Tensor]:  # fmt: skip
    """Write y; its sum, sum of squares and max [N, D], [0] unless wanted. As :func:`triton_separable.separable`."""
    n, d, h, v = y.shape
    if y.numel() == 0:
        empty = [(n, d) if statistics else (0,)] * 2
        return *(y.new_zeros(s, dtype=torch.float32) for s in empty), y.new_full(empty[0], -torch.inf).float()
    c = x.shape[1]
    x, *strides = _by_pixel(x)
    added, *added_strides = _by_pixel(y if residual is None else residual)
    down, across = cdiv(h, up), cdiv(v, up)

    def go(config: Config) -> Tensor:
        of_sample = cdiv(down, config.tile["R"]) * cdiv(across, config.tile["BW"]) * up * up
        partial = y.new_empty((3, n, of_sample, d) if statistics else (1,), dtype=torch.float32)
        run(
            kernels.separable_kernel, n * of_sample * cdiv(d, config.tile["BD"]), x, taps, _dense(scale),
            _dense(shift), _dense(centre), matrix, _dense(bias), added, y, partial, x.shape[2], x.shape[3], c, d, h, v,
            *strides, *added_strides, K=w.shape[-1], S=stride, U=up, BLOCKS=cdiv(c, config.tile["BC"]),
            PRE=rectify_first, AFFINE=scale is not None, ACT=rectify, CENTRED=centre is not None, BIAS=bias is not None,
            RESIDUAL=residual is not None, STATISTICS=statistics, OPERAND=operand(x.dtype), PRECISION=precision(),
            config=config,
        )  # fmt: skip
        return partial

    taps, matrix = _taps(w), pointwise.contiguous()
    shape = (w.shape[-1], stride, up, c, d, h, v, x.dtype, strides[1] == 1, precision())
    partial = _launched("fused", products(c, d, down, across), shape, x.device, go)
    if not statistics:
        return [y.new_empty(0, dtype=torch.float32) for _ in range(3)]
    return partial[0].sum(dim=1), partial[1].sum(dim=1), partial[2].amax(dim=1)


def _summed(partial: Tensor) -> tuple[Tensor, Tensor]:
    """The second stage of two sums: [2, N, pieces, C] over the pieces."""
    first, second = partial.sum(dim=2)
    return first.clone(), second.clone()  # an op's results may not share memory


def _no_sums(x: Tensor, zeros: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if zeros else (0,)
    return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)


def _tiles(config: Config, c: int, h: int, v: int) -> int:
    """Strips of one sample of h x v positions, of all channels."""
    return cdiv(h, config.tile["R"]) * cdiv(v, config.tile["BW"]) * cdiv(c, config.tile["BC"])


def _taps(w: Tensor) -> Tensor:
    """[C, 1, K, K] as [K * K, C], where the channels that a program reads lie side by side."""
    return w.flatten(1).t().contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _by_pixel(t: Tensor) -> tuple[Tensor, int, int, int]:
    """[N, C, H, W] and its strides of sample, channel and pixel; copied where the pixels do not lie evenly."""
    _, _, h, w = t.shape
    if h > 1 and w > 1 and t.stride(2) != w * t.stride(3):
        t = t.contiguous(memory_format=torch.channels_last)
    return t, t.stride(0), t.stride(1), t.stride(3) if w > 1 else t.stride(2)
