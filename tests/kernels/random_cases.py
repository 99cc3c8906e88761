"""Random cases of every op family, for hypothesis: what the shared grid's few cases have, in any combination.

Shapes, options, dtypes, values, and how each tensor lies in memory are drawn; the numbers come from a seed, by the
grid's own makers. So an example prints as one line, and shrinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from raccgan.kernels import dispatch
from tests.kernels.grid import FAMILIES, Inputs, leaves, tensors
from tests.kernels.rounding import Results
from tests.kernels.variations import LAYOUTS, laid_out, scattered

DATA = ("x", "x_hat", "f", "f_hat", "residual")
"""Tensors that hold images or features, whose values are drawn; the others are weights of a usual size."""

VALUES = (
    "normal", "ties", "rectified", "constant", "offset", "outlier", "mixed", "huge", "tiny", "denormal"
)  # fmt: skip

_EXPONENTS = {"huge": 55, "tiny": -60, "denormal": -140}
"""Powers of two: squares of the first stay finite in float32, those of the second normal; float32's normal numbers end
at the -126th. float16 takes a tenth of each. CBAM's gradients multiply more of them: its huge ones are a third."""


@dataclass(frozen=True)
class Case:
    """One call of one family."""

    family: str
    arguments: dict[str, Any] = field(hash=False)  # of the grid's maker
    dtype: torch.dtype
    values: str
    layouts: tuple[str, str]  # of the first tensor, and of all others of four dimensions
    scattered: bool  # whether the tensors of fewer dimensions have gaps
    seed: int

    def inputs(self) -> Inputs:
        made = FAMILIES[self.family].make(torch.Generator().manual_seed(self.seed), **self.arguments)
        for name in DATA:
            if isinstance(made.get(name), Tensor):
                made[name] = self._valued(made[name])
        x = made["x"] = self._placed(made["x"], first=True)
        if isinstance(made.get("average"), Tensor):  # they are x's own
            made |= {"average": x.double().mean(dim=(2, 3)), "maximum": x.double().amax(dim=(2, 3))}
        return {
            name: self._placed(value, first=False) if isinstance(value, Tensor) and name != "x" else value
            for name, value in made.items()
        }

    def _valued(self, t: Tensor) -> Tensor:
        """Normal numbers [N, ...] as what ``values`` names."""
        if self.values in _EXPONENTS:
            part = 10 if self.dtype == torch.float16 else 3 if (self.family, self.values) == ("cbam", "huge") else 1
            return t * 2.0 ** (_EXPONENTS[self.values] // part)
        if self.values == "ties":
            return (2 * t).round() / 2
        if self.values == "rectified":
            return t.relu().round()
        if self.values == "constant":
            return t.flatten()[:1].view([1] * t.dim()).expand_as(t)
        if self.values == "offset":
            return t + 100
        if self.values == "outlier":
            t.view(-1)[t.numel() // 2] = 1000
        if self.values == "mixed":  # samples of quite different size
            size = 2.0 ** (torch.arange(t.shape[0]) * 5 % 16 - 8)
            return t * size.view(-1, *[1] * (t.dim() - 1))
        return t

    def _placed(self, t: Tensor, *, first: bool) -> Tensor:
        t = t.to(self.dtype)
        if t.dim() == 4:
            return laid_out(t, self.layouts[0 if first else 1])
        return scattered(t) if self.scattered else t


_few = st.integers(1, 9)
_vectors = st.sampled_from([15, 16, 17, 31, 32, 33, 40])  # of channels: one and two of the widest vectors, and around


@st.composite
def _shapes(draw: Any) -> tuple[int, int, int, int]:
    """Sizes of 1 and odd ones, less than a vector's channels and more; many samples where there are few channels."""
    c = draw(st.one_of(_few, _vectors))
    n = draw(st.integers(1, 3 if c > 3 else 18))
    side = st.integers(1, 5 if c > 9 or n > 6 else 13)
    return n, c, draw(side), draw(side)


@st.composite
def _anomaly_score(draw: Any) -> dict[str, Any]:
    features = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
    return {
        "shape": draw(_shapes()),
        "features": draw(st.one_of(st.none(), features)),
        "want_map": draw(st.booleans()),
    }


@st.composite
def _depthwise_separable(draw: Any) -> dict[str, Any]:
    n, c, h, w = draw(_shapes())
    upsample, pool = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    if upsample < pool:
        h, w = max(h, 2), max(w, 2)  # else nothing comes out
    return {
        "shape": (n, c, h, w),
        "out": draw(st.one_of(_few, _vectors)),
        "k": draw(st.sampled_from([1, 3, 5, 7, 9])),
        "pre_relu": draw(st.booleans()),
        "norm": draw(st.sampled_from(["none", "instance"])),
        "affine": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "upsample": upsample,
        "pool": pool,
        "residual": draw(st.booleans()),
    }


@st.composite
def _cbam(draw: Any) -> dict[str, Any]:
    return {
        "shape": draw(_shapes()),
        "norm": draw(st.sampled_from(["instance", "batch", "fixed"])),
        "reduced": draw(st.integers(1, 4)),
        "k": draw(st.sampled_from([1, 3, 5, 7, 9])),
    }


_ARGUMENTS = {
    "anomaly_score": _anomaly_score(),
    "depthwise_separable": _depthwise_separable(),
    "moments": st.builds(lambda shape: {"shape": shape}, _shapes()),
    "cbam": _cbam(),
}


def cases(family: str, dtypes: list[torch.dtype], values: tuple[str, ...] = VALUES) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        family=st.just(family),
        arguments=_ARGUMENTS[family],
        dtype=st.sampled_from(dtypes),
        values=st.sampled_from(values),
        layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
        scattered=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def rounds_as(case: Case) -> torch.dtype:
    """The dtype of what is computed between inputs and results."""
    if case.family in ("anomaly_score", "moments"):  # which promise that they add in float32 at least
        return torch.promote_types(case.dtype, torch.float32)
    return case.dtype


def all_orders(run: Callable[..., Any], inputs: Inputs, seed: int, *, penalty: bool = False) -> Results:
    """Outputs, gradients of all tensors, and gradients of these gradients, or of x's alone as a penalty has it.

    The cotangents are random numbers that every dtype holds, the same for every implementation.
    """

    def cotangent(of: Tensor, number: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * seed + number)
        return torch.randn(of.shape, generator=draw, dtype=torch.float64).bfloat16().to(of.dtype).requires_grad_()

    at = leaves(inputs)
    result = run(*at.values())
    outputs = list(result if isinstance(result, tuple) else (result,))
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    cotangents = {f"cotangent {i}": cotangent(o, i) for i, o in enumerate(outputs) if o.requires_grad}
    wanted = tensors(at)
    first = torch.autograd.grad(
        [o for o in outputs if o.requires_grad], list(wanted.values()), list(cotangents.values()),
        create_graph=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    results |= {f"gradient of {name}": g.detach() for name, g in zip(wanted, first, strict=True)}
    pairs = [(g, cotangent(g, 100 + i)) for i, g in enumerate(first) if g.requires_grad]
    again = wanted | cotangents
    if penalty:
        pairs = pairs[:1]
    if not pairs:
        return results
    second = torch.autograd.grad(
        [g for g, _ in pairs], list(again.values()), [t for _, t in pairs], allow_unused=True, materialize_grads=True
    )
    return results | {f"second gradient of {name}": g.detach() for name, g in zip(again, second, strict=True)}


def runs(family: str) -> dict[str, Callable[..., Any]]:
    """Whatever computes a family: each backend, and ``fused``, the dispatcher's choice for the call.

    A drawn case whose kernel size the backend refuses is rejected.
    """
    backends, of = dispatch.ops()[family], FAMILIES[family]

    def run_of(name: str) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            call = of.call(dict(enumerate(inputs)))
            if name != "fused" and "x9" in str(backends[name].supports(call)):
                reject()
            return dispatch.choose(family, backends, name, call).run(*of.arguments(*inputs))

        return run

    return {name: run_of(name) for name in (*backends, "fused")}


def dtypes_of(family: str, name: str) -> list[torch.dtype] | str:
    """The dtypes that ``name`` takes on a CPU, or why none."""
    every = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if name == "fused":
        return every
    reasons = {d: dispatch.ops()[family][name].supports(dispatch.Call(torch.device("cpu"), d)) for d in every}
    return [d for d, reason in reasons.items() if reason is None] or str(reasons[torch.float32])
