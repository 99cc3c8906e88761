"""Lists what the Triton kernels of the depthwise-separable op are compiled for, for tests without a GPU.

The launches run on tensors without memory, and :func:`triton_runtime.noted` notes each kernel and its configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.arguments import PLAIN, Affine, Convolution, Stride, Term
from raccgan.kernels.triton_runtime import Compilation, meta

_DOWN, _UP = Stride(down=2), Stride(up=2)

_SHAPES: dict[torch.dtype, tuple[tuple[int, Stride], ...]] = {
    torch.bfloat16: ((3, PLAIN), (7, PLAIN), (4, _DOWN), (8, _UP), (4, _UP), (8, _DOWN)),
    torch.float32: ((3, PLAIN), (8, _UP)),
    torch.float16: ((3, PLAIN),),
}
"""Sizes and strides of weights, those of the two models and of their gradients in full in bfloat16."""


class _Layer(NamedTuple):
    channels: int
    out_channels: int
    size: int
    channels_last: bool = True


_WIDEST = _Layer(96, 256, 32)

_UNEVEN = _Layer(100, 120, 32)
"""Channels in no multiples of 16, which are loaded one by one: first, as the test takes a kernel's first configuration
for sizes of which a launch knows nothing."""

_OTHERS = (_Layer(256, 64, 8), _Layer(256, 256, 4), _Layer(1, 64, 32), _Layer(3, 96, 32, channels_last=False))
"""A layer for every other tile that the two models' layers have."""


def compilations() -> Iterator[Compilation]:
    """Every kernel in every dtype and stride on the widest tile, and on every other tile.

    With everything around it that there is: prologue, bias and residual. Not every tile in every stride and dtype,
    which would be minutes more.
    """
    with runtime.noted() as found:
        _convolutions(torch.bfloat16, 3, PLAIN, _UNEVEN)
        for dtype, shapes in _SHAPES.items():
            for k, stride in shapes:
                _convolutions(dtype, k, stride, _WIDEST)
            _elementwise(dtype, _WIDEST)
        for layer in _OTHERS:
            _convolutions(torch.bfloat16, 3, PLAIN, layer)
        _elementwise(torch.bfloat16, _OTHERS[-1])
    for one in found:
        if (
            "PRECISION" in one.constants
        ):  # float32 that is not rounded to tf32 is multiplied by PyTorch: see fused.fuses
            one = one._replace(constants={**one.constants, "PRECISION": "tf32"})
        yield one


def _convolutions(dtype: torch.dtype, k: int, stride: Stride, layer: _Layer) -> None:
    c, d, size, last = layer
    height = size * stride.up // stride.down
    x, y = meta(dtype, 2, c, size, size, last=last), meta(dtype, 2, c, height, height, last=last)
    convolution, affine = Convolution(meta(torch.float32, c, 1, k, k), stride), _affine(c)
    launch.depthwise(x, convolution, affine, y)
    launch.correlation(x, y, k, stride, affine)
    launch.vjp(x, convolution, Term(y, affine.scale, centered=True), y, affine, y, True)
    matrix, bias, z = meta(dtype, d, c), meta(torch.float32, d), meta(dtype, 2, d, height, height, last=last)
    launch.fused(x, convolution, matrix, bias, affine, z, z)


def _elementwise(dtype: torch.dtype, layer: _Layer) -> None:
    c, _, size, last = layer
    x, affine = meta(dtype, 2, c, size, size, last=last), _affine(c)
    term = Term(x, affine.scale, centered=True)
    launch.vjp(x, None, term, x, affine, x, True)
    launch.jvp(term, term, affine.scale, x, affine, x)
    launch.moments(x, True)


def _affine(c: int) -> Affine:
    values = meta(torch.float32, 2, c)
    return Affine(values, values, values, pre_relu=True, relu=True)
