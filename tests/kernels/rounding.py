"""How far rounding may carry a result: the reference in float64, each operation's result moved as rounding moves it.

A floating-point operation returns its exact result times 1 + d, |d| <= u, the unit roundoff. A sum of n terms errs by
u times the root of the sum of its squared partial sums, which is at most sqrt(n) u times the largest of them; so here
the terms and the result of a sum move by up to sqrt(n) u each, those of any other operation by u (Monte Carlo
arithmetic; Parker, 1997). What that does to a result, through all that comes after, is measured in a few runs, and an
implementation may be off by :data:`DEVIATIONS` standard deviations of it, plus the rounding of its own dtype. Nothing
here is fitted to an implementation: ill-conditioned inputs get a wide bound, all others a narrow one.

Where rounding decides which side of a ReLU's kink a number is on, or which of two is the max, a result may still be
compared and its gradient may not: :attr:`Bound.decided` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.grid import Inputs, tensors

RUNS = 8
DEVIATIONS = 8

Results = dict[str, Tensor]

_aten = torch.ops.aten
_SUMS = {
    _aten.sum, _aten.mean, _aten.var_mean, _aten.convolution, _aten.convolution_backward, _aten.mm, _aten.addmm,
    _aten.bmm, _aten.avg_pool2d, _aten.upsample_nearest2d_backward,
}  # fmt: skip
_DECISIONS = {_aten.relu, _aten.amax}
# They return numbers that they were given: another one, however near, could be no tie any more.
_EXACT = {
    _aten._to_copy, _aten.clone, _aten.copy_, _aten.cat, _aten.stack, _aten.where, _aten.masked_fill, _aten.flip,
    _aten.neg, _aten.abs, _aten.sign, _aten.sgn, _aten.threshold_backward, _aten.upsample_nearest2d, _aten.index_select,
    _aten.select_backward, _aten.slice_backward, _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.zero_, _aten.fill_,
}  # fmt: skip


class Rounding(TorchDispatchMode):
    """Moves what every operation returns, and notes what is decided by a comparison."""

    def __init__(self, dtype: torch.dtype, draw: torch.Generator | None, *, underflows: bool = False) -> None:
        """With rounding as in ``dtype``, where it ``underflows`` of denormal numbers too; without ``draw``, none."""
        super().__init__()
        self.unit = torch.finfo(dtype).eps / 2
        # What is smaller than a normal float32 loses digits, or is lost: bfloat16 products take it for zero.
        # float16 is computed with in float32, and loses only its own denormal numbers' last digit.
        self.smallest = torch.finfo(dtype).tiny * (2**-10 if dtype == torch.float16 else 1)
        self.draw = draw
        self.underflows = underflows
        self.decisions: list[tuple[Tensor, Any]] = []  # the operand, and the dimensions of a max

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = op.overloadpacket
        if packet in _DECISIONS:
            self.decisions.append((args[0].detach().clone(), args[1] if packet is _aten.amax else None))
        if self.draw is None or op.is_view or packet in _DECISIONS | _EXACT:
            return op(*args, **kwargs)
        growth = 1.0
        if packet in _SUMS:
            growth = math.sqrt(_terms(packet, args))
            args = tuple(self._moved(t, growth) for t in args)
        result = op(*args, **kwargs)
        if op._schema.is_mutable:
            return result.copy_(self._moved(result, growth))
        if packet is _aten.sigmoid:  # which is never an exact zero
            result = result + self.smallest
        if isinstance(result, tuple):
            return tuple(self._moved(t, growth) for t in result)
        return self._moved(result, growth)

    def _moved(self, t: Any, growth: float) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() == 0:
            return t
        between = torch.rand(t.shape, generator=self.draw, dtype=t.dtype).sub_(0.5).mul_(2 * growth * self.unit)
        if self.underflows:
            between *= 1 + self.smallest / (t.abs() * growth * self.unit)  # an exact zero stays one
            between.nan_to_num_(nan=0, posinf=0, neginf=0)
        return torch.addcmul(t, t, between)


def _terms(packet: Any, args: tuple[Any, ...]) -> int:
    """At most so many numbers make one of a sum's results."""
    if packet is _aten.avg_pool2d or packet is _aten.upsample_nearest2d_backward:
        return 4
    return max(1, *(t.numel() for t in args if isinstance(t, Tensor)))


@dataclass(frozen=True)
class Bound:
    """What results are in exact arithmetic, and how far from them rounding may carry each."""

    exact: Results
    deviation: Results  # standard, number by number
    decided: bool  # whether no ReLU and no max hangs on rounding

    def excess(self, name: str, got: Tensor) -> float:
        """The error of a result over what it may be; above 1 it is wrong.

        Compared is where the exact one and its deviation are finite: there a result that is not has an infinite error.
        Elsewhere the caller says what it wants: that nothing is infinite, or that the result is not finite either.
        The largest error is held against the largest deviation: of each sample, or row, where there are several.
        """
        exact = self.exact[name]
        assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, wanted {list(exact.shape)}"
        if got.numel() == 0:
            return 0.0
        info = torch.finfo(got.dtype)
        there = exact.isfinite() & self.deviation[name].isfinite()  # or rounding decides whether it is finite
        error = torch.where(there, (got.detach().double() - exact).abs().nan_to_num(nan=math.inf), 0.0)
        scale, deviation = (torch.where(there, t.abs(), 0.0) for t in (exact, self.deviation[name]))
        error, scale, deviation = (
            t.flatten(1).amax(dim=1) if t.dim() > 1 else t.amax() for t in (error, scale, deviation)
        )
        allowed = DEVIATIONS * deviation + info.eps * scale + 4 * info.tiny
        return float((error / allowed).max())  # allowed is finite, and above zero

    def width(self, name: str) -> float:
        """What is allowed, relative to the largest number of a result: how much the comparison says."""
        scale = self.exact[name].detach().abs()
        largest = float(scale[scale.isfinite()].max()) if bool(scale.isfinite().any()) else 0.0
        return DEVIATIONS * float(self.deviation[name].nan_to_num().max()) / largest if largest else 0.0


def bound(run: Callable[[Inputs], Results], inputs: Inputs, dtype: torch.dtype) -> Bound:
    """Of ``run(inputs)``, inputs in float64, for an implementation that rounds as ``dtype`` does inside."""
    with Rounding(dtype, None) as still:
        exact = run(inputs)
    squares = {name: torch.zeros_like(t) for name, t in exact.items()}
    spreads = [torch.zeros_like(v) for v, _ in still.decisions]
    draw = torch.Generator().manual_seed(0)
    sizes = torch.cat([t.abs().flatten() for t in tensors(inputs).values()])
    underflows = bool(((sizes != 0) & (sizes < 1e-6) | (sizes > 1e6)).any()) or dtype == torch.float16
    for _ in range(RUNS):
        with Rounding(dtype, draw, underflows=underflows) as moving:
            moved = run(inputs)
        for name, square in squares.items():
            square += (moved[name] - exact[name]).square()
        for spread, (v, _), (w, _) in zip(spreads, still.decisions, moving.decisions, strict=True):
            torch.maximum(spread, (w - v).abs(), out=spread)
    deviation = {name: (square / RUNS).sqrt() for name, square in squares.items()}
    undecided = any(_hangs(v, 4 * s, dims) for (v, dims), s in zip(still.decisions, spreads, strict=True))
    return Bound(exact, deviation, not undecided)


def _hangs(v: Tensor, spread: Tensor, dims: Any) -> bool:
    """Whether moving each number by ``spread`` may change the sign of one, or which ones are the largest along dims."""
    if dims is None:
        return bool(((spread > 0) & (v.abs() <= spread)).any())
    largest = v.amax(dim=dims, keepdim=True)
    reach = torch.where(v == largest, spread, 0.0).amax(dim=dims, keepdim=True)
    near = (largest - v <= spread + reach) & (spread + reach > 0)
    return bool((near.sum(dim=dims) > 1).any())
