"""Every private API of PyTorch that the kernels use, each with its substitute where PyTorch no longer has it.

Tested with PyTorch 2.11 to 2.15. A later version may rename any of them; results then stay right.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])

_will_execute = getattr(torch._C, "_will_engine_execute_node", None)
_functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", bool)
_forward_mode: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=-1)
_has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)


def will_execute(node: Any) -> bool:
    """Whether the backward pass that runs now goes through a node of the graph. Fallback: True, for work in vain."""
    if _will_execute is None:
        return True
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # what PyTorch says of a leaf that autograd.grad was asked for
        return True


def transform() -> str | None:
    """Which derivative or map other than reverse-mode autograd is being taken now; ``None`` for none, and as fallback:
    torch.func then raises what PyTorch says of an autograd.Function.
    """
    if _functorch_active():
        return "torch.func"
    return "forward-mode AD" if forward_mode() else None


def forward_mode() -> bool:
    """Whether forward-mode AD is on. Fallback: False."""
    return bool(_forward_mode._current_level >= 0)


def has_kernel(op: str, key: str) -> bool:
    """Whether a registered op has a kernel for a dispatch key, "CPU" or "CUDA". Fallback: False."""
    return _has_kernel is not None and bool(_has_kernel(op, key))


def has_amx() -> bool:
    """Whether this processor multiplies bfloat16 in AMX tiles. Fallback: False."""
    return _amx is not None and bool(_amx())


def constant(function: F) -> F:
    """Have torch.compile call a function of constants while it traces, and take its result as a constant.

    The public decorator ``torch.compiler.assume_constant_result`` sets the same attribute, but imports all of the
    compiler. Fallback: torch.compile traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
