"""The compiled depthwise convolution and its correlation, beyond what the shared grid holds them to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.depthwise_separable import native, rewritten
from tests.kernels.capability import CAPABILITIES, said_under
from tests.kernels.grid import relative_error

CHANNELS = (1, 3, 7, 8, 16, 17, 33, 64)
KERNEL_SIZES = native.KERNEL_SIZES
# Batch, height and width: one pixel, smaller than the kernel, a tile and its neighbours, several bands of rows.
SIZES = ((1, 1, 1), (2, 3, 2), (3, 4, 4), (2, 5, 11), (17, 2, 8), (2, 8, 8), (1, 13, 7), (1, 40, 33), (2, 9, 130))
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of the largest magnitude; float32 adds up to 1024 in a row

pytestmark = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def convolution(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.raccgan.depthwise_native(x, w, b)
    return result


def correlation(x: Tensor, g: Tensor, k: int) -> Tensor:
    result: Tensor = torch.ops.raccgan.depthwise_correlation_native(x, g, k)
    return result


def made(n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, g, weights, bias and a cotangent of the correlation."""
    draw = torch.Generator().manual_seed(1)
    shapes = (n, c, h, w), (n, c, h, w), (c, 1, k, k), (c,), (c, 1, k, k)
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)


def in_float64(x: Tensor, g: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """D(x, w) + b and C(x, g) from patches [N, C, k * k, H * W]: PyTorch's own weight gradient takes minutes here."""
    n, c, h, width = x.shape
    k = w.shape[-1]
    patches = F.unfold(x.double(), k, padding=k // 2).view(n, c, k * k, h * width)
    y = torch.einsum("ncip,ci->ncp", patches, w.double().flatten(1)).view(x.shape)
    sums = torch.einsum("ncip,ncp->ci", patches, g.double().flatten(2)).view(w.shape)
    return y if b is None else y + b.double()[:, None, None], sums


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers; of the first sample alone where ``expanded``, which is what a sum's gradient looks like."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2] + 1, 2 * t.shape[3]), torch.nan, dtype=t.dtype)
        wide[:, 1:-1, 1:, ::2] = t
        return wide[:, 1:-1, 1:, ::2]
    return t[:1, :, :1, :1].expand_as(t) if layout == "expanded" else t


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest_errors() -> dict[torch.dtype, float]:
    """Over all channels, kernel sizes and sizes above, against float64."""
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for dtype in errors:
        for c in CHANNELS:
            for k in KERNEL_SIZES:
                for n, h, width in SIZES:
                    x, g, w, b, _ = made(n, c, h, width, k, dtype)
                    got = convolution(x, w, b), correlation(x, g, k)
                    for ours, wanted in zip(got, in_float64(x, g, w, b), strict=True):
                        errors[dtype] = max(errors[dtype], relative_error(ours, wanted))
    return errors


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_is_right_at_every_shape(capability: str) -> None:
    said_under(
        capability,
        "import torch, tests.kernels.test_depthwise_native as t\n"
        "torch.set_num_threads(1)\n"
        "errors = t.largest_errors()\n"
        "assert all(error < t.TOLERANCE[dtype] for dtype, error in errors.items()), errors",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", CHANNELS)
def test_layouts_change_no_bit(c: int, layout: str) -> None:
    x, g, w, b, _ = made(2, c, 5, 11, 5)
    if layout == "expanded":
        x, g = laid_out(x, layout).contiguous(), laid_out(g, layout).contiguous()
    y, sums = convolution(x, w, b), correlation(x, g, 5)
    x, g = laid_out(x, layout), laid_out(g, layout)
    got = convolution(x, w.transpose(2, 3).contiguous().transpose(2, 3), b)
    assert torch.equal(got, y)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(correlation(x, g, 5), sums)


@pytest.mark.parametrize("k", KERNEL_SIZES)
@pytest.mark.parametrize("shape", [(5, 3, 40, 33), (33, 40, 8, 8), (1, 16, 70, 70), (2, 1, 128, 9)])
def test_threads_change_no_bit(shape: tuple[int, int, int, int], k: int) -> None:
    x, g, w, b, _ = made(*shape, k)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append((convolution(x, w, b), correlation(x, g, k)))
    assert all(torch.equal(y, results[0][0]) and torch.equal(sums, results[0][1]) for y, sums in results)


@pytest.mark.parametrize("k", KERNEL_SIZES)
@pytest.mark.parametrize("c", [1, 3, 17])
def test_second_order(c: int, k: int) -> None:
    """Every gradient of a function of first gradients, against the same through PyTorch in float64."""
    x, g, w, b, v = made(2, c, 5, 6, k)

    def second(dtype: torch.dtype, depthwise: object) -> tuple[Tensor, ...]:
        assert callable(depthwise)
        tensors = [t.detach().to(dtype).requires_grad_() for t in (x, w, b, g)]
        first = torch.autograd.grad(depthwise(*tensors[:3]), tensors[:3], tensors[3], create_graph=True)
        mixed = first[0].square().sum() + (first[1] * v).square().sum() + first[2].square().sum()
        return torch.autograd.grad(mixed, (tensors[0], tensors[1], tensors[3]))

    wanted = second(torch.float64, lambda x, w, b: F.conv2d(x, w, b, padding=k // 2, groups=c))
    for ours, theirs in zip(second(torch.float32, native.depthwise), wanted, strict=True):
        assert relative_error(ours, theirs) < 3e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 17, 1, 1), (2, 1, 3, 3)])
def test_opcheck(shape: tuple[int, int, int, int], layout: str) -> None:
    x, g, w, b, _ = made(*shape, 3)
    x, g = (laid_out(t, layout).detach().requires_grad_() for t in (x, g))
    w.requires_grad_()
    torch.library.opcheck(torch.ops.raccgan.depthwise_native.default, (x, w, b.requires_grad_()))
    torch.library.opcheck(torch.ops.raccgan.depthwise_native.default, (x, w, None))
    torch.library.opcheck(torch.ops.raccgan.depthwise_correlation_native.default, (x, g, 3))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_nothing_in_is_zeros_out(shape: tuple[int, int, int, int]) -> None:
    x, g, w, b, _ = made(*shape, 5)
    assert convolution(x, w, b).shape == shape
    sums = correlation(x, g, 5)
    assert sums.shape == w.shape
    assert not sums.any()


def test_what_the_kernels_refuse() -> None:
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3, 3)
    for arguments, message in [
        ((x, torch.zeros(3, 1, 9, 9), None), "3, 5 or 7, got 9"),
        ((x, torch.zeros(4, 1, 3, 3), None), r"w must be \[C, 1, k, k\]"),
        ((x, torch.zeros(3, 1, 5, 3), None), r"w must be \[C, 1, k, k\]"),
        ((x, w, torch.zeros(4)), r"b must be \[C\]"),
        ((x, w.bfloat16(), None), "x and w must be of one dtype"),
        ((x.double(), w.double(), None), "x must be float32 or bfloat16"),
        ((x[0], w, None), r"x must be \[N, C, H, W\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            convolution(*arguments)
    with pytest.raises(RuntimeError, match=r"\[N, C, H, W\] alike"):
        correlation(x, x[:, :, :3], 3)
    with pytest.raises(RuntimeError, match="x and g must be of one dtype"):
        correlation(x, x.bfloat16(), 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("c", "size", "k"), [(4, 6, 3), (4, 6, 9), (16, 96, 3)])
def test_autocast_and_what_is_left_to_pytorch(dtype: torch.dtype, c: int, size: int, k: int) -> None:
    x, _, w, b, _ = made(2, c, size, size, k)
    p = torch.randn(5, c, 1, 1)
    with torch.autocast("cpu", dtype=dtype):
        arguments = (x, w, b, p, None, None, None, "relu", 1, 2, None)
        got, beside = native.depthwise_separable(*arguments), rewritten.depthwise_separable(*arguments)
    assert got.dtype == beside.dtype == dtype
    assert relative_error(got, beside) < 0.02


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_result_is_channels_last(memory_format: torch.memory_format) -> None:
    x, _, w, b, _ = made(2, 4, 6, 6, 3)
    p = torch.randn(5, 4, 1, 1)
    x = x.contiguous(memory_format=memory_format)
    y = native.depthwise_separable(x, w, b, p, None, None, None, "relu", 1, 2, None)
    assert y.is_contiguous(memory_format=torch.channels_last)
