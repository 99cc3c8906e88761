"""The private and experimental API of PyTorch that the models use. Tested with PyTorch 2.11 to 2.13.

:mod:`raccgan.kernels.torch_internals` has that of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

__all__ = ["Decompositions", "OpOverload", "compile_errors", "storage_address", "traced", "unwrapped"]

Decompositions = Mapping[OpOverload, Callable[..., Any]]
"""What stands in place of an op in a trace."""


def traced(
    function: Callable[..., Any], inputs: Sequence[Tensor], decompositions: Decompositions | None = None
) -> GraphModule:
    """The ops that ``function`` calls on tensors like ``inputs``, autograd's among them, without those nobody reads.

    Nothing is computed: fake tensors, which have no data, go through the function, at no cost in kernels or memory.

    Raises:
        ValueError: the function decides by a tensor's value.
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


def unwrapped(op: OpOverload) -> Callable[..., Any]:
    """The op as PyTorch's C++ has it, without the Python method that calls it."""
    call: Callable[..., Any] = op.op
    return call


def compile_errors() -> tuple[type[Exception], ...]:
    """What a function from torch.compile raises if it does not compile."""
    return (torch._dynamo.exc.TorchDynamoException,)
