"""The check, then the timing: every contestant of a case on the same tensors, interleaved in one run.

A contestant whose outputs are further from float64 than plain PyTorch's, by more than a small factor, fails the case:
a wrong result has no speed. Rounds go through all contestants, each round from another one onwards, so that a machine
that slows down slows all of them; the median over the rounds counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.machine import clock
from bench.results import Key, Row
from bench.roofline import Cost, name_of
from tests.kernels.compare import largest, relative_error

Outputs = Sequence[Tensor | None]  # None: a gradient that is zero because nothing depends on the tensor

# A shorter measurement is repeated within its round, as the clock and the interpreter would be measured instead.
_SHORTEST = 2e-3
_FEWEST, _FEWEST_OF_SLOW, _MOST = 5, 3, 30  # rounds


@dataclass(frozen=True)
class Case:
    """What is compared: an op or a step, on a shape, in a dtype, through a pass."""

    op: str
    name: str
    dtype: torch.dtype
    pass_: str
    device: str
    costs: list[Cost]
    tolerance: float | None = None  # how far from float64 anyone may be, where the default of the ops is too strict
    images: int | None = None  # that go through in a call, where that is what counts

    @property
    def key(self) -> Key:
        return self.op, self.name, name_of(self.dtype), self.pass_


@dataclass(frozen=True)
class Contestant:
    """One implementation in one memory layout."""

    implementation: str
    layout: str
    peer: bool  # what a user would otherwise pick; the others are ours
    fused: bool  # what --kernels fused picks for this call
    check: Callable[[], Outputs]  # once, always on the same tensors
    call: Callable[[], object]  # measured, on other tensors each time
    raises: str = ""  # why it cannot take part
    memory: Callable[[], float] | None = None  # megabytes that a call takes, where that is asked
    seconds: Callable[[], float] | None = None  # makes a call and times it, where this process's clock cannot


Compare = Callable[[Case, Sequence[Contestant], Outputs], list[Row]]


def checked_or_raises(c: Contestant, error: type[Exception]) -> Contestant:
    """The contestant with its check made; or, if the check raises ``error``, one that says so in its row."""
    try:
        found = c.check()
    except error as reason:
        return replace(c, raises=_first_line(reason))
    return replace(c, check=lambda: found)


def compare(
    benchmark: Any, case: Case, contestants: Sequence[Contestant], wanted: Outputs, seconds: float
) -> list[Row]:
    """Check all contestants against ``wanted``, then measure them for about ``seconds``.

    Raises:
        AssertionError: an implementation's outputs are wrong, or not finite.
    """
    failed = {c: c.raises for c in contestants if c.raises}
    errors: dict[Contestant, float] = {}
    for c in contestants:
        if c not in failed:
            try:
                errors[c] = _largest_error(c.check(), wanted)
            except Exception as error:
                if not c.peer:
                    raise
                failed[c] = _first_line(error)
    _assert_right(case, errors)
    times = _interleaved(benchmark, case.device, list(errors), seconds)
    benchmark.group = f"{case.op} {case.pass_}"
    benchmark.extra_info.update({f"{c.implementation} {c.layout}": 1e3 * times[c] for c in errors})
    op, name, dtype, pass_ = case.key
    return [
        Row(
            device=case.device, op=op, case=name, dtype=dtype, layout=c.layout, pass_=pass_,
            implementation=c.implementation,
            median_ms=1e3 * times[c] if c in times else None, costs=tuple(case.costs), error=errors.get(c),
            peer=c.peer, fused=c.fused, note=failed.get(c, ""), images=case.images,
            memory_mb=c.memory() if c.memory and c in times else None,
        )
        for c in contestants
    ]  # fmt: skip


def _largest_error(got: Outputs, wanted: Outputs) -> float:
    """Over all outputs, each relative to its own largest value."""
    assert len(got) == len(wanted)
    errors = []
    for g, w in zip(got, wanted, strict=True):
        shown = next((t for t in (w, g) if t is not None), None)
        if shown is None:
            continue
        zero = torch.zeros_like(shown)
        errors.append(relative_error(zero if g is None else g, zero if w is None else w))
    return largest(errors)


def _assert_right(case: Case, errors: dict[Contestant, float]) -> None:
    eps = torch.finfo(case.dtype).eps
    # A peer may add in another order, as PyTorch's generated code does. Beyond this the case itself is at fault: it
    # sits on a kink, where float64 says nothing about anyone.
    # Ours may be four times as far off as eager, and 8 eps: by PyTorch's matrix product a sum of 65536 pixels was 3.4.
    of_peers = case.tolerance or 4 * eps**0.5
    of_ours = case.tolerance or 4 * max(e for c, e in errors.items() if c.implementation == "reference") + 8 * eps
    for c, error in errors.items():
        allowed = of_peers if c.peer else of_ours
        assert error <= allowed, f"{c.implementation} {c.layout}: relative error {error:.2e}, allowed {allowed:.2e}"


def _interleaved(benchmark: Any, device: str, contestants: list[Contestant], seconds: float) -> dict[Contestant, float]:
    """Median seconds a call of each; one round of the ``benchmark`` fixture is one call of everyone."""
    repeats, once = {}, 0.0
    for c in contestants:
        first = _seconds(c, 1, device)
        alone = first if first > _SHORTEST else min(first, _seconds(c, 1, device))
        repeats[c] = max(1, min(100, round(_SHORTEST / alone)))
        once += alone * repeats[c]
    fewest = _FEWEST if once < 4 * seconds else _FEWEST_OF_SLOW
    rounds = max(fewest, min(_MOST, round(seconds / once)))
    times: dict[Contestant, list[float]] = {c: [] for c in contestants}
    done = 0

    def sweep() -> None:
        nonlocal done
        for i in range(len(contestants)):
            c = contestants[(done + i) % len(contestants)]
            times[c].append(_seconds(c, repeats[c], device))
        done += 1

    benchmark.pedantic(sweep, rounds=rounds)
    return {c: median(of) for c, of in times.items()}


def _seconds(c: Contestant, repeats: int, device: str) -> float:
    if c.seconds is not None:
        return sum(c.seconds() for _ in range(repeats)) / repeats
    begun = clock(device)
    for _ in range(repeats):
        c.call()
    return (clock(device) - begun) / repeats


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
