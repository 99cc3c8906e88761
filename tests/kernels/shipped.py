"""Every Triton kernel and configuration that ships, noted from launches on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.anomaly_score import triton as anomaly_score
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import CbamNeeds, CbamTensors
from raccgan.kernels.cbam.triton import op as cbam
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.fused import launch_fused
from raccgan.kernels.depthwise_separable.triton.launch import PLAIN, Affine, Convolution, Stride, Term
from raccgan.kernels.moments import triton as moments
from raccgan.kernels.triton_runtime import DTYPES, empty_in_order


class Compilation(NamedTuple):
    """One kernel compiled for one set of types and constants, as a launch would compile it."""

    kernel: Any
    signature: Mapping[str, str]  # of what is no constant: {"x": "*bf16", "n": "i32"}
    constants: Mapping[str, Any]  # flags and sizes of tiles, and None for an absent tensor
    num_warps: int
    num_stages: int


def compilations(family: str) -> list[Compilation]:
    """What an op's Triton backend compiles for the layers of the models, and for the smallest and oddest tiles."""
    with noted() as found:
        _LAUNCHES[family]()
    return found


@contextmanager
def noted() -> Iterator[list[Compilation]]:
    """Notes what Triton would compile for the launches inside, which are not run: their tensors may be "meta"."""
    found: list[Compilation] = []

    def launched(kernel: Any, grid: Any) -> Callable[..., None]:
        def note(*arguments: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            one = Compilation(kernel, *_typed(kernel, arguments, constants), num_warps, num_stages)
            if one not in found:
                found.append(one)

        return note

    with patch.object(runtime.triton.JITFunction, "__getitem__", launched):
        yield found


def _typed(
    kernel: Any, arguments: Sequence[Any], constants: dict[str, Any]
) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    signature: dict[str, str] = {}
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(value, Tensor):
            signature[name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[value.dtype]
        elif value is None or value == 1:  # as Triton does
            constants[name] = value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    # float32 that is not rounded to tf32 is multiplied by PyTorch: see fuses of the depthwise-separable convolution
    return signature, {**constants, **({"PRECISION": "tf32"} if "PRECISION" in constants else {})}


def meta(dtype: torch.dtype, *sizes: int, last: bool = False) -> Tensor:
    """A tensor without memory, channels_last where ``last``."""
    t = torch.empty(sizes, dtype=dtype, device="meta")
    return t.contiguous(memory_format=torch.channels_last) if last else t


floats = partial(meta, torch.float32)


def _moments() -> None:
    layers = ((96, 128, False), (128, 128, True), (128, 16, True), (64, 32, True))
    for dtype, (c, size, last) in product(DTYPES, layers):
        x = meta(dtype, 2, c, size, size, last=last)
        moments._forward(x)
        moments._backward(floats(c), floats(c), x, floats(c))


def _anomaly_score() -> None:
    """Of the smallest images also without features, whose gradient may come all the same as the op returns that term
    as zeros; and with as little as there can be.
    """
    forward, backward = anomaly_score._forward, anomaly_score._backward
    for size, dtype, (c, last) in product((32, 128, 512), DTYPES, ((1, False), (3, True))):
        x, f = meta(dtype, 2, c, size, size, last=last), meta(dtype, 2, 2**13)
        of_sample, to_map = floats(2), floats(2, size, size)
        forward(x, x, f, f, True)
        backward(x, x, f, f, of_sample, of_sample, to_map, *(True,) * 4)
        if size == 32:
            forward(x, x, None, None, True)
            backward(x, x, None, None, of_sample, of_sample, to_map, True, True, False, False)
            forward(x, x, None, None, False)
            backward(x, x, None, None, of_sample, None, None, True, False, False, False)


# Channels, of the hidden layer, kernel size, height and width, channels_last: few and many, and each sweep's tiles.
_CBAM = ((96, 6, 7, 128, False), (128, 6, 7, 128, True), (4, 2, 7, 64, False), (8, 2, 7, 128, True))


def _cbam() -> None:
    """Sweeps in every dtype and layout, the rest for few and many channels, with each norm."""
    norms = dict(zip(DTYPES, ("instance", "batch", "batch"), strict=True))
    cases = [(dtype, *layer, norms[dtype]) for dtype, layer in product(DTYPES, _CBAM)]
    cases.append((torch.float32, 1536, 96, 3, 32, True, "fixed"))
    for dtype, c, hidden, k, size, last, kind in cases:
        given_moments = floats(1) if kind == "fixed" else None
        mlp = floats(hidden, c), floats(hidden), floats(c, hidden), floats(c)
        x = meta(dtype, 2, c, size, size, last=last)
        tensors = CbamTensors(x, *mlp, floats(1, 2, k, k), floats(1), floats(1), given_moments, given_moments)
        given = (*tensors, kind == "batch", 1e-5)
        _, mean, _, saved = cbam._forward(*given)
        grad = None if kind == "fixed" else mean
        arguments = (x, grad, grad, *given, saved, *CbamNeeds(*5 * (True,)))
        cbam._backward_pass(arguments, autograd.backward_shapes(empty_in_order, *arguments))


class _Layer(NamedTuple):
    channels: int
    out_channels: int
    size: int
    channels_last: bool = True


# Channels in no multiples of 16 are loaded one by one. They come first, as the test takes a kernel's first
# configuration for sizes of which a launch knows nothing. Each other layer has a tile of the two models' own.
_LAYERS = (_Layer(100, 120, 32), _Layer(256, 64, 8), _Layer(256, 256, 4), _Layer(1, 64, 32), _Layer(3, 96, 32, False))
_WIDEST = _Layer(96, 256, 32)
_DOWN, _UP = Stride(down=2), Stride(up=2)
# Sizes and strides of weights, those of the two models and of their gradients in full in bfloat16.
_CONVOLUTIONS = {
    torch.bfloat16: ((3, PLAIN), (7, PLAIN), (4, _DOWN), (8, _UP), (4, _UP), (8, _DOWN)),
    torch.float32: ((3, PLAIN), (8, _UP)),
    torch.float16: ((3, PLAIN),),
}


def _depthwise_separable() -> None:
    """Every kernel in every dtype and stride on the widest tile, and on every other tile.

    Each has prologue, bias and residual. Every tile in every stride and dtype would be minutes more.
    """
    for layer in _LAYERS:
        _every_kernel(torch.bfloat16, 3, PLAIN, layer)
    for dtype, convolutions in _CONVOLUTIONS.items():
        for k, stride in convolutions:
            _every_kernel(dtype, k, stride, _WIDEST)


def _every_kernel(dtype: torch.dtype, k: int, stride: Stride, layer: _Layer) -> None:
    c, d, size, last = layer
    height = size * stride.up // stride.down
    x, y = meta(dtype, 2, c, size, size, last=last), meta(dtype, 2, c, height, height, last=last)
    values = floats(2, c)
    affine, term = Affine(values, values, values, pre_relu=True, relu=True), Term(y, values, centered=True)
    convolution = Convolution(floats(c, 1, k, k), stride)
    launch.depthwise(x, convolution, affine, y)
    launch.correlation(x, y, k, stride, affine)
    launch.vjp(x, convolution, term, y, affine, y, True)
    launch.vjp(y, Convolution(), term, y, affine, y, True)
    launch.jvp(term, term, values, y, affine, y)
    moments.fill_moments(y, values, values, pre_relu=True)
    matrix, bias, z = meta(dtype, d, c), floats(d), meta(dtype, 2, d, height, height, last=last)
    launch_fused(x, convolution, matrix, bias, z, affine, z)


_LAUNCHES = {
    "depthwise_separable": _depthwise_separable,
    "moments": _moments,
    "cbam": _cbam,
    "anomaly_score": _anomaly_score,
}
