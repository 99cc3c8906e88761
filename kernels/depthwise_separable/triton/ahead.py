"""What the Triton kernels of the depthwise-separable family are compiled for ahead of time, for GPUs that are not here.

The launches themselves say it: they are made on tensors without memory, and noted instead of run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.arguments import PLAIN, Affine, Convolution, Stride, Term
from raccgan.kernels.triton_runtime import Compilation, Config

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
    side: int
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
    found: list[Compilation] = []
    _note_convolutions(found, torch.bfloat16, 3, PLAIN, _UNEVEN)
    for dtype, shapes in _SHAPES.items():
        for k, stride in shapes:
            _note_convolutions(found, dtype, k, stride, _WIDEST)
        _note_elementwise(found, dtype, _WIDEST)
    for layer in _OTHERS:
        _note_convolutions(found, torch.bfloat16, 3, PLAIN, layer)
    _note_elementwise(found, torch.bfloat16, _OTHERS[-1])
    return iter(found)


def _note_convolutions(found: list[Compilation], dtype: torch.dtype, k: int, stride: Stride, layer: _Layer) -> None:
    run, (c, d, side, last) = _Note(found), layer
    height = side * stride.up // stride.down
    x, y = _meta(dtype, 2, c, side, side, last=last), _meta(dtype, 2, c, height, height, last=last)
    convolution, affine = Convolution(_meta(torch.float32, c, 1, k, k), stride), _affine(c)
    launch.depthwise(x, convolution, affine, y, run)
    launch.correlation(x, y, k, stride, affine, run)
    launch.adjoint(x, convolution, Term(y, affine.scale, centered=True), y, affine, y, True, run)
    matrix, bias, z = _meta(dtype, d, c), _meta(torch.float32, d), _meta(dtype, 2, d, height, height, last=last)
    launch.fused(x, convolution, matrix, bias, affine, z, z, run)


def _note_elementwise(found: list[Compilation], dtype: torch.dtype, layer: _Layer) -> None:
    run, (c, _, side, last) = _Note(found), layer
    x, affine = _meta(dtype, 2, c, side, side, last=last), _affine(c)
    term = Term(x, affine.scale, centered=True)
    launch.prologue_vjp(x, term, x, affine, x, True, run)
    launch.prologue_jvp(term, term, affine.scale, x, affine, x, run)
    launch.moments(x, True, run)


def _affine(c: int) -> Affine:
    values = _meta(torch.float32, 2, c)
    return Affine(values, values, values, pre_relu=True, relu=True)


def _meta(dtype: torch.dtype, *sizes: int, last: bool = False) -> Tensor:
    t = torch.empty(sizes, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last else t


class _Note:
    """In the place of a launch: notes what Triton would compile for it."""

    def __init__(self, found: list[Compilation]) -> None:
        self.found = found

    def __call__(self, kernel: Any, programs: int, *arguments: Any, config: Config, **constants: Any) -> None:
        signature: dict[str, str] = {}
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            if isinstance(value, Tensor):
                signature[name] = runtime.pointer(value.dtype)
            elif value is None or value == 1:  # as Triton does
                constants[name] = value
            else:
                signature[name] = "i32"
        if "PRECISION" in constants:  # float32 that is not rounded to tf32 is multiplied by PyTorch: see fused.fuses
            constants["PRECISION"] = "tf32"
        self.found.append(Compilation(kernel, signature, constants, config))
