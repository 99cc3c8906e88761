"""The Triton kernels of the depthwise-separable family, beyond what the shared grid holds them to.

On a GPU where there is one, on the PTX machine (tests/ptx) otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import backend
from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable import (
    depthwise_separable_with_statistics,
    reference,
    rewritten,
    triton,
    triton_launch,
    triton_ops,
    triton_separable,
)
from raccgan.kernels.depthwise_separable.reference import activated
from raccgan.kernels.depthwise_separable.triton_ops import Geometry, Prologue
from tests.kernels.compare import allowed_beside, assert_all_close, assert_close, assert_finite
from tests.kernels.grid import FAMILIES, Inputs, OwnOps, leaves, tensors
from tests.kernels.test_grid import first_order, poisoned, second_order, through_penalty
from tests.kernels.variations import LAYOUTS, laid_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = triton.can_run(backend.Call(DEVICE, torch.float32, (1, 1, 1, 1)))

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PLAIN, UP, POOLED = Geometry(), Geometry(up=2), Geometry(stride=2)
GEOMETRIES = {"plain": PLAIN, "up": UP, "pooled": POOLED}
PROLOGUES: dict[str, dict[str, bool]] = {
    "nothing": {},
    "relu": {"rectify": True},
    "affine": {"affine": True},
    "all": {"affine": True, "rectify_first": True, "rectify": True},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def inputs_of(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return FAMILIES["depthwise_separable"].inputs(case, dtype, DEVICE.type)


def made(n: int, c: int, h: int, w: int, k: int, *, affine: bool = False) -> list[Tensor | None]:
    """x, depthwise weight, scale and shift in float64."""
    around = [1 + normal(3, n, c) / 4, normal(4, n, c) / 4] if affine else [None, None]
    return [normal(1, n, c, h, w), normal(2, c, 1, k, k) / k, *around]


def definition(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, geometry: Geometry, first: bool, last: bool
) -> Tensor:
    """D(phi(x), w) of PyTorch's operations; w is what stands before the fold."""
    relu = {True: "relu", False: "none"}
    x = activated(x, relu[first], "none", 0, scale, shift, relu[last])
    return rewritten.resized(rewritten.Depthwise.apply(rewritten.resized(x, geometry.up, 1), w), 1, geometry.stride)


def ours(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, geometry: Geometry, first: bool, last: bool
) -> Tensor:
    h, v = (side * geometry.up // geometry.stride for side in x.shape[2:])
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    w = triton_ops.resized(w.float(), geometry)
    return triton_ops.depthwise(x, w, geometry, h, v, Prologue(scale, shift, None, first, last))


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
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_derivative_to_third_order(shape: tuple[int, ...], k: int, geometry: str, prologue: str) -> None:
    flags = dict(PROLOGUES[prologue])
    tensors = made(*shape, k, affine=flags.pop("affine", False))
    options = (GEOMETRIES[geometry], flags.get("rectify_first", False), flags.get("rectify", False))
    with poisoned():
        got = all_orders(ours, tensors, torch.float32, *options)
    wanted = all_orders(definition, tensors, torch.float64, *options)
    beside = all_orders(definition, tensors, torch.float32, *options)
    for a, b, c in zip(got, wanted, beside, strict=True):  # a sum to one number may cancel: hence the floor
        assert_close(a, b, allowed_beside(c, b, least=1e-5))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("geometry", ["plain", "pooled"])
def test_every_derivative_through_an_instance_norm(geometry: str, affine: bool) -> None:
    def exact(x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        x = activated(x, "relu", "instance", 1e-3, scale, shift, "relu")
        return definition(x, w, None, None, GEOMETRIES[geometry], False, False)

    def normalised(x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        h, v = (side // GEOMETRIES[geometry].stride for side in x.shape[2:])
        w = triton_ops.resized(w, GEOMETRIES[geometry])
        prologue = Prologue(scale, shift, None, True, True)
        return triton_separable.normalised(x, w, GEOMETRIES[geometry], h, v, prologue, 1e-3)

    tensors = made(2, 2, 3, 5, 3, affine=affine)
    with poisoned():
        got = all_orders(normalised, tensors, torch.float32)
    wanted = all_orders(exact, tensors, torch.float64)
    beside = all_orders(exact, tensors, torch.float32)
    for a, b, c in zip(got, wanted, beside, strict=True):
        assert_close(a, b, allowed_beside(c, b, least=1e-5))


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("large", [1e6, 2.0**55])
def test_a_blank_image_is_its_shift_however_far_from_zero(
    large: float, one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is zero, so the numbers that are added to it must not have been added to large ones before."""
    monkeypatch.setattr(triton, "fuses", lambda *_: one_kernel)

    def orders(kernels: str, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = inputs_of("encoder", dtype)
        inputs["x"] = torch.full_like(inputs["x"], large)
        inputs["activation"] = "none"
        family = FAMILIES["depthwise_separable"]
        (y,) = family.run(kernels, inputs)
        first, second = first_order(family, kernels, inputs), through_penalty(family, kernels, inputs)
        return {"y": y, **first, **{f"second of {name}": g for name, g in second.items()}}

    got, wanted = orders("triton", torch.float32), orders("reference", torch.float64)
    for name in wanted:
        assert_finite(got[name], name)
        if wanted[name].abs().max() > 1e-3:
            assert_close(got[name], wanted[name], 1e-5, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_half_precision_is_float32_rounded(geometry: str, dtype: torch.dtype) -> None:
    tensors = [None if t is None else t.to(dtype).double() for t in made(2, 3, 3, 4, 3, affine=True)]
    got = all_orders(ours, tensors, dtype, GEOMETRIES[geometry], True, True, orders=1)
    wide = all_orders(ours, tensors, torch.float32, GEOMETRIES[geometry], True, True, orders=1)
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
        mean, var = triton_ops.moments(image, True)
        results.append([y, *first, *torch.autograd.grad(first[0].square().sum(), inputs[1:3]), mean, var])
    assert_all_close(*results, 1e-5)


@pytest.mark.parametrize("rectify_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 2, 3), (1, 1, 60, 70), (2, 2, 1, 1)])
def test_moments_far_from_zero(shape: tuple[int, ...], rectify_first: bool) -> None:
    """To second order, with a mean of a hundred deviations: no cancellation."""

    def exact(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.relu() if rectify_first else x
        return x.mean(dim=(2, 3)), x.var(dim=(2, 3), correction=0)

    def orders(run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        mean, var = run(x)
        value = (mean * normal(2, *mean.shape).to(x.dtype)).sum() + (var.square() * normal(3, *var.shape)).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return [mean, var, first, *torch.autograd.grad((first * normal(4, *first.shape)).sum(), x)]

    x = (normal(1, *shape) + (0 if rectify_first else 100)).float()
    got = orders(lambda t: triton_ops.moments(t, rectify_first), x)
    for a, b in zip(got, orders(exact, x.double()), strict=True):
        assert_close(a, b, 1e-5, absolute=1e-9)


@pytest.mark.parametrize("order", [first_order, second_order, through_penalty])
@pytest.mark.parametrize("case", ["generator", "encoder", "affine, pooled", "skip, no bias", "odd, pooled", "one"])
def test_one_kernel_gives_what_two_do(case: str, order: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "fuses", lambda *_: True)
    family = FAMILIES["depthwise_separable"]
    inputs = inputs_of(case)
    with poisoned():
        (y,) = family.run("triton", inputs)
        got = {"y": y, **order(family, "triton", inputs)}
    exact, plain = inputs_of(case, torch.float64), inputs_of(case)
    wanted = {"y": family.run("reference", exact)[0], **order(family, "reference", exact)}
    beside = {"y": family.run("reference", plain)[0], **order(family, "reference", plain)}
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name in wanted:
        allowed = allowed_beside(beside[name], wanted[name])
        assert_close(got[name], wanted[name], allowed, absolute=1e-5, what=name)


def fused(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor, residual: Tensor, geometry: Geometry, statistics: bool
) -> Any:
    h, v = residual.shape[2:]
    prologue = Prologue(rectify=True)
    return triton_separable.separable(x, w, pointwise, bias, residual, geometry, h, v, prologue, statistics)


def composed(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor, residual: Tensor, geometry: Geometry, _: bool
) -> Any:
    padding = (w.shape[-1] - 1) // 2
    if geometry.up == 2:
        y = torch.nn.functional.conv_transpose2d(
            x.relu(), w.flip(2, 3), stride=2, padding=w.shape[-1] - 2 - padding, groups=x.shape[1]
        )
    else:
        y = torch.nn.functional.conv2d(x.relu(), w, stride=geometry.stride, padding=padding, groups=x.shape[1])
    y = torch.nn.functional.conv2d(y[:, :, : residual.shape[2], : residual.shape[3]], pointwise[:, :, None, None], bias)
    y = y + residual
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, wide.sum(dim=(2, 3)), wide.square().sum(dim=(2, 3)), wide.amax(dim=(2, 3))


@pytest.mark.parametrize("dtype", runtime.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("geometry", "k", "d", "h", "v"), [("plain", 3, 5, 5, 7), ("up", 4, 17, 10, 14), ("pooled", 4, 3, 2, 3)]
)
def test_statistics_of_the_epilogue_and_their_gradients(
    geometry: str, k: int, d: int, h: int, v: int, dtype: torch.dtype
) -> None:
    tensors = [
        normal(1, 2, 20, 5, 7), normal(2, 20, 1, k, k) / k, normal(3, d, 20) / 4, normal(4, d), normal(5, 2, d, h, v),
    ]  # fmt: skip
    tensors = [t.to(dtype if i in (0, 2, 4) else torch.float32).double() for i, t in enumerate(tensors)]

    def orders(run: Callable[..., Any], half: torch.dtype, full: torch.dtype) -> list[Tensor]:
        inputs = [t.to(half if i in (0, 2, 4) else full).requires_grad_() for i, t in enumerate(tensors)]
        outputs = run(*inputs, GEOMETRIES[geometry], True)
        value = sum((o.double() * normal(7 + i, *o.shape)).sum() for i, o in enumerate(outputs))
        first = torch.autograd.grad(value, inputs, create_graph=True)
        return [
            *outputs,
            *first,
            *torch.autograd.grad(first[0].double().square().sum(), inputs, materialize_grads=True),
        ]

    with poisoned():
        got = orders(fused, dtype, torch.float32)
    allowed = 2e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert_all_close(got, orders(composed, torch.float64, torch.float64), allowed)


def test_nan_reaches_every_statistic() -> None:
    x = torch.zeros(1, 2, 4, 4, device=DEVICE)
    x[0, 0, 1, 1] = torch.nan
    arguments = (x, ones(2, 1, 3, 3), ones(3, 2), None, None, PLAIN, 4, 4, Prologue(rectify=True))
    y, *statistics = triton_separable.separable(*arguments, statistics=True)
    assert y.isnan().any()
    assert all(t.isnan().all() for t in statistics)
    assert [t.numel() for t in triton_separable.separable(*arguments)[1:]] == [0, 0, 0]


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("case", ["discriminator, second", "skip"])
def test_statistics_beside_the_result(case: str, one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "fuses", lambda *_: one_kernel)
    inputs, found = inputs_of(case), list[Tensor]()
    y = triton.depthwise_separable(*inputs.values(), statistics=found)
    assert_all_close(found, reference.statistics(y), 1e-5)


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("case", ["discriminator, second", "generator"])
def test_the_public_statistics_to_both_orders(case: str, one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the epilogue where one kernel serves, from another read of the result where two do."""

    def orders(kernels: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = leaves(inputs_of(case, dtype))
        weights, options = list(inputs.values())[:5], dict(list(inputs.items())[5:])
        y, statistics = depthwise_separable_with_statistics(*weights, **options, kernels=kernels)
        outputs, given = [y, *statistics], list(tensors(inputs).values())
        value = sum((o * normal(7 + i, *o.shape).to(o.dtype)).sum() for i, o in enumerate(outputs))
        first = torch.autograd.grad(value, given, create_graph=True)
        return [*outputs, *first, *torch.autograd.grad(first[0].square().sum(), given, materialize_grads=True)]

    wanted = orders("reference", torch.float64)
    monkeypatch.setattr(triton, "fuses", lambda *_: one_kernel)
    read_again = []
    monkeypatch.setattr(
        triton, "reference", SimpleNamespace(statistics=lambda y: read_again.append(y) or reference.statistics(y))
    )
    with poisoned():
        got = orders("triton", torch.float32)
    assert bool(read_again) != one_kernel
    assert_all_close(got, wanted, 1e-4)


def test_a_residual_of_another_dtype_or_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "fuses", lambda *_: True)
    inputs = inputs_of("affine, pooled")
    wanted = triton.depthwise_separable(*inputs.values())
    wide = triton.depthwise_separable(*{**inputs, "residual": inputs["residual"].double()}.values())
    assert wide.dtype == torch.float64
    assert_close(wide, wanted, 1e-6)
    with pytest.raises(RuntimeError, match="expand"):
        triton.depthwise_separable(*{**inputs, "residual": inputs["residual"][..., :-1]}.values())
    with pytest.raises(RuntimeError, match="expand"):
        triton.depthwise_separable(*{**inputs, "pointwise_bias": ones(2), "depthwise_bias": None}.values())


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (1, 4, 1, 1)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nothing_in_is_nothing_out(shape: tuple[int, ...], geometry: str) -> None:
    tensors = made(*shape, 3, affine=True)
    with poisoned():
        got = all_orders(ours, tensors, torch.float32, GEOMETRIES[geometry], True, True)
    wanted = all_orders(ours, tensors, torch.float32, GEOMETRIES[geometry], True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    if 0 in got[0].shape:
        assert not any(t.any() for t in got)
    inputs = inputs_of("discriminator")
    inputs["x"] = torch.zeros(shape[0], 3, *shape[2:], device=DEVICE, requires_grad=True)
    y = triton.depthwise_separable(*inputs.values())
    y.sum().backward()
    assert inputs["x"].grad.shape == inputs["x"].shape


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
    for run in (
        lambda t: triton_ops.depthwise(t, w, PLAIN, 5, 4),
        lambda t: triton_ops.correlation(t, near, 3, PLAIN),
        lambda t: triton_ops.correlation(near, t, 3, PLAIN),
        lambda t: triton_ops.moments(t, False)[1],
        lambda t: triton_ops.tangent(t, None, None, None, None, t, Prologue(rectify=True)),
        lambda t: triton_separable.separable(t, w, ones(3, 3).half(), None, t, PLAIN, 5, 4, Prologue())[0],
    ):
        assert_close(run(x), run(near), 1e-3)


def test_opcheck_of_every_op() -> None:
    x, w, scale, shift = (t.float() for t in made(2, 3, 4, 5, 3, affine=True) if t is not None)
    q = triton_ops.resized(w, UP)
    g = x.relu()
    for op, arguments in (
        (triton_ops._depthwise, (x, w, scale, shift, None, 1, 1, 4, 5, True, True)),
        (triton_ops._depthwise, (x, q, None, None, None, 1, 2, 8, 10, False, False)),
        (triton_ops._correlation, (x, g, scale, shift, shift, 3, 1, 1, True, True)),
        (triton_ops._adjoint, (g, w, g, scale, x, scale, shift, shift, 1, 1, True, True, True, True, True)),
        (triton_ops._adjoint, (x, w, None, None, x, None, None, None, 1, 1, False, True, False, True, False)),
        (triton_ops._cotangent, (g, x, scale, x, scale, shift, shift, True, True, True, True, True)),
        (triton_ops._cotangent, (g, None, None, x, None, None, None, False, True, False, True, False)),
        (triton_ops._tangent, (x, scale, shift, g, shift, x, scale, shift, shift, True, True, True)),
        (triton_ops._tangent, (None, None, shift, None, None, x, None, None, None, False, True, False)),
        (triton_ops.moments, (x, True)),
        (triton_separable._normalised, (x, w, scale, shift, 1, 1, 4, 5, True, True, 1e-3)),
        (triton_separable._separable, (x, w, ones(4, 3), None, scale, shift, None, None, 1, 1, 4, 5, True, True, True)),
    ):
        fresh = tuple(a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(op, fresh)


@pytest.mark.parametrize("one_kernel", [False, True])
def test_exported_and_compiled(one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "fuses", lambda *_: one_kernel)
    family = FAMILIES["depthwise_separable"]
    inputs = inputs_of("discriminator, second")
    order = list(inputs)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            given = {**inputs, "x": x, "depthwise_weight": w}
            return triton.depthwise_separable(*(given[name] for name in order))

    arguments = (inputs["x"], inputs["depthwise_weight"])
    (wanted,) = family.run("triton", inputs)
    torch._dynamo.reset()
    exported = torch.export.export(Layer(), arguments).module()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(exported(*arguments), wanted)
    assert torch.equal(compiled(*arguments), wanted)


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_compiled_without_gradients_under_either_flag(flag: str) -> None:
    """Compiled, float32 is two kernels whatever the flag says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    inputs = inputs_of("plain")
    torch._dynamo.reset()
    try:
        matmul.fp32_precision = flag
        with torch.no_grad():
            compiled = torch.compile(
                lambda *arguments: triton.depthwise_separable(*arguments), fullgraph=True, backend="aot_eager"
            )
            got, wanted = compiled(*inputs.values()), triton.depthwise_separable(*inputs.values())
        assert_close(got, wanted, 1e-5 if flag == "ieee" else 2e-3)
    finally:
        matmul.fp32_precision = before


def test_autocast() -> None:
    inputs = inputs_of("encoder")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got, beside = triton.depthwise_separable(*inputs.values()), rewritten.depthwise_separable(*inputs.values())
    assert got.dtype == beside.dtype == torch.bfloat16
    assert_close(got, beside, 0.03)


def test_only_what_is_asked_for_is_computed() -> None:
    """A penalty's first backward pass goes to the image: no gradient of a weight is computed on the way."""
    x, w = (t.float().requires_grad_() for t in made(1, 2, 4, 4, 3) if t is not None)
    y = ours(x * 1, w * 1, None, None, PLAIN, False, True)
    with OwnOps() as own:
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert "raccgan::depthwise_triton_adjoint" in own.names
    assert "raccgan::depthwise_triton_correlation" not in own.names
    with OwnOps() as own:
        torch.autograd.grad(y.sum(), w)
    assert "raccgan::depthwise_triton_correlation" in own.names


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel where its operand is computed about once and nothing else needs it; PyTorch's product elsewhere."""

    def fuses(dtype: torch.dtype, k: int, d: int, geometry: Geometry, learns: bool = False) -> bool:
        weight = torch.empty(d, 1, 1, 1, dtype=dtype, requires_grad=learns)
        return triton.fuses(torch.empty(1, 64, 1, 1, dtype=dtype), weight, k, d, geometry)

    half = torch.bfloat16
    for k, d, geometry, one_kernel in (
        (7, 256, UP, True), (3, 256, PLAIN, True), (3, 384, PLAIN, True), (7, 384, UP, True),
        (7, 384, PLAIN, False), (3, 768, PLAIN, False),
    ):  # fmt: skip
        assert fuses(half, k, d, geometry) == one_kernel
    assert not fuses(half, 3, 64, PLAIN, learns=True)
    assert not fuses(torch.float32, 3, 64, PLAIN)
    with torch.no_grad():
        assert fuses(half, 3, 64, PLAIN, learns=True)
        monkeypatch.setattr(triton_launch, "precision", lambda: "tf32")
        assert fuses(torch.float32, 3, 64, PLAIN)


def test_tf32_where_the_flags_allow_it() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for said, wanted in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = said
            assert triton_launch.precision() == wanted
    finally:
        matmul.fp32_precision = before


def test_strips_reach_every_position_once() -> None:
    """Sizes around the tiles, where a mask that is wrong by one writes twice or not at all."""
    for h, v, c in itertools.product((1, 4, 5), (1, 16, 17), (1, 65)):
        x, w = normal(1, 1, c, h, v).float(), normal(2, c, 1, 3, 3).float()
        with poisoned():
            got = triton_ops.depthwise(x, w, PLAIN, h, v)
        assert_close(got, definition(x, w, None, None, PLAIN, False, False), 1e-5)
