"""Every implementation on the shared grid: values, gradients of first and second order, layouts, poisoned buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import allowed_beside, assert_close, assert_each_close, largest
from tests.kernels.grid import (
    DTYPES,
    FAMILIES,
    LAYOUTS,
    Family,
    Inputs,
    OwnOps,
    grid,
    leaves,
    skip_unless_served,
    tensors,
)


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that is made without values is full of NaN."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def first_order(family: Family, implementation: str, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a sum that weighs every output differently."""
    made = leaves(inputs)
    return dict(zip(tensors(made), _gradients(_weighed(family.run(implementation, made)), made), strict=True))


def second_order(family: Family, implementation: str, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a gradient penalty: of the squared norm of the gradients with respect to every tensor."""
    made = leaves(inputs)
    first = _gradients(_weighed(family.run(implementation, made)), made, create_graph=True)
    penalty = sum((g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in first), torch.zeros(()))
    return dict(zip(tensors(made), _gradients(penalty, made), strict=True))


def through_penalty(family: Family, implementation: str, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of WGAN-GP's penalty: of the squared norm of one gradient, the first output's of the first tensor."""
    made = leaves(inputs)
    output = family.run(implementation, made)[0]
    x = next(iter(tensors(made)))
    first = _gradients(_weighed((output + output.square(),)), {x: made[x]}, create_graph=True)[0]
    penalty = first.to(torch.promote_types(first.dtype, torch.float32)).square().sum()
    return dict(zip(tensors(made), _gradients(penalty, made), strict=True))


def _weighed(outputs: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for i, output in enumerate(outputs):
        weights = torch.linspace(0.5, 1.5 + i, max(1, output.numel()), dtype=torch.float64, device=output.device)
        total = total + (output.double() * weights[: output.numel()].view(output.shape)).sum()
    return total


def _gradients(value: Tensor, made: Inputs, create_graph: bool = False) -> list[Tensor]:
    wanted = list(tensors(made).values())
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in wanted]
    found = torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@grid()
def test_forward(family: Family, implementation: str, case: str, device: str, dtype: torch.dtype, layout: str) -> None:
    inputs = family.inputs(case, dtype, device, layout)
    skip_unless_served(family, implementation, inputs)
    with poisoned():
        got = family.run(implementation, inputs)
    beside = family.run("reference", inputs)
    wanted = family.run("reference", {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()})
    assert len(got) == len(beside)
    for i, (g, b, w) in enumerate(zip(got, beside, wanted, strict=True)):
        assert_close(g, w, allowed_beside(b, w), dtype=b.dtype, what=f"output {i}")


@pytest.mark.parametrize("order", [first_order, second_order, through_penalty])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@grid()
def test_gradients(family: Family, implementation: str, case: str, device: str, layout: str, order: object) -> None:
    assert callable(order)
    inputs = family.inputs(case, torch.float32, device, layout)
    skip_unless_served(family, implementation, inputs)
    with poisoned():
        got = order(family, implementation, inputs)
    beside = order(family, "reference", inputs)
    wanted = order(family, "reference", family.inputs(case, torch.float64, device, layout))
    # A gradient may be a sum that cancels (a norm's bias, a bias before a norm): then it may miss by a hundred
    # thousandth of the largest gradient.
    absolute = 1e-5 * min(1.0, largest(g.abs().max().item() for g in wanted.values() if g.numel()))
    for name in wanted:
        allowed = allowed_beside(beside[name], wanted[name])
        assert_close(got[name], wanted[name], allowed, absolute=absolute, dtype=torch.float32, what=name)


@grid(reference=True)
def test_gradgradcheck(family: Family, implementation: str, case: str, device: str) -> None:
    """Numerical derivatives in float64, for whoever takes it; the others are held to the reference above."""
    inputs = family.inputs(case, torch.float64, device)
    if implementation != "reference":
        skip_unless_served(family, implementation, inputs)
    if case in ("ties", "empty"):
        pytest.skip(f"no finite difference at {case}: a max is not differentiable there, or there is nothing to move")
    made = leaves(inputs)
    arguments = tuple(tensors(made).values())

    def run(*moved: Tensor) -> tuple[Tensor, ...]:
        outputs = family.run(implementation, {**made, **dict(zip(tensors(made), moved, strict=True))})
        return tuple(output for output in outputs if output.requires_grad)

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(run, arguments, **fast)
    assert torch.autograd.gradgradcheck(run, arguments, **fast)


@grid()
def test_gradients_of_any_subset(family: Family, implementation: str, case: str, device: str) -> None:
    """Asking for one tensor's gradient gives what asking for all gives, and nothing for the others."""
    inputs = family.inputs(case, torch.float32, device)
    skip_unless_served(family, implementation, inputs)
    wanted = first_order(family, implementation, inputs)
    for name in wanted:
        made = leaves(inputs, {name})
        value = _weighed(family.run(implementation, made))
        if value.requires_grad:
            (got,) = torch.autograd.grad(value, [made[name]], allow_unused=True)
            assert_close(torch.zeros_like(made[name]) if got is None else got, wanted[name], 1e-5, what=name)


@grid()
def test_deterministic(family: Family, implementation: str, case: str, device: str) -> None:
    inputs = family.inputs(case, torch.float32, device)
    skip_unless_served(family, implementation, inputs)
    first, again = family.run(implementation, inputs), family.run(implementation, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@grid(reference=True, cases=False)
def test_compiles_in_one_graph(family: Family, implementation: str, case: str, device: str) -> None:
    inputs = family.inputs(case, torch.float32, device)
    if implementation != "reference":
        skip_unless_served(family, implementation, inputs)
    made = leaves(inputs)
    torch._dynamo.reset()  # it gives up on a function after eight different calls, and here are more
    compiled = torch.compile(
        family.taking_inputs(implementation),
        fullgraph=True,
        backend="aot_eager",
    )
    result = compiled(*made.values())
    outputs = result if isinstance(result, tuple) else (result,)
    for got, wanted in zip(outputs, family.run(implementation, made), strict=True):
        assert_close(got, wanted, 1e-5)
    _weighed(outputs).backward()
    assert made["x"].grad is not None


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""All that torch.library.opcheck knows."""


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=() if one == "channels_last" else pytest.mark.long) for one in LAYOUTS]
)
@grid()
def test_opcheck(
    family: Family, implementation: str, case: str, device: str, layout: str, pytestconfig: pytest.Config
) -> None:
    """Every op of ours that an implementation calls, forward and backward, with the inputs it calls it with.

    The short run has each op traced with changing shapes, which takes longest, at its family's first case alone.
    """
    tried = list(OPCHECKS)
    if case != next(iter(family.cases)) and not pytestconfig.getoption("long"):
        tried.remove("test_aot_dispatch_dynamic")
    inputs = family.inputs(case, torch.float32, device, layout)
    skip_unless_served(family, implementation, inputs)
    with OwnOps() as own:
        first_order(family, implementation, inputs)
    checked = set()
    for op, arguments in own.calls:
        kind = (op, tuple(a.dim() if isinstance(a, Tensor) else a for a in arguments))
        if kind in checked:  # the same op in the same way
            continue
        checked.add(kind)
        fresh = tuple(a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments)
        # Whether numbers are right other tests say; two ways of tracing one op were 1.3e-5 apart on an Intel Xeon.
        torch.library.opcheck(op, fresh, test_utils=tried, atol=1e-4, rtol=1e-4)
    assert (
        own.calls
        or implementation not in ("native", "triton")
        or inputs.get("depthwise_weight", torch.empty(1)).shape[-1] == 1
    )


def test_ties_share_the_gradient_evenly() -> None:
    """All-zero features, as after a ReLU: every place of the max gets the same gradient in every implementation."""
    family = FAMILIES["cbam"]
    for implementation in family.implementations:
        inputs = leaves(family.inputs("instance", torch.float32))
        inputs["x"] = torch.zeros(1, 4, 3, 3, requires_grad=True)
        inputs["reduce_weight"] = inputs["reduce_weight"].detach()[:, :4].requires_grad_()
        inputs["expand_weight"] = inputs["expand_weight"].detach()[:4].requires_grad_()
        inputs["expand_bias"] = inputs["expand_bias"].detach()[:4].requires_grad_()
        skip_unless_served(family, implementation, inputs)
        y = family.run(implementation, inputs)[0]
        (g,) = torch.autograd.grad(y.sum(), inputs["x"])
        assert_each_close(g, g[:, :, :1, :1], rtol=1e-5, atol=1e-6)
