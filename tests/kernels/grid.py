"""The shared grid: what every implementation of every op family is held to, against the reference in float64.

An implementation joins by its line in its family's ``BACKENDS``; a family joins by its line in ``FAMILIES``.
Sizes of 1, odd and prime ones, sliced and permuted tensors and ties are in the grid on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raccgan.kernels import anomaly_score, cbam, depthwise_separable, dispatch, moments
from raccgan.kernels.cbam import CbamNorm, CbamWeights
from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights
from tests.kernels.variations import scattered

Inputs = dict[str, Any]  # by the reference's parameter names, in its order

LAYOUTS = ("contiguous", "channels_last", "sliced")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Family:
    """An op family: its implementations, its cases, and how a case becomes inputs."""

    name: str
    implementations: dispatch.Backends
    cases: dict[str, dict[str, Any]]
    make: Callable[..., Inputs]  # (draw, **case) -> float64 inputs on the CPU
    arguments: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs  # of a backend's run, of the inputs

    def inputs(self, case: str, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous") -> Inputs:
        """A case's inputs; the same numbers, rounded to ``dtype``, in every layout."""
        made = self.make(torch.Generator().manual_seed(1), **self.cases[case])
        return {name: _placed(value, dtype, device, layout) for name, value in made.items()}

    def run(self, implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        """The differentiable outputs of one implementation."""
        result = self.taking_inputs(implementation)(*inputs.values())
        return result if isinstance(result, tuple) else (result,)

    def taking_inputs(self, implementation: str) -> Callable[..., Any]:
        """One implementation as a function of the inputs, in their order."""
        run, arguments = self.implementations[implementation].run, self.arguments
        return lambda *inputs: run(*arguments(*inputs))

    def call(self, inputs: Mapping[Any, Any]) -> dispatch.Call:
        """The call of the op with these inputs."""
        arguments = self.arguments(*inputs.values())
        weights = arguments[1] if self.name == "depthwise_separable" else None
        return dispatch.Call.of(arguments[0], 0 if weights is None else weights.kernel_size)


def _placed(value: Any, dtype: torch.dtype, device: str, layout: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device, dtype)
    if layout == "channels_last" and value.dim() == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and value.dim() == 4:
        value = scattered(value)
    return value


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def leaves(inputs: Inputs, names: set[str] | None = None) -> Inputs:
    """The inputs with gradients asked for, of all tensors or of the named ones, in the layout they have."""
    return {
        name: value.detach().requires_grad_(names is None or name in names) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


class OwnOps(TorchDispatchMode):
    """Remembers the calls of this package's own registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if op.namespace == "raccgan":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [op.name() for op, _ in self.calls]


def skip_unless_served(family: Family, implementation: str, inputs: Inputs) -> None:
    reason = family.implementations[implementation].supports(family.call(inputs))
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _anomaly_score(
    draw: torch.Generator, *, shape: tuple[int, int, int, int], features: tuple[int, ...] | None, want_map: bool = True
) -> Inputs:
    x, x_hat = _normal(draw, *shape).tanh(), _normal(draw, *shape).tanh()
    f = None if features is None else _normal(draw, shape[0], *features)
    f_hat = None if features is None else _normal(draw, shape[0], *features)
    return {"x": x, "x_hat": x_hat, "f": f, "f_hat": f_hat, "want_map": want_map}


def _depthwise_separable(
    draw: torch.Generator,
    *,
    shape: tuple[int, int, int, int],
    out: int,
    k: int,
    pre_relu: bool = False,
    norm: str = "none",
    affine: bool = True,
    bias: bool = True,
    relu: bool = True,
    upsample: int = 1,
    pool: int = 1,
    residual: bool = False,
) -> Inputs:
    n, c, h, w = shape
    size = (h * upsample // pool, w * upsample // pool)
    return {
        "x": _normal(draw, *shape),
        "depthwise_weight": _normal(draw, c, 1, k, k) / k,
        "depthwise_bias": _normal(draw, c) if bias else None,
        "pointwise_weight": _normal(draw, out, c, 1, 1) / c**0.5,
        "pointwise_bias": _normal(draw, out) if bias else None,
        "pre_relu": pre_relu,
        "norm": norm,
        "eps": 1e-5,
        "scale": 1 + _normal(draw, n, c) / 4 if affine else None,
        "shift": _normal(draw, n, c) / 4 if affine else None,
        "relu": relu,
        "upsample": upsample,
        "pool": pool,
        "residual": _normal(draw, n, out, *size) if residual else None,
    }


def _separable_arguments(
    x: Tensor, depthwise: Tensor, depthwise_bias: Tensor | None, pointwise: Tensor, pointwise_bias: Tensor | None,
    pre_relu: bool, norm: str, eps: float, scale: Tensor | None, shift: Tensor | None, relu: bool, upsample: int,
    pool: int, residual: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    weights = Weights(depthwise, depthwise_bias, pointwise, pointwise_bias)
    prologue = Prologue(pre_relu, norm, eps, scale, shift, relu)
    return x, weights, prologue, Resize(upsample, pool), residual


def _moments(draw: torch.Generator, *, shape: tuple[int, int, int, int]) -> Inputs:
    return {"x": _normal(draw, *shape) + 3}


def _cbam(
    draw: torch.Generator,
    *,
    shape: tuple[int, int, int, int],
    norm: str,
    reduced: int = 2,
    k: int = 7,
    ties: bool = False,
) -> Inputs:
    c = shape[1]
    x = _normal(draw, *shape)
    return {
        "x": x.relu().round() if ties else x,
        "reduce_weight": _normal(draw, reduced, c) / c**0.5,
        "reduce_bias": _normal(draw, reduced) / 4,
        "expand_weight": _normal(draw, c, reduced) / reduced**0.5,
        "expand_bias": _normal(draw, c) / 4,
        "spatial_weight": _normal(draw, 1, 2, k, k) / k,
        "norm_weight": 1 + _normal(draw, 1) / 4,
        "norm_bias": _normal(draw, 1) / 4,
        "norm": norm,
        "mean": _normal(draw, 1) / 4 if norm == "fixed" else None,
        "var": 1 + _normal(draw, 1).square() if norm == "fixed" else None,
        "eps": 1e-5,
    }


def cbam_arguments(x: Tensor, *inputs: Any) -> tuple[Tensor, CbamWeights, CbamNorm]:
    return x, CbamWeights(*inputs[:7]), CbamNorm(*inputs[7:])


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "anomaly_score",
            anomaly_score.BACKENDS,
            {
                "grey": {"shape": (3, 1, 8, 8), "features": (6, 4, 4)},
                "colour": {"shape": (2, 3, 16, 16), "features": (17,)},
                "one": {"shape": (1, 1, 1, 1), "features": (1,)},
                "prime": {"shape": (5, 7, 13, 11), "features": (31, 3, 5)},
                "no features": {"shape": (2, 1, 5, 9), "features": None},
                "no map": {"shape": (2, 3, 7, 4), "features": (5,), "want_map": False},
                "empty": {"shape": (0, 3, 4, 4), "features": (5,)},
            },
            _anomaly_score,
        ),
        Family(
            "depthwise_separable",
            depthwise_separable.BACKENDS,
            {
                "plain": {"shape": (2, 4, 6, 6), "out": 3, "k": 3, "affine": False, "relu": False},
                "generator": {"shape": (2, 6, 4, 4), "out": 5, "k": 7, "upsample": 2},
                "generator, second": {"shape": (2, 3, 8, 8), "out": 3, "k": 7, "residual": True},
                "discriminator": {"shape": (2, 3, 8, 8), "out": 5, "k": 3, "affine": False, "norm": "instance"},
                "discriminator, second": {
                    "shape": (2, 20, 8, 8),
                    "out": 5,
                    "k": 3,
                    "affine": False,
                    "norm": "instance",
                    "pool": 2,
                    "residual": True,
                },
                "encoder": {"shape": (2, 3, 6, 7), "out": 4, "k": 3, "norm": "instance", "pre_relu": True},
                "normalised, up": {
                    "shape": (2, 3, 5, 4),
                    "out": 2,
                    "k": 5,
                    "norm": "instance",
                    "pre_relu": True,
                    "upsample": 2,
                },
                "affine, pooled": {"shape": (2, 3, 8, 8), "out": 5, "k": 3, "pool": 2, "residual": True},
                "skip": {"shape": (2, 3, 6, 6), "out": 4, "k": 1, "affine": False, "relu": False, "pool": 2},
                "no bias": {"shape": (1, 2, 5, 5), "out": 3, "k": 5, "bias": False},
                "skip, no bias": {"shape": (1, 2, 4, 6), "out": 3, "k": 1, "bias": False, "upsample": 2},
                "one": {"shape": (1, 1, 1, 1), "out": 1, "k": 3},
                "prime": {"shape": (3, 7, 5, 11), "out": 13, "k": 3, "upsample": 2},
                "odd, pooled": {"shape": (1, 3, 7, 5), "out": 2, "k": 3, "pool": 2},
                "up and pool": {"shape": (1, 2, 3, 5), "out": 2, "k": 3, "upsample": 2, "pool": 2},
            },
            _depthwise_separable,
            _separable_arguments,
        ),
        Family(
            "moments",
            moments.BACKENDS,
            {
                "plain": {"shape": (3, 16, 6, 6)},
                "prime": {"shape": (5, 7, 13, 11)},
                "several pieces": {"shape": (2, 37, 31, 17)},
                "one channel": {"shape": (2, 1, 4, 4)},
                "one": {"shape": (1, 1, 1, 1)},
            },
            _moments,
        ),
        Family(
            "cbam",
            cbam.BACKENDS,
            {
                "instance": {"shape": (2, 8, 6, 6), "norm": "instance"},
                "batch": {"shape": (3, 5, 4, 7), "norm": "batch"},
                "fixed": {"shape": (2, 16, 5, 5), "norm": "fixed"},
                "one channel": {"shape": (2, 1, 4, 4), "norm": "instance", "reduced": 1},
                "ties": {"shape": (2, 4, 5, 5), "norm": "instance", "ties": True},
                "prime": {"shape": (1, 13, 11, 3), "norm": "fixed", "k": 3},
            },
            _cbam,
            cbam_arguments,
        ),
    )
}


def grid(*, reference: bool = False, cases: bool = True) -> Any:
    """pytest parameters: family, implementation, case and device, all combinations that exist."""
    rows = [
        pytest.param(
            family, name, case, device,
            id="-".join(filter(None, (family.name, name, case, device))),
            marks=pytest.mark.gpu if device == "cuda" else (),
        )
        for family in FAMILIES.values()
        for name in family.implementations
        for case in (family.cases if cases else [next(iter(family.cases))])
        for device in DEVICES
        if reference or name != "reference"
    ]  # fmt: skip
    return pytest.mark.parametrize(("family", "implementation", "case", "device"), rows)
