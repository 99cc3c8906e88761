"""What the Triton kernels of the depthwise-separable family are compiled for ahead of time, for GPUs that are not here.

The launches themselves say it: they are made on tensors without memory, and noted instead of run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable import triton_launch as launch
from raccgan.kernels.depthwise_separable.triton_ops import PLAIN, Geometry
from raccgan.kernels.triton_runtime import Compilation, Config

_DOWN, _UP = Geometry(stride=2), Geometry(up=2)

_SHAPES: dict[torch.dtype, tuple[tuple[int, Geometry], ...]] = {
    torch.bfloat16: ((3, PLAIN), (7, PLAIN), (4, _DOWN), (8, _UP), (4, _UP), (8, _DOWN)),
    torch.float32: ((3, PLAIN), (8, _UP)),
    torch.float16: ((3, PLAIN),),
}
"""Sides of weights and geometries, those of the two models and of their gradients in full in bfloat16."""

_WIDEST = (96, 256, 32, True)
"""Channels in and out, side, and whether channels_last."""

_UNEVEN = (100, 120, 32, True)
"""Channels in no multiples of 16, which are loaded one by one: first, as the test takes a kernel's first configuration
for sizes of which a launch knows nothing."""

_OTHERS = ((256, 64, 8, True), (256, 256, 4, True), (1, 64, 32, True), (3, 96, 32, False))
"""A layer for every other tile that the two models' layers have."""


def compilations() -> Iterator[Compilation]:
    """Every kernel in every dtype and geometry on the widest tile, and on every other tile.

    With everything around it that there is: prologue, bias, residual and statistics. Not every tile in every geometry
    and dtype, which would be minutes more.
    """
    found: list[Compilation] = []
    _note_convolutions(found, torch.bfloat16, 3, PLAIN, *_UNEVEN)
    for dtype, shapes in _SHAPES.items():
        for k, geometry in shapes:
            _note_convolutions(found, dtype, k, geometry, *_WIDEST)
        _note_elementwise(found, dtype, *_WIDEST)
    for image in _OTHERS:
        _note_convolutions(found, torch.bfloat16, 3, PLAIN, *image)
    _note_elementwise(found, torch.bfloat16, *_OTHERS[-1])
    return iter(found)


def _note_convolutions(
    found: list[Compilation], dtype: torch.dtype, k: int, geometry: Geometry, c: int, d: int, side: int, last: bool
) -> None:
    h = side * geometry.up // geometry.stride
    x, y = _meta(dtype, 2, c, side, side, last=last), _meta(dtype, 2, c, h, h, last=last)
    w, affine = _meta(torch.float32, c, 1, k, k), _meta(torch.float32, 2, c)
    around: dict[str, Any] = {"rectify_first": True, "rectify": True, "run": _Note(found)}
    launch.depthwise(x, w, affine, affine, affine, y, *geometry, **around)
    launch.correlation(x, y, affine, affine, affine, k, *geometry, **around)
    launch.adjoint(x, w, y, affine, y, affine, affine, affine, y, *geometry, **around, a_centred=True, want_sums=True)
    matrix, bias, z = _meta(dtype, d, c), _meta(torch.float32, d), _meta(dtype, 2, d, h, h, last=last)
    launch.separable(x, w, matrix, bias, affine, affine, affine, z, z, *geometry, **around, statistics=True)


def _note_elementwise(found: list[Compilation], dtype: torch.dtype, c: int, d: int, side: int, last: bool) -> None:
    x, affine = _meta(dtype, 2, c, side, side, last=last), _meta(torch.float32, 2, c)
    around: dict[str, Any] = {"rectify_first": True, "rectify": True, "run": _Note(found)}
    launch.cotangent(x, x, affine, x, affine, affine, affine, x, **around, a_centred=True, want_sums=True)
    launch.tangent(x, affine, affine, x, affine, x, affine, affine, affine, x, **around, other_centred=True)
    launch.moments(x, True, run=_Note(found))


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
        if "PRECISION" in constants:  # float32 that is not rounded to tf32 is multiplied by PyTorch: see triton.fuses
            constants["PRECISION"] = "tf32"
        self.found.append(Compilation(kernel, signature, constants, config))
