"""The depthwise convolution alone, and each of its gradients: for these the libraries have kernels of their own too.

At the layers of the two published models, the upsampling done, as their convolutions see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import layers
from bench.machine import cache_bytes
from bench.measure import Case, Compare, Contestant
from bench.peers import LAYOUTS, places
from bench.roofline import Cost, name_of
from raccgan.kernels import library, triton_runtime
from raccgan.kernels.depthwise_separable.triton import ops
from raccgan.kernels.depthwise_separable.triton.launch import PLAIN, Convolution
from raccgan.kernels.dispatch import Call

PASSES = ("forward", "input gradient", "weight gradient")
QUICK = ("7x7 128 @16 b64", "3x3 128 @16 b64", "7x7 96 @128 b4", "3x3 96 @64 b4")


class Operands(NamedTuple):
    """x and g [N, C, H, W], w [C, 1, k, k]: w float32 whatever the others are, as in the networks."""

    x: Tensor
    w: Tensor
    g: Tensor


Compute = Callable[[Operands], Tensor]


def cases() -> dict[str, tuple[int, tuple[int, int, int, int]]]:
    """Kernel size and shape, by name, at each model's largest batch; the layers that are alike once."""
    found = {}
    for model in layers.MODELS.values():
        batch = model.batches[-1]
        for layer in layers.generator(model.config) + layers.discriminator(model.config, model.image_channels):
            k, size = layer.arguments["k"], layer.size * layer.arguments.get("upsample", 1)
            if k > 1:
                found[f"{k}x{k} {layer.channels} @{size} b{batch}"] = k, (batch, layer.channels, size, size)
    return found


CASES = cases()
PARAMETERS = [
    pytest.param(name, dtype, pass_, id=f"{name}-{dtype}-{pass_}", marks=() if name in QUICK else pytest.mark.full)
    for dtype in (torch.float32, torch.bfloat16)
    for pass_ in PASSES
    for name in CASES
]
assert set(QUICK) <= CASES.keys()


def of_the_library(pass_: str) -> Compute:
    """PyTorch's own, which is cuDNN's or oneDNN's or PyTorch's kernel; w in x's dtype, as autocast has it."""

    def compute(of: Operands) -> Tensor:
        x, w, g = of.x, of.w.to(of.x.dtype), of.g
        padding, c = [w.shape[-1] // 2] * 2, x.shape[1]
        if pass_ == "forward":
            return F.conv2d(x, w, padding=padding, groups=c)
        mask = [pass_ == "input gradient", pass_ == "weight gradient", False]
        found = torch.ops.aten.convolution_backward(
            g, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], c, mask
        )  # fmt: skip
        gradient: Tensor = next(t for t, wanted in zip(found, mask, strict=True) if wanted)
        return gradient

    return compute


def native(pass_: str) -> Compute:
    plain = (None, None, 1, 1, False, False, False, 1e-5)

    def compute(of: Operands) -> Tensor:
        if pass_ == "forward":
            y: Tensor = torch.ops.raccgan.depthwise_native(of.x, of.w, *plain)
            return y
        wants_x = pass_ == "input gradient"
        found = torch.ops.raccgan.depthwise_native_backward(of.g, of.x, of.w, *plain, wants_x, not wants_x, False)
        gradient: Tensor = found[0 if wants_x else 1]
        return gradient

    return compute


def triton(pass_: str) -> Compute:
    def compute(of: Operands) -> Tensor:
        size, convolution = of.x.shape[2:], Convolution(of.w)
        if pass_ == "forward":
            return ops.depthwise(of.x, convolution, *size)
        if pass_ == "input gradient":
            return ops.depthwise(of.g, convolution.transposed(), *size)
        return ops.correlation(of.x, of.g, of.w.shape[-1], PLAIN)

    return compute


def serving(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[str], Compute]]]:
    """Ours that run on the device."""
    compiled = library.why_not() is None and (device == "cpu" or library.cuda())
    if compiled:
        yield "native", native
    if device == "cuda" and triton_runtime.supports(Call(torch.device(device), dtype)) is None:
        yield "triton", triton


def drawn(name: str, dtype: torch.dtype) -> Operands:
    """In float64, of numbers that ``dtype`` holds."""
    draw = torch.Generator().manual_seed(1)
    k, shape = CASES[name]
    x, w, g = (torch.randn(s, generator=draw) for s in (shape, (shape[1], 1, k, k), shape))
    return Operands(*(t.to(dtype).double() for t in (x, w / k, g)))


def cost(name: str, dtype: torch.dtype) -> Cost:
    k, shape = CASES[name]
    elements = torch.Size(shape).numel()
    return Cost(elements * k * k, 2 * dtype.itemsize * elements + 4 * shape[1] * k * k, name_of(dtype))


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_depthwise(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    exact = Operands(*(t.to(device) for t in drawn(name, dtype)))
    case = Case("depthwise", name, dtype, pass_, device, [cost(name, dtype)])
    contestants = []
    for layout, memory_format in LAYOUTS.items():
        x, w, g = exact
        one = Operands(x.to(dtype, memory_format=memory_format), w.float(), g.to(dtype, memory_format=memory_format))
        others = range(places(2 * one.x.nbytes, cache_bytes(device)) - 1)
        pool = itertools.cycle([one, *(Operands(*(t.clone() for t in one)) for _ in others)])
        for label, makes in (("reference", of_the_library), *serving(device, dtype)):
            compute = makes(pass_)
            contestants.append(
                Contestant(
                    label,
                    layout,
                    peer=label == "reference",
                    fused=False,
                    check=partial(_checked, compute, one),
                    call=partial(_next, compute, pool),
                )
            )
    measured(case, contestants, [of_the_library(pass_)(exact)])


def _checked(compute: Compute, of: Operands) -> list[Tensor]:
    with torch.no_grad():
        return [compute(of)]


def _next(compute: Compute, pool: Iterator[Operands]) -> Tensor:
    with torch.no_grad():
        return compute(next(pool))
