"""Every implementation of every op family on random cases, against the reference in float64 and what rounding allows.

An implementation joins by its line in its family's ``BACKENDS``. ``--long`` tries 1000 cases of each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.compare import assert_finite
from tests.kernels.grid import FAMILIES, Inputs
from tests.kernels.guards import Guards, compiled
from tests.kernels.random_cases import DATA, Case, all_orders, cases, dtypes_of, rounds_as, runs
from tests.kernels.rounding import Bound, Results, bound
from tests.kernels.test_grid import poisoned

EVERYONE = pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in runs(family)])
_DENSE = ("contiguous", "contiguous")


class Known(NamedTuple):
    """A result that is not as right as it should be. It is left out of the random cases; an example of it has a test of
    its own, which says so as soon as it is mended."""

    names: tuple[str, ...]
    example: Case
    result: str  # of the example
    left_out: tuple[str, ...]  # results of the cases that it covers; none means all
    covers: Callable[[Case], bool]  # for which cases of the family
    why: str


KNOWN = [
    Known(
        ("native", "fused", "triton"),
        Case("moments", {"shape": (4, 2, 5, 5)}, torch.float32, "offset", _DENSE, False, 0),
        "gradient of x",
        ("gradient of x", "second gradient of cotangent 1"),
        lambda case: True,
        "the compiled gradient is slope * (x - mean) + constant, and the mean is rounded to float32: that counts where "
        "it is large beside the deviation; a mean in two parts would not be",
    ),
]  # fmt: skip


def known_of(name: str, case: Case) -> list[Known]:
    """What is known of an implementation at this case."""
    return [k for k in KNOWN if name in k.names and case.family == k.example.family and k.covers(case)]


FEWEST = 100


def examples(name: str) -> int:
    """How many cases a backend is tried on: a tenth where Triton has to compile for each of them, seconds each."""
    return max(1, settings.default.max_examples // (10 if name == "triton" else 1))


def dtypes_or_skip(family: str, name: str) -> list[torch.dtype]:
    dtypes = dtypes_of(family, name)
    if isinstance(dtypes, str):
        pytest.skip(f"{family}, {name}: {dtypes}")
    return dtypes


@dataclass
class Tally:
    """What the cases of one implementation came to."""

    family: str
    name: str
    cases: int = 0
    compared: int = 0  # with their gradients
    wide: int = 0  # with a float32 bound above a thousandth of the result
    worst: float = 0.0  # the largest part of what is allowed that an error took up
    worst_case: Case | None = field(default=None)

    def add(self, case: Case, allowed: Bound, results: Results) -> None:
        for which, results_in_float64 in (("exact", allowed.exact), ("deviation of", allowed.deviation)):
            for name, t in results_in_float64.items():
                assert_finite(t, f"{which} {name}")
        known = known_of(self.name, case)
        names = [name for name in allowed.exact if allowed.decided or name.startswith("output")]
        if case.dtype == torch.float16:  # a norm of little variance has second gradients beyond its 65504
            names = [name for name in names if not name.startswith("second")]
        for name, got in results.items():
            if case.dtype != torch.float16 or not name.startswith("second"):
                assert_finite(got, name)
        excess = {
            name: allowed.excess(name, results[name])
            for name in names
            if not any(name in k.left_out or not k.left_out for k in known)
        }
        wrong = {name: round(value, 3) for name, value in excess.items() if not value <= 1}
        assert not wrong, f"errors over what rounding allows: {wrong}"
        self.cases += 1
        self.compared += allowed.decided
        if case.dtype == torch.float32:
            self.wide += any(allowed.width(name) > 1e-3 for name in names)
        if max(excess.values(), default=0) > self.worst:
            self.worst, self.worst_case = max(excess.values()), case

    def finish(self) -> None:
        print(
            f"{self.family}, {self.name}: {self.cases} cases, {self.compared} of them with gradients, {self.wide} with "
            f"a wide bound; errors up to {self.worst:.2f} of what is allowed: {self.worst_case}"
        )
        assert self.compared > 0, "nothing of the gradients was compared"
        if self.cases >= FEWEST:  # for less than that, chance decides
            assert self.compared > self.cases / 2, "in most cases nothing of the gradients was compared"
            assert self.wide < self.cases / 2, "in most cases the bound said little"


def exact_results(case: Case, penalty: bool) -> Bound:
    wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in case.inputs().items()}
    reference = runs(case.family)["reference"]

    def run(inputs: Inputs) -> Results:
        return all_orders(reference, inputs, case.seed, penalty=penalty)

    allowed = bound(run, wide, rounds_as(case))
    if rounds_as(case) != case.dtype:  # the parts of a second gradient are added up by autograd, in the tensor's dtype
        rough = bound(run, wide, case.dtype).deviation
        allowed.deviation.update({name: t for name, t in rough.items() if name.startswith("second")})
    return allowed


@EVERYONE
def test_values_and_gradients(family: str, name: str) -> None:
    """Outputs, gradients and gradients of gradients, with every buffer full of NaN beforehand."""
    tally, run = Tally(family, name), runs(family)[name]

    @settings(max_examples=examples(name))
    @given(case=cases(family, dtypes_or_skip(family, name)), penalty=st.booleans())
    def check(case: Case, penalty: bool) -> None:
        with poisoned():
            got = all_orders(run, case.inputs(), case.seed, penalty=penalty)
        tally.add(case, exact_results(case, penalty), got)

    check()
    tally.finish()


@pytest.mark.parametrize("known", [pytest.param(k, marks=pytest.mark.xfail(strict=True, reason=k.why)) for k in KNOWN])
@pytest.mark.parametrize("penalty", [False, True])
def test_known_to_be_less_right(known: Known, penalty: bool) -> None:
    case = known.example
    got = all_orders(runs(case.family)[known.names[0]], case.inputs(), case.seed, penalty=penalty)
    assert exact_results(case, penalty).excess(known.result, got[known.result]) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_a_little_off_is_noticed(family: str) -> None:
    """What the tests above rest on: one number of a float32 result that is off by a ten-thousandth."""

    def check(name: str, allowed: Bound, got: Tensor) -> None:
        off = got.clone(memory_format=torch.contiguous_format)
        off.view(-1)[off.abs().argmax()] *= 1 + 1e-4
        assert allowed.excess(name, off) > 1, name

    arguments = next(iter(FAMILIES[family].cases.values()))
    case = Case(family, arguments, torch.float32, "normal", _DENSE, False, 3)
    allowed = exact_results(case, False)
    got = all_orders(runs(family)["reference"], case.inputs(), case.seed)
    for name, result in got.items():
        assert allowed.excess(name, result) <= 1
        if result.any():
            check(name, allowed, result)


# ---- what is not finite ----------------------------------------------------------------------------------------------

_WRONG = st.sampled_from([torch.inf, -torch.inf, torch.nan])
_PLACES = st.lists(st.tuples(st.sampled_from(DATA), st.floats(0, 1, exclude_max=True), _WRONG), min_size=1, max_size=3)


def spoiled(case: Case, places: list[tuple[str, float, float]]) -> Inputs:
    """The case's inputs with numbers that are not finite at the given parts of images and features."""
    inputs = case.inputs()
    for name, at, value in places:
        if isinstance(inputs.get(name), Tensor):
            t = inputs[name] = inputs[name].clone(memory_format=torch.preserve_format)
            flat = t.flatten()
            flat[int(at * flat.numel())] = value
            t.copy_(flat.view(t.shape))
    return inputs


@EVERYONE
def test_infinities_and_nan(family: str, name: str) -> None:
    """Outputs are finite and right where the reference's in float64 are finite, so no NaN reaches another sample.

    Where the reference is not finite they are not finite either; of an infinity, in the same sample somewhere: whether
    infinity times a gate that has fallen to 0 is NaN depends on how near to 0 the gate got. Gradients are not compared:
    which side of a ReLU's kink a NaN is on is nobody's promise, and training stops at a loss that is not finite.
    """
    run, reference = runs(family)[name], runs(family)["reference"]

    @settings(max_examples=examples(name))
    @given(case=cases(family, dtypes_or_skip(family, name), ("normal", "ties", "offset")), places=_PLACES)
    def check(case: Case, places: list[tuple[str, float, float]]) -> None:
        assume(not any(not k.left_out for k in known_of(name, case)))
        inputs = spoiled(case, places)
        wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}

        def outputs(run: Callable[..., Any], inputs: Inputs) -> Results:
            result = run(*inputs.values())
            return {f"output {i}": o for i, o in enumerate(result if isinstance(result, tuple) else (result,))}

        allowed = bound(lambda inputs: outputs(reference, inputs), wide, rounds_as(case))
        with poisoned():
            got = outputs(run, inputs)
        excess = {n: allowed.excess(n, got[n]) for n in allowed.exact}
        assert all(value <= 1 for value in excess.values()), excess
        for n, exact in allowed.exact.items():
            lost = ~exact.isfinite() & got[n].isfinite()
            if any(value in (torch.inf, -torch.inf) for _, _, value in places) and lost.dim() > 0:
                lost = lost.flatten(1).all(dim=1) if lost.dim() > 1 else lost[:0]
            assert not lost.any(), f"{n} is finite where the reference is not"

    check()


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guards(tmp_path_factory: pytest.TempPathFactory) -> Guards:
    return compiled(tmp_path_factory.mktemp("guards"))


def test_a_write_beside_a_tensor_is_noticed(guards: Guards) -> None:
    """What the next test rests on: one byte behind a tensor, or before it, and memory that was never written."""
    with guards.around():
        for where in (-1, 20):
            t = torch.empty(5)
            assert t.isnan().all()
            assert guards.allocations
            before = guards.broken
            ctypes.memset(t.data_ptr() + where, 7, 1)
            assert guards.broken == before + 1
            del t
            assert guards.broken == before + 1


@EVERYONE
def test_nothing_is_written_outside_of_a_result_nor_read_outside_of_an_input(
    family: str, name: str, guards: Guards
) -> None:
    """Every tensor between guard bytes: they stay as they are, and so do the inputs; results are those without guards.

    Results that depended on a byte outside of the inputs, or on one not yet written, would be NaN.
    """
    run = runs(family)[name]

    @settings(max_examples=examples(name))
    @given(case=cases(family, dtypes_or_skip(family, name)), penalty=st.booleans())
    def check(case: Case, penalty: bool) -> None:
        wanted = all_orders(run, case.inputs(), case.seed, penalty=penalty)
        with guards.around():
            inputs, before = case.inputs(), case.inputs()
            got = all_orders(run, inputs, case.seed, penalty=penalty)
            assert guards.allocations > len(got)
            assert guards.broken == 0
        for n, t in inputs.items():
            assert torch.equal(t, before[n]) if isinstance(t, Tensor) else t is before[n], f"{n} was changed"
        for n, t in wanted.items():
            torch.testing.assert_close(got[n], t, rtol=0, atol=0, equal_nan=True, msg=n)

    check()
