"""Every check can fail: a fault is planted in a backend's result or gradient, and the check has to find it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure
from raccgan.kernels import library
from tests.kernels import test_cbam_native, test_depthwise_separable_native, test_grid, test_pointwise_native
from tests.kernels.compare import (
    allowed_beside,
    assert_all_close,
    assert_close,
    assert_each_close,
    largest,
    relative_error,
)
from tests.kernels.grid import FAMILIES, Family, Inputs, skip_unless_served, tensors
from tests.kernels.random_cases import Case, all_orders, runs
from tests.kernels.rounding import Results
from tests.kernels.test_random import Tally, exact_results

FAULTS = {
    "nan": lambda t: _changed(t, lambda number: torch.nan),
    "infinity": lambda t: _changed(t, lambda number: torch.inf),
    "wrong": lambda t: _changed(t, lambda number: 1.01 * number + 0.01),
    "all nan": lambda t: torch.full_like(t, torch.nan),
}
"""What a kernel could do: one place it never wrote, one where it overflowed, one it got wrong, a buffer left alone."""

Fault = Callable[[Tensor], Tensor]
NATIVE = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def _changed(t: Tensor, change: Callable[[float], float]) -> Tensor:
    """The largest number of a tensor is another one."""
    t = t.detach().clone(memory_format=torch.contiguous_format)
    if t.numel():
        place = t.abs().argmax()
        t.view(-1)[place] = change(float(t.view(-1)[place]))
    return t


class _Planted(torch.autograd.Function):
    """Its result is the tensor; its derivative of the given order has a fault."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, order: int, fault: Fault) -> Tensor:
        ctx.order, ctx.fault = order, fault
        return fault(t) if order == 0 else t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (_Planted.apply(g, ctx.order - 1, ctx.fault) if ctx.order > 0 else g), None, None


@dataclass(frozen=True)
class Faulty(Family):
    """A family whose backends have a fault in the output (order 0), x's gradient (1) or its second one (2)."""

    order: int = 0
    fault: Fault = FAULTS["nan"]
    right: tuple[str, ...] = ("reference",)

    def run(self, implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        if implementation in self.right:
            return super().run(implementation, inputs)
        if self.order > 0:
            x = next(iter(tensors(inputs)))
            inputs = {**inputs, x: _Planted.apply(inputs[x], self.order, self.fault)}
        outputs = super().run(implementation, inputs)
        return (_Planted.apply(outputs[0], 0, self.fault), *outputs[1:]) if self.order == 0 else outputs


def faulty(family: str, order: int, fault: str) -> tuple[Faulty, str]:
    """The family with a fault, and a backend of it that serves float32 here."""
    good = FAMILIES[family]
    made = Faulty(**vars(good), order=order, fault=FAULTS[fault])
    for name in good.implementations:
        with contextlib.suppress(pytest.skip.Exception):
            skip_unless_served(good, name, good.inputs(next(iter(good.cases)), torch.float32))
            if name != "reference":
                return made, name
    pytest.skip(f"no backend but the reference serves {family} here")


def grid_checks(family: Family, name: str, order: int) -> list[Callable[[], None]]:
    """The grid's tests that must find a fault of that order, at the family's first case."""
    case, device, dtype = next(iter(family.cases)), "cpu", torch.float32
    if order == 0:
        return [lambda: test_grid.test_forward(family, name, case, device, dtype, "contiguous")]
    orders = [test_grid.first_order] if order == 1 else [test_grid.second_order, test_grid.through_penalty]
    return [lambda o=o: test_grid.test_gradients(family, name, case, device, "contiguous", o) for o in orders]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_grid_finds(family: str, order: int, fault: str) -> None:
    made, name = faulty(family, order, fault)
    for check in grid_checks(FAMILIES[family], name, order):
        check()
    for check in grid_checks(made, name, order):
        with pytest.raises(AssertionError, match="not finite" if fault != "wrong" else "relative error"):
            check()


def test_the_grid_finds_a_reference_that_is_no_number() -> None:
    """Three times the error of a NaN would allow everything."""
    made, name = faulty("depthwise_separable", 0, "nan")
    with pytest.raises(AssertionError, match="not finite"):
        test_grid.test_forward(replace(made, right=(name,)), name, "plain", "cpu", torch.float32, "contiguous")


def scored() -> tuple[Case, Results]:
    """A random case, and what the reference makes of it in float32."""
    arguments, dense = {"shape": (2, 3, 5, 4), "features": (5,)}, ("contiguous", "contiguous")
    case = Case("anomaly_score", arguments, torch.float32, "normal", dense, False, 3)
    return case, all_orders(runs("anomaly_score")["reference"], case.inputs(), case.seed)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["output 0", "gradient of x", "second gradient of x"])
def test_the_random_cases_find(which: str, fault: str) -> None:
    case, got = scored()
    allowed = exact_results(case, False)
    Tally("anomaly_score", "reference").add(case, allowed, got)
    with pytest.raises(AssertionError, match=r"not finite|over what rounding allows"):
        Tally("anomaly_score", "reference").add(case, allowed, got | {which: FAULTS[fault](got[which])})


def test_the_random_cases_find_what_is_no_number_where_gradients_are_not_compared() -> None:
    case, got = scored()
    undecided = replace(exact_results(case, False), decided=False)
    got["gradient of x"] = FAULTS["nan"](got["gradient of x"])
    with pytest.raises(AssertionError, match="gradient of x: 1 of 120 numbers are not finite"):
        Tally("anomaly_score", "reference").add(case, undecided, got)


@NATIVE
@pytest.mark.parametrize("fault", ["nan", "infinity", "all nan"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_compiled_kernels_own_tests_find_what_is_no_number(
    order: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(run: Callable[..., Any], x: Tensor, *others: Any, **options: Any) -> Any:
        if order > 0:
            return run(_Planted.apply(x, order, FAULTS[fault]), *others, **options)
        result = run(x, *others, **options)
        if isinstance(result, tuple):
            return (_Planted.apply(result[0], 0, FAULTS[fault]), *result[1:])
        return _Planted.apply(result, 0, FAULTS[fault])

    for module, name in (
        (test_depthwise_separable_native, "depthwise"),
        (test_cbam_native, "run_native"),
        (test_pointwise_native, "by_kernel"),
    ):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _run=run, **o: planted(_run, *a, **o))
    of_cbam = test_cbam_native.check_penalty_at_every_shape if order == 2 else test_cbam_native.check_every_shape
    for check in (
        test_depthwise_separable_native.worst_excess,
        lambda: test_pointwise_native.worst_error(torch.float32),
        lambda: of_cbam(torch.float32),
    ):
        with pytest.raises(AssertionError, match="not finite"):
            check()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_benchmark_finds(fault: str) -> None:
    """A wrong result has no speed, and neither has NaN."""
    wanted = [torch.randn(3, 5, dtype=torch.float64)]
    case = measure.Case("moments", "plain", torch.float32, "forward", "cpu", [])

    def errors(of: Tensor) -> dict[measure.Contestant, float]:
        plain, one = (
            measure.Contestant(name, "contiguous", False, False, list, lambda: None) for name in ("reference", "native")
        )
        found = {plain: [wanted[0].float()], one: [of]}
        return {c: measure._largest_error(outputs, wanted) for c, outputs in found.items()}

    measure._assert_right(case, errors(wanted[0].float()))
    with pytest.raises(AssertionError, match=r"not finite|relative error"):
        measure._assert_right(case, errors(FAULTS[fault](wanted[0].float())))


GOOD = torch.tensor([1.0, -2.0, 3.0])


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_no_comparison_takes_what_is_no_number(number: float) -> None:
    """On either side, and on both: infinities are equal, and nothing is larger than NaN."""
    bad = torch.tensor([1.0, number, 3.0])
    for got, wanted in ((bad, GOOD), (GOOD, bad), (bad, bad)):
        for check in (
            lambda g, w: relative_error(g, w) < math.inf,
            lambda g, w: allowed_beside(g, w),
            lambda g, w: assert_close(g, w, 10, absolute=10),
            lambda g, w: assert_all_close([g], [w], 10, absolute=10),
            lambda g, w: assert_each_close(g, w, rtol=10, atol=10),
            lambda g, w: assert_each_close(g.numpy(), w.tolist(), rtol=10, atol=10),
        ):
            with pytest.raises(AssertionError, match="1 of 3 numbers are not finite"):
                check(got, wanted)
    with pytest.raises(AssertionError, match="is no bound"):
        assert_close(GOOD, GOOD, number)
    with pytest.raises(AssertionError, match="not finite"):
        largest([0.0, number, 1.0])


def test_shapes_dtypes_and_counts_are_compared() -> None:
    assert_close(GOOD, GOOD.double(), 0)
    with pytest.raises(AssertionError, match=r"shape \[3\], wanted \[1, 3\]"):
        assert_close(GOOD, GOOD[None], 1)
    with pytest.raises(AssertionError, match=r"torch\.float32, wanted torch\.float64"):
        assert_close(GOOD, GOOD, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"shape \[3\], wanted \[1, 3\]"):
        assert_each_close(GOOD, GOOD[None], rtol=1)
    with pytest.raises(ValueError, match="zip"):
        assert_all_close([GOOD, GOOD], [GOOD], 1)


def test_how_far_apart() -> None:
    off = GOOD + torch.tensor([0.0, 0.03, 0.0])
    assert relative_error(off, GOOD) == pytest.approx(0.01, rel=1e-5)
    assert relative_error(torch.empty(0, 2), torch.empty(0, 2)) == 0
    assert_close(off, GOOD, 0.011)
    assert_close(off, GOOD, 0, absolute=0.031)
    assert_each_close(off, GOOD, rtol=0.016)
    with pytest.raises(AssertionError, match=r"y: relative error 1\.00e-02, allowed 9\.00e-03"):
        assert_close(off, GOOD, 0.009, absolute=0.029, what="y")
    with pytest.raises(AssertionError, match="y: "):
        assert_each_close(off, GOOD, rtol=0.014, what="y")
    assert allowed_beside(off, GOOD, factor=2, least=0.5) == pytest.approx(0.52, rel=1e-5)
    assert largest([]) == 0
