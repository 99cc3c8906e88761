"""torch.func and forward-mode AD: right numbers where ``fused`` falls back, a refusal where a backend was named."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from raccgan.kernels import dispatch
from raccgan.kernels.depthwise_separable import depthwise_separable, pointwise
from tests.kernels.compare import assert_close
from tests.kernels.grid import FAMILIES, tensors

OPS = ("anomaly_score", "cbam", "depthwise_separable", "moments", "pointwise")
NAMED = [name for name in dispatch.BACKENDS if name != "reference"]


def function_of_x(op: str, kernels: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A number made of all outputs of an op's public function, as a function of x; and x in float32."""
    if op == "pointwise":
        w, b = torch.randn(5, 3, 1, 1), torch.randn(5)
        return lambda x: pointwise(x, w, b, kernels=kernels).square().sum(), torch.randn(2, 3, 4, 4)
    family = FAMILIES[op]
    inputs = family.inputs(next(iter(family.cases)), torch.float32)
    public = PUBLIC[op]

    def run(x: Tensor) -> Tensor:
        result = public(family.arguments(*{**inputs, "x": x}.values()), kernels)
        outputs = result if isinstance(result, tuple) else (result,)
        return torch.stack([o.square().sum() for o in outputs if o is not None]).sum()

    return run, inputs["x"]


def _public(name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"raccgan.kernels.{name}")
    function: Callable[..., Any] = getattr(module, name)
    return function


PUBLIC: dict[str, Callable[[tuple[Any, ...], str], Any]] = {
    "anomaly_score": lambda given, kernels: _public("anomaly_score")(*given[:4], kernels=kernels),
    "cbam": lambda given, kernels: _public("cbam")(*given, kernels=kernels),
    "depthwise_separable": lambda given, kernels: depthwise_separable(*given[:4], residual=given[4], kernels=kernels),
    "moments": lambda given, kernels: _public("moments")(*given, kernels=kernels),
}


def by_jvp(run: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    found: Tensor = torch.func.jvp(run, (x,), (t,))[1]
    return found


def by_dual_numbers(run: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, t))).tangent
    assert tangent is not None
    return tangent


def by_grad(run: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return (torch.func.grad(run)(x) * t).sum()


def by_grad_of_each(run: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """A gradient for each of two images, which vmap stacks."""
    both: Tensor = torch.func.vmap(torch.func.grad(run))(torch.stack([x, x + t]))
    return (both[0] * t).sum()


WAYS = [by_jvp, by_dual_numbers, by_grad, by_grad_of_each]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_fused_falls_back_to_right_numbers(op: str, way: Callable[..., Tensor]) -> None:
    run, x = function_of_x(op, "fused")
    torch.manual_seed(0)
    t = torch.randn_like(x)
    leaf = x.detach().requires_grad_()
    wanted = (torch.autograd.grad(run(leaf), leaf)[0] * t).sum()
    got = way(run, x, t)
    assert wanted.abs() > 1e-4
    assert_close(got, wanted, 1e-4)
    assert_close(torch.autograd.grad(run(leaf), leaf)[0], torch.func.grad(run)(x), 1e-4)  # and as before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernels", NAMED)
@pytest.mark.parametrize("op", OPS)
def test_a_backend_by_name_refuses(op: str, kernels: str, way: Callable[..., Tensor]) -> None:
    run, x = function_of_x(op, kernels)
    if kernels == "pytorch" and op not in ("depthwise_separable", "pointwise"):
        with pytest.raises(dispatch.KernelError, match=f"{op} has no pytorch backend"):
            run(x)
        return
    with pytest.raises(dispatch.KernelError, match=f"cannot serve {op}: .* --kernels reference"):
        way(run, x, torch.ones_like(x))


def test_a_forward_derivative_of_a_backward_pass_is_refused() -> None:
    """The op ran before the level began, so that only its backward could lose the tangent."""
    run, x = function_of_x("depthwise_separable", "fused")
    leaf = x.detach().requires_grad_()
    y = run(leaf)
    with forward_ad.dual_level(), pytest.raises(dispatch.KernelError, match="--kernels reference"):
        torch.autograd.grad(y, leaf, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@pytest.mark.parametrize("op", ["depthwise_separable", "moments"])
def test_compiled_together_with_the_transform(op: str) -> None:
    run, x = function_of_x(op, "fused")
    wanted = torch.func.grad(run)(x)
    torch._dynamo.reset()
    got = torch.compile(torch.func.grad(run), backend="aot_eager")(x)
    assert_close(got, wanted, 1e-5)


def test_inputs_are_found_inside_the_tuples() -> None:
    """torch.func differentiates by the weights as a whole."""
    x, weights, *_ = FAMILIES["depthwise_separable"].arguments(
        *FAMILIES["depthwise_separable"].inputs("plain", torch.float32).values()
    )
    found = torch.func.grad(lambda w: depthwise_separable(x, w).square().sum())(weights)
    leaves = [t.detach().requires_grad_() for t in weights]
    wanted = torch.autograd.grad(depthwise_separable(x, type(weights)(*leaves)).square().sum(), leaves)
    assert len(tensors(found._asdict())) == 4
    for got, one in zip(found, wanted, strict=True):
        assert_close(got, one, 1e-4)
