"""PyTorch's tracer and its compiler, by API of which some is private. Tested with PyTorch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from raccgan.errors import InputError

Decompositions = Mapping[OpOverload, Callable[..., Any]]  # what stands in place of an op in a trace


def traced(
    function: Callable[..., Any], inputs: Sequence[Tensor], decompositions: Decompositions | None = None
) -> GraphModule:
    """The ops that ``function`` calls on tensors like ``inputs``, autograd's among them, without those nobody reads.

    Nothing is computed: fake tensors, which have no data, go through the function, at no cost in kernels or memory.
    A ValueError if the function decides by a tensor's value.
    """
    trace = make_fx(
        lambda *tensors: function(*tensors),  # make_fx counts a method's arguments with self
        decomposition_table=decompositions,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,  # weights and buffers, which stay the networks' own
    )
    try:
        graph = trace(*inputs)
    except GuardOnDataDependentSymNode as error:
        raise ValueError("what decides by a tensor's value cannot be traced: a replay would not decide anew") from error
    graph.graph.eliminate_dead_code()
    return graph


def storage_address(t: Tensor) -> int:
    """What identifies the memory of a tensor, also of a fake one, which has no data pointer."""
    return t.untyped_storage()._cdata


class CompileError(InputError):
    """``what`` does not compile on this machine, for ``reason``: there is no C++ compiler, or it fails."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} does not compile here: {reason}; without compiling it runs")
        self.what, self.reason = what, reason


def compiled(function: Callable[..., Any], what: str, **options: Any) -> Callable[..., Any]:
    """The function through torch.compile with these options, in one graph; the first call takes seconds to minutes.

    If PyTorch cannot compile it, that call raises a CompileError with ``what`` and the first paragraph of the reason.
    """
    generated = torch.compile(function, fullgraph=True, **options)

    def run(*arguments: Any) -> Any:
        try:
            return generated(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # A paragraph and not a line: the first line may only name the PyTorch backend that raised the second.
            raise CompileError(what, " ".join(str(error).strip().partition("\n\n")[0].split())) from None

    return run
