"""The registered ops of the depthwise-separable convolution in Triton, beyond what the shared grid holds them to.

On a GPU where there is one, on the PTX machine (tests/ptx) otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable import Prologue, apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.convolutions import Depthwise
from raccgan.kernels.depthwise_separable.triton import fused as fusing
from raccgan.kernels.depthwise_separable.triton import norm, ops
from raccgan.kernels.depthwise_separable.triton.launch import (
    NO_AFFINE,
    NO_TERM,
    PLAIN,
    Affine,
    Convolution,
    Stride,
    Term,
)
from raccgan.kernels.dispatch import Call
from tests.kernels.compare import allowed_beside, assert_all_close, assert_close
from tests.kernels.grid import OwnOps
from tests.kernels.test_grid import poisoned
from tests.kernels.variations import LAYOUTS, laid_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = runtime.supports(Call(DEVICE, torch.float32))

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

UP, POOLED = Stride(up=2), Stride(down=2)
STRIDES = {"plain": PLAIN, "up": UP, "pooled": POOLED}
PROLOGUES: dict[str, dict[str, bool]] = {
    "nothing": {},
    "relu": {"relu": True},
    "affine": {"affine": True},
    "all": {"affine": True, "pre_relu": True, "relu": True},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def made(n: int, c: int, h: int, w: int, k: int, *, affine: bool = False) -> list[Tensor | None]:
    """x, depthwise weight, scale and shift in float64."""
    around = [1 + normal(3, n, c) / 4, normal(4, n, c) / 4] if affine else [None, None]
    return [normal(1, n, c, h, w), normal(2, c, 1, k, k) / k, *around]


def definition(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, stride: Stride, pre_relu: bool, relu: bool
) -> Tensor:
    """D(phi(x), w) of PyTorch's operations; w is what stands before the fold."""
    x = apply_prologue(x, Prologue(pre_relu, scale=scale, shift=shift, relu=relu))
    return pooled(Depthwise.apply(upsampled(x, stride.up), w), stride.down)


def ours(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, stride: Stride, pre_relu: bool, relu: bool
) -> Tensor:
    height, width = (side * stride.up // stride.down for side in x.shape[2:])
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    return ops.depthwise(x, ops.resized(w.float(), stride), height, width, Affine(scale, shift, None, pre_relu, relu))


def all_orders(
    run: Callable[..., Tensor], tensors: Sequence[Tensor | None], dtype: torch.dtype, *options: Any, orders: int = 3
) -> list[Tensor]:
    """The output, the gradients of all tensors, those of all of them through all of those, and third ones of x's."""
    inputs = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    given = [t for t in inputs if t is not None]
    y = run(*inputs, *options)
    g = normal(5, *y.shape).to(dtype).requires_grad_()
    first = torch.autograd.grad(y, given, g, create_graph=True, materialize_grads=True)
    if orders == 1:
        return [y, *first]
    value = sum((one * normal(6 + i, *one.shape).to(dtype)).sum() for i, one in enumerate(first))
    second = torch.autograd.grad(value, [*given, g], create_graph=True, materialize_grads=True)
    third = torch.autograd.grad(second[0].square().sum() + second[1].sum(), [*given, g], materialize_grads=True)
    return [y, *first, *second, *third]


@pytest.mark.parametrize(
    ("shape", "k", "prologue"),
    [*(((2, 2, 3, 5), 3, prologue) for prologue in PROLOGUES), ((1, 2, 5, 2), 5, "all"), ((1, 1, 2, 6), 7, "all"),
     ((1, 2, 3, 2), 1, "all")],
)  # fmt: skip
@pytest.mark.parametrize("stride", STRIDES)
def test_every_derivative_to_third_order(shape: tuple[int, ...], k: int, stride: str, prologue: str) -> None:
    flags = dict(PROLOGUES[prologue])
    tensors = made(*shape, k, affine=flags.pop("affine", False))
    options = (STRIDES[stride], flags.get("pre_relu", False), flags.get("relu", False))
    with poisoned():
        got = all_orders(ours, tensors, torch.float32, *options)
    wanted = all_orders(definition, tensors, torch.float64, *options)
    beside = all_orders(definition, tensors, torch.float32, *options)
    for a, b, c in zip(got, wanted, beside, strict=True):  # a sum to one number may cancel: hence the floor
        assert_close(a, b, allowed_beside(c, b, least=1e-5))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("stride", ["plain", "pooled"])
def test_every_derivative_through_an_instance_norm(stride: str, affine: bool) -> None:
    def exact(x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        x = apply_prologue(x, Prologue(True, "instance", 1e-3, scale, shift, True))
        return definition(x, w, None, None, STRIDES[stride], False, False)

    def normalised(x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        height, width = (side // STRIDES[stride].down for side in x.shape[2:])
        convolution, affine = ops.resized(w, STRIDES[stride]), Affine(scale, shift, None, True, True)
        return norm.normalised(x, convolution, height, width, affine, 1e-3)

    tensors = made(2, 2, 3, 5, 3, affine=affine)
    with poisoned():
        got = all_orders(normalised, tensors, torch.float32)
    wanted = all_orders(exact, tensors, torch.float64)
    beside = all_orders(exact, tensors, torch.float32)
    for a, b, c in zip(got, wanted, beside, strict=True):
        assert_close(a, b, allowed_beside(c, b, least=1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", STRIDES)
def test_half_precision_is_float32_rounded(stride: str, dtype: torch.dtype) -> None:
    tensors = [None if t is None else t.to(dtype).double() for t in made(2, 3, 3, 4, 3, affine=True)]
    got = all_orders(ours, tensors, dtype, STRIDES[stride], True, True, orders=1)
    wide = all_orders(ours, tensors, torch.float32, STRIDES[stride], True, True, orders=1)
    assert_close(got[0], wide[0].to(dtype), torch.finfo(dtype).eps)
    assert_all_close(got, wide, 0.05)


@pytest.mark.parametrize(("c", "layout"), [*itertools.product((1, 3), LAYOUTS[1:]), (70, "channels_last")])
def test_layouts_change_rounding_at_most(c: int, layout: str) -> None:
    """Every op reads every layout: the strips differ, and with them the order of a sum."""
    x, w, scale, shift = made(2, c, 5, 3, 3, affine=True)
    assert x is not None
    with DEVICE:
        dense = laid_out(x.float(), layout).clone(memory_format=torch.contiguous_format)
        given = laid_out(x.float(), layout)
        upper = laid_out(normal(5, *x.shape).float(), layout)
    results = []
    for image in (dense, given):
        inputs = [t.detach().float().requires_grad_() for t in (image, w, scale, shift) if t is not None]
        y = ours(*inputs, PLAIN, True, True)
        assert y.is_contiguous(memory_format=torch.channels_last)
        first = torch.autograd.grad(y, inputs, upper, create_graph=True)
        mean, var = norm.moments(image, True)
        results.append([y, *first, *torch.autograd.grad(first[0].square().sum(), inputs[1:3]), mean, var])
    assert_all_close(*results, 1e-5)


@pytest.mark.parametrize("pre_relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 2, 3), (1, 1, 60, 70), (2, 2, 1, 1)])
def test_moments_far_from_zero(shape: tuple[int, ...], pre_relu: bool) -> None:
    """To second order, with a mean of a hundred deviations: no cancellation."""

    def exact(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.relu() if pre_relu else x
        return x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)

    def orders(run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        mean, var = run(x)
        value = (mean * normal(2, *mean.shape).to(x.dtype)).sum() + (var.square() * normal(3, *var.shape)).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return [mean, var, first, *torch.autograd.grad((first * normal(4, *first.shape)).sum(), x)]

    x = (normal(1, *shape) + (0 if pre_relu else 100)).float()
    got = orders(lambda t: norm.moments(t, pre_relu), x)
    for a, b in zip(got, orders(exact, x.double()), strict=True):
        assert_close(a, b, 1e-5, absolute=1e-9)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (1, 4, 1, 1)])
@pytest.mark.parametrize("stride", STRIDES)
def test_nothing_in_is_nothing_out(shape: tuple[int, ...], stride: str) -> None:
    tensors = made(*shape, 3, affine=True)
    with poisoned():
        got = all_orders(ours, tensors, torch.float32, STRIDES[stride], True, True)
    wanted = all_orders(ours, tensors, torch.float32, STRIDES[stride], True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    if 0 in got[0].shape:
        assert not any(t.any() for t in got)


def test_bits_are_the_same_every_time_and_in_any_batch() -> None:
    tensors = made(3, 5, 4, 6, 3, affine=True)
    alone = [None if t is None or i == 1 else t[1:2] for i, t in enumerate(tensors)]
    alone[1] = tensors[1]
    results = [all_orders(ours, given, torch.float32, PLAIN, False, True)[0] for given in (tensors, tensors, alone)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][1:2], results[2])


def test_offsets_beyond_two_to_the_31() -> None:
    """A sample that begins 2^31 elements behind the one before it; pages that nothing touches take no memory."""
    far = torch.empty(2**31 + 2**20, dtype=torch.float16, device=DEVICE)
    x = far.as_strided((2, 3, 5, 4), (2**31 + 5, 1, 12, 3))
    x.copy_(normal(1, *x.shape))
    w = normal(2, 3, 1, 3, 3).float()
    near = x.contiguous()
    convolution = Convolution(w)
    for run in (
        lambda t: ops.depthwise(t, convolution, 5, 4),
        lambda t: ops.correlation(t, near, 3, PLAIN),
        lambda t: ops.correlation(near, t, 3, PLAIN),
        lambda t: norm.moments(t, False)[1],
        lambda t: ops.jvp(Term(t), NO_TERM, None, t, Affine(relu=True)),
        lambda t: fusing.fused(t, convolution, ones(3, 3).half(), None, t, NO_AFFINE, (5, 4)),
    ):
        assert_close(run(x), run(near), 1e-3)


def test_opcheck_of_every_op() -> None:
    x, w, scale, shift = (t.float() for t in made(2, 3, 4, 5, 3, affine=True) if t is not None)
    q = ops.resized(w, UP).w
    g = x.relu()
    bare, affine = (None, None, None), (scale, shift, shift)
    for registered, arguments in (
        (ops._depthwise, (x, w, scale, shift, None, True, True, 1, 1, 4, 5)),
        (ops._depthwise, (x, q, *bare, False, False, 1, 2, 8, 10)),
        (ops._correlation, (x, g, *affine, True, True, 3, 1, 1)),
        (ops._vjp, (g, w, g, scale, x, *affine, True, True, 1, 1, True, True, True)),
        (ops._vjp, (x, w, None, None, x, *bare, False, True, 1, 1, False, True, False)),
        (ops._vjp, (g, None, x, scale, x, *affine, True, True, 1, 1, True, True, True)),
        (ops._vjp, (g, None, None, None, x, *bare, False, True, 1, 1, False, True, False)),
        (ops._jvp, (x, scale, shift, g, shift, x, *affine, True, True, True)),
        (ops._jvp, (None, None, shift, None, None, x, *bare, False, True, False)),
        (norm.moments, (x, True)),
        (norm._normalised, (x, w, scale, shift, True, True, 1, 1, 4, 5, 1e-3)),
        (fusing._fused, (x, w, ones(4, 3), None, None, scale, shift, None, True, True, 1, 1, 4, 5)),
    ):
        fresh = tuple(a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(registered, fresh)


def test_only_what_is_asked_for_is_computed() -> None:
    """A penalty's first backward pass goes to the image: no gradient of a weight is computed on the way."""
    x, w = (t.float().requires_grad_() for t in made(1, 2, 4, 4, 3) if t is not None)
    y = ours(x * 1, w * 1, None, None, PLAIN, False, True)
    with OwnOps() as own:
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert "raccgan::depthwise_triton_vjp" in own.names
    assert "raccgan::depthwise_triton_correlation" not in own.names
    with OwnOps() as own:
        torch.autograd.grad(y.sum(), w)
    assert "raccgan::depthwise_triton_correlation" in own.names


def test_strips_reach_every_position_once() -> None:
    """Sizes around the tiles, where a mask that is wrong by one writes twice or not at all."""
    for h, v, c in itertools.product((1, 4, 5), (1, 16, 17), (1, 65)):
        x, w = normal(1, 1, c, h, v).float(), normal(2, c, 1, 3, 3).float()
        with poisoned():
            got = ops.depthwise(x, Convolution(w), h, v)
        assert_close(got, definition(x, w, None, None, PLAIN, False, False), 1e-5)
