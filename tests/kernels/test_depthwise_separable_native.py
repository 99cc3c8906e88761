"""The compiled depthwise kernels and the moments, beyond what the shared grid holds them to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.depthwise_separable import (
    Prologue,
    Resize,
    Weights,
    apply_prologue,
    depthwise_separable,
    packed,
    pooled,
    upsampled,
)
from raccgan.kernels.depthwise_separable.convolutions import Depthwise
from raccgan.kernels.depthwise_separable.native.depthwise import depthwise
from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES, product
from raccgan.kernels.moments.native import moments
from tests.kernels.capability import FEW_CAPABILITIES, said_under
from tests.kernels.compare import allowed_beside, assert_all_close, assert_close, largest, relative_error
from tests.kernels.grid import OwnOps
from tests.kernels.variations import LAYOUTS, laid_out, threads

# Batch, channels, height and width: one pixel, one to many channels, smaller than the kernel, a tile and its
# neighbours, several pieces of samples.
SHAPES = ((1, 1, 1, 1), (17, 1, 9, 4), (2, 3, 3, 2), (3, 16, 8, 8), (2, 17, 7, 9), (1, 33, 13, 11), (33, 4, 4, 4))
RESIZINGS = ((1, 1), (2, 1), (1, 2))
PROLOGUES = (
    Prologue(),
    Prologue(relu=True),
    Prologue(norm="instance", relu=True),
    Prologue(True, "instance", relu=True),
)
INSTANCE = Prologue(norm="instance")

pytestmark = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def definition(x: Tensor, w: Tensor, prologue: Prologue, resize: Resize) -> Tensor:
    """What the native depthwise convolution computes, of operations that any order of derivative goes through."""
    x = upsampled(apply_prologue(x, prologue), resize.upsample)
    return pooled(Depthwise.apply(x, w), resize.pool)


def made(n: int, c: int, h: int, w: int, k: int, *, affine: bool) -> list[Tensor | None]:
    """x, w, scale and shift in float64."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return [normal(n, c, h, w), normal(c, 1, k, k) / k, *(normal(n, c) if affine else None for _ in range(2))]


def all_orders(
    run: Any,
    tensors: list[Tensor | None],
    dtype: torch.dtype,
    prologue: Prologue = INSTANCE,
    resizing: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """The output, the gradients of all tensors, and those of a penalty on x's."""
    inputs = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    given = [t for t in inputs if t is not None]
    x, w, scale, shift = inputs
    y = run(x, w, prologue._replace(scale=scale, shift=shift), Resize(*resizing))
    draw = torch.Generator().manual_seed(2)
    g = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    first = torch.autograd.grad(y, given, g, create_graph=True, materialize_grads=True)
    t = torch.randn(first[0].shape, generator=draw, dtype=torch.float64).to(dtype)
    second = torch.autograd.grad((first[0] * t).sum(), [*given, g], materialize_grads=True)
    return [y, *first, *second]


def worst_excess() -> float:
    """Over everything above, how far beyond three times PyTorch's own float32 error the kernels' error goes."""
    excess = 0.0
    for k, shape, resizing, prologue, affine in itertools.product(
        (3, 5, 7), SHAPES, RESIZINGS, PROLOGUES, (False, True)
    ):
        if min(shape[2:]) < resizing[1] or (shape[2:] == (1, 1) and prologue.norm != "none"):
            continue  # nothing comes out; or all of it is rounding over a variance of zero
        tensors = made(*shape, k, affine=affine)
        wanted = all_orders(definition, tensors, torch.float64, prologue, resizing)
        beside = all_orders(definition, tensors, torch.float32, prologue, resizing)
        got = all_orders(depthwise, tensors, torch.float32, prologue, resizing)
        for ours, theirs, exact in zip(got, beside, wanted, strict=True):
            excess = largest([excess, relative_error(ours, exact) - allowed_beside(theirs, exact, least=0)])
    return excess


@pytest.mark.parametrize("capability", FEW_CAPABILITIES)
def test_every_capability_is_right_at_every_shape_through_the_penalty(capability: str) -> None:
    said = said_under(
        capability,
        "import torch, tests.kernels.test_depthwise_separable_native as t\n"
        "torch.set_num_threads(1)\n"
        "print(t.worst_excess())",
    )
    assert float(said) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 3, 8, 17, 33])
def test_layouts_change_no_bit(c: int, layout: str) -> None:
    x, w, _, _ = made(2, c, 5, 11, 5, affine=False)
    assert x is not None
    assert w is not None
    dense = laid_out(x, layout).clone(memory_format=torch.contiguous_format)
    for dtype in dispatch.COMPILED_DTYPES["cpu"]:
        a, b = dense.to(dtype), laid_out(x.to(dtype), layout)
        wanted = depthwise(a, w.to(dtype), INSTANCE)
        got = depthwise(b, w.to(dtype).transpose(2, 3).contiguous().transpose(2, 3), INSTANCE)
        assert torch.equal(got, wanted)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(m, n) for m, n in zip(moments(a), moments(b), strict=True))


@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("shape", [(5, 3, 40, 33), (33, 40, 8, 8), (1, 16, 70, 70), (2, 1, 128, 9)])
def test_threads_change_no_bit(shape: tuple[int, int, int, int], resizing: tuple[int, int]) -> None:
    tensors = made(*shape, 3, affine=True)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(all_orders(depthwise, tensors, torch.float32, INSTANCE, resizing))
            x = tensors[0]
            assert x is not None
            results[-1] += moments(x.float())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_bfloat16_is_float32_rounded(prologue: Prologue) -> None:
    """Of bfloat16 numbers the kernels compute what they compute of the same numbers in float32, then round."""
    tensors = [None if t is None else t.bfloat16().double() for t in made(2, 17, 8, 6, 3, affine=True)]
    got = all_orders(depthwise, tensors, torch.bfloat16, prologue, (1, 2))
    wide = all_orders(depthwise, tensors, torch.float32, prologue, (1, 2))
    assert_close(got[0], wide[0].bfloat16(), torch.finfo(torch.bfloat16).eps)
    assert_all_close(got, wide, 0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("c", [1, 3, 17, 40])
def test_without_gradients_it_is_one_call(c: int, resizing: tuple[int, int], dtype: torch.dtype) -> None:
    """The same result, with both biases, as of the two ops that are differentiated."""
    x, w, scale, shift = (t.to(dtype) for t in made(2, c, 6, 10, 3, affine=True) if t is not None)
    draw = torch.Generator().manual_seed(3)
    p, residual = torch.randn(5, c, 1, 1, generator=draw).to(dtype), torch.randn(2, 5, 6, 10, generator=draw).to(dtype)
    residual = pooled(upsampled(residual, resizing[0]), resizing[1])
    biases = torch.randn(c, generator=draw).to(dtype), torch.randn(5, generator=draw).to(dtype)
    weights, prologue = Weights(w, biases[0], p, biases[1]), Prologue(True, "instance", 1e-5, scale, shift, True)

    def run(weights: Weights) -> Tensor:
        return depthwise_separable(x, weights, prologue, Resize(*resizing), residual=residual, kernels="native")

    with OwnOps() as differentiated:
        wanted = run(weights._replace(pointwise=p.detach().requires_grad_()))
    with OwnOps() as alone, torch.no_grad():
        got = run(weights)
    assert differentiated.names == ["raccgan::depthwise_native", "raccgan::pointwise_native"]
    assert alone.names == ["raccgan::depthwise_separable_native"]
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_close(got, wanted, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resizing", RESIZINGS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("n", "c", "d"), [(1, 40, 33), (5, 17, 3), (33, 1, 9), (16, 3, 5)])
def test_how_threads_cut_the_one_call_changes_no_bit(
    n: int, c: int, d: int, normalise: bool, resizing: tuple[int, int], dtype: torch.dtype
) -> None:
    """By samples, by bands of their rows, or one convolution after the other; and with weights packed before or not."""
    upsample, pool = resizing
    x, w, scale, shift = (t.to(dtype) for t in made(n, c, 17, 18, 5, affine=True) if t is not None)
    draw = torch.Generator().manual_seed(3)
    p, residual = torch.randn(d, c, 1, 1, generator=draw), torch.randn(n, d, 17, 18, generator=draw).to(dtype)
    biases = torch.randn(c, generator=draw), torch.randn(d, generator=draw)
    around = (scale, shift, pooled(upsampled(residual, upsample), pool))
    options = (upsample, pool, False, normalise, True, 1e-5)
    results = []
    for count, ready in itertools.product((1, 2, 3, 7), (None, packed(p, dtype))):
        with threads(count):
            y = torch.ops.raccgan.depthwise_separable_native(
                x, w.float(), biases[0], p, biases[1], *around, ready, *options
            )
        results.append(y)
    u = torch.ops.raccgan.depthwise_native(x, w.float(), scale, shift, *options) + biases[0].to(dtype).view(-1, 1, 1)
    wanted = product(u, p, biases[1], around[2])
    assert_close(results[0], wanted, 4 * torch.finfo(dtype).eps)
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_the_one_call_is_a_good_op_and_refuses() -> None:
    op = torch.ops.raccgan.depthwise_separable_native
    x, w, bias, p = torch.randn(2, 3, 4, 6), torch.randn(3, 1, 3, 3), torch.randn(3), torch.randn(5, 3, 1, 1)
    options = (1, 2, True, True, True, 1e-5)
    for given in ((x, w, bias, p, torch.randn(5)), (x.bfloat16(), w, None, p, None)):
        residual = torch.randn(2, 5, 2, 3, dtype=given[0].dtype)
        torch.library.opcheck(op.default, (*given, None, None, residual, None, *options))
    for arguments, message in [
        ((x, w, bias[:2], p, None), r"the depthwise bias must be float32 \[C\]"),
        ((x, w, bias, p, bias), r"the bias must be float32 \[D\]"),
        ((x, w, bias, p[:, :2], None), "x must have as many channels as w has columns, 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, None, None, None, None, *options)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_nothing_in_is_zeros_out(shape: tuple[int, int, int, int]) -> None:
    tensors = made(*shape, 5, affine=True)
    y, grad_x, grad_w, *_ = all_orders(depthwise, tensors, torch.float32)
    assert y.shape == grad_x.shape == shape
    assert not grad_w.any()


def test_what_the_kernels_refuse() -> None:
    x, w, one = torch.zeros(2, 3, 4, 4), torch.zeros(3, 1, 3, 3), torch.ones(2, 3)
    for arguments, message in [
        ((x, torch.zeros(3, 1, 9, 9)), "3, 5 or 7, got 9"),
        ((x, torch.zeros(4, 1, 3, 3)), r"w must be \[C, 1, k, k\]"),
        ((x, torch.zeros(3, 1, 5, 3)), r"w must be \[C, 1, k, k\]"),
        ((x, torch.zeros(3)), r"w must be \[C, 1, k, k\]"),
        ((x, w, Prologue(scale=one)), "both scale and shift"),
        ((x, w, Prologue(scale=one[:1], shift=one[:1])), r"scale and shift must be \[N, C\]"),
        ((x, w, Prologue(), Resize(2, 2)), "not both 2"),
        ((x, w, Prologue(), Resize(3)), "must be 1 or 2"),
        ((x.double(), w.double()), "x must be float32 or bfloat16"),
        ((x[0], w), r"x must be \[N, C, H, W\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            depthwise(*arguments)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        moments(x.double())


@pytest.mark.parametrize("kernels", ["fused", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_autocast_and_what_is_left_to_pytorch(dtype: torch.dtype, k: int, kernels: str) -> None:
    x, w, scale, shift = (None if t is None else t.float() for t in made(2, 4, 6, 6, k, affine=True))
    assert x is not None
    assert w is not None
    weights, prologue = Weights(w, None, torch.randn(5, 4, 1, 1), None), Prologue(False, "instance", 1e-5, scale, shift)
    with torch.autocast("cpu", dtype=dtype):
        beside = depthwise_separable(x, weights, prologue, Resize(pool=2), kernels="pytorch")
        if kernels == "native" and (k == 9 or dtype == torch.float16):
            with pytest.raises(dispatch.KernelError, match=r"are 1x1, 3x3, 5x5, 7x7, not 9x9|not torch\.float16"):
                depthwise_separable(x, weights, prologue, Resize(pool=2), kernels=kernels)
            return
        got = depthwise_separable(x, weights, prologue, Resize(pool=2), kernels=kernels)
    assert got.dtype == beside.dtype == dtype
    assert_close(got, beside, 0.02)
