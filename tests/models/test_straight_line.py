"""A trace as straight-line code: the same values, each tensor freed after its last reader."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raccgan.models.compiling import traced
from raccgan.models.straight_line import straight_line


def every_kind(x: Tensor, index: Tensor) -> dict[str, Any]:
    """Tuples, keywords, dtypes, numbers that are no literals, an operation in place, results that nobody reads."""
    first, second = x.split(2, dim=1)
    clamped = torch.clamp(first, min=-float("inf"), max=1.5)
    y = torch.empty_like(second, memory_format=torch.contiguous_format).copy_(clamped)
    y.add_(second, alpha=2)
    torch.exp(x)
    return {"y": y.to(torch.float64), "rows": [x[index], (y.mean(dim=(0, 1)), None, 3)]}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and all(same(one, other) for one, other in zip(a, b, strict=True))
    return bool(a == b)


def test_it_computes_what_was_traced() -> None:
    x, index = torch.randn(3, 4), torch.tensor([2, 0])
    line = straight_line(traced(every_kind, [x, index]))
    for _ in range(2):
        x = torch.randn(3, 4)
        assert same(line(x, index), every_kind(x, index))


class Ops(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("constant", [False, True])
def test_weights_are_the_networks_own(constant: bool) -> None:
    """Also as views of them, which are taken once where they are constant, and see what changes in place."""
    model = nn.Linear(3, 2)
    line = straight_line(traced(lambda x: model(x), [torch.zeros(1, 3)]), constant=constant)
    with torch.no_grad():
        model.weight.mul_(-2)
        model.bias.add_(1)
        x = torch.randn(5, 3)
        with Ops() as called:
            got = line(x)
        assert torch.equal(got, model(x))
    assert called.names == [*([] if constant else ["aten.t.default"]), "aten.addmm.default"]


def test_a_long_list_is_the_same_function() -> None:
    """Its variables are used again: a result must not be overwritten while something still reads it."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(500):
            x = x / 2 + x.sin()
        return x

    line = straight_line(traced(chain, [torch.zeros(2)]))
    x = torch.randn(2)
    assert torch.equal(line(x), chain(x))


@pytest.mark.parametrize("read_again", [False, True])
def test_a_tensor_is_freed_after_its_last_reader(read_again: bool) -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def watch(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        return x + 1

    def ask(x: Tensor) -> Tensor:
        alive.append(seen[0]() is not None)
        return x * 2

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.neg, (x,))
    after = graph.call_function(ask, (graph.call_function(watch, (made,)),))
    graph.output(graph.call_function(torch.add, (after, made)) if read_again else after)
    line = straight_line(torch.fx.GraphModule(nn.Module(), graph))
    assert torch.equal(line(torch.ones(2)), torch.full((2,), -1.0 if read_again else 0.0))
    assert alive == [read_again]
