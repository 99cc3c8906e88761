"""Which implementation serves which call, and why not the others. The only place that decides.

``--kernels`` takes one of four names:

=========== ==============================================================================================
reference   plain PyTorch: the definition of each op, any device, dtype and order of derivative
fused       the best implementation for the call; falls back per op, ``raccgan.doctor`` says where and why
native      the compiled extension (C++ on a CPU, CUDA C++ on a GPU); an error where it cannot serve a call
triton      the Triton kernels; an error where they cannot serve a call. On a CPU interpreted, never by ``fused``
=========== ==============================================================================================

A family's implementation is a module with a function of the family's name and, beside it,
``can_run(call) -> str | None``: ``None`` where it serves the call, else one line that says why not. The same
line is the reason for the automatic choice and the message of an explicit one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

NAMES = ("reference", "fused", "native", "triton")

# In order of preference: `fused` takes the first that can run. `rewritten` is PyTorch's own operations on less
# arithmetic; it has no name of its own in --kernels.
_PREFERENCE = ("native", "triton", "rewritten")
_KERNELS = ("native", "triton")

TRIED_ON_A_GPU: tuple[str, ...] = ()
"""Whose kernels have been run and measured on a GPU by ``pytest tests bench``; ``fused`` takes no others there."""

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""What the compiled CPU kernels take that write a tensor of x's dtype; they add in float32."""

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Likewise the CUDA kernels."""

CUDA_CAPABILITY = (8, 0)
"""The oldest GPU that setup.py compiles for."""


class KernelError(RuntimeError):
    """An implementation that was asked for by name cannot serve the call. One line: what, why, what would mend it."""


class Call(NamedTuple):
    """What the choice depends on: the first input's device, dtype and shape."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: torch.Tensor) -> Call:
        return cls(x.device, x.dtype, tuple(x.shape))


class Implementation(NamedTuple):
    """One implementation of one family."""

    run: Callable[..., Any]
    can_run: Callable[[Call], str | None]


class Choice(NamedTuple):
    """The implementation that serves a call, and for each one passed over the reason."""

    name: str
    run: Callable[..., Any]
    passed_over: dict[str, str]


Family = Mapping[str, Implementation]


def choose(family: str, implementations: Family, kernels: str, call: Call) -> Choice:
    """Pick who serves ``call`` of ``family`` under the name ``kernels``.

    Raises:
        KernelError: ``kernels`` is no name, or names an implementation that cannot serve the call.
    """
    if kernels not in NAMES:
        raise KernelError(f"no kernels called {kernels!r}; choose from {', '.join(NAMES)}")
    if kernels == "reference":
        return Choice("reference", implementations["reference"].run, {})
    passed_over: dict[str, str] = {}
    for name in _PREFERENCE if kernels == "fused" else (kernels,):
        reason = why_not(family, implementations, name, call)
        if reason is None and kernels == "fused":
            reason = _by_name_only(name, call)
        if reason is None:
            return Choice(name, implementations[name].run, passed_over)
        passed_over[name] = reason
    if kernels == "fused":
        return Choice("reference", implementations["reference"].run, passed_over)
    raise KernelError(
        f"--kernels {kernels} cannot serve {family}: {passed_over[kernels]}; "
        "--kernels fused takes the best that can run here"
    )


def _by_name_only(name: str, call: Call) -> str | None:
    """Why ``fused`` passes over what could run here: one line, or ``None``."""
    if name == "triton" and call.device.type == "cpu":
        return "interpreted, which is for tests: on a CPU it has to be asked for by name"
    if name in _KERNELS and call.device.type == "cuda" and name not in TRIED_ON_A_GPU:
        return f"not tried on a GPU yet: --kernels {name} takes it"
    return None


def why_not(family: str, implementations: Family, name: str, call: Call) -> str | None:
    """Why ``name`` cannot serve ``call`` of ``family``: one line, or ``None`` where it can."""
    implementation = implementations.get(name)
    if implementation is None:
        return f"{family} has no {name} implementation in this version"
    return implementation.can_run(call)


def always(call: Call) -> str | None:
    """``can_run`` of what PyTorch's own operations serve: the references, and their rearrangements."""
    return None


def compiled_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the compiled kernels take that write a tensor of x's dtype, on the device."""
    return CUDA_DTYPES if device.type == "cuda" else CPU_DTYPES


def not_compiled(call: Call, kernels: str, cuda: str) -> str | None:
    """``can_run`` of compiled kernels that write a tensor of x's dtype.

    ``kernels`` names them, ``cuda`` is the version of the toolkit that the library was built with, empty without one.
    """
    if call.device.type not in ("cpu", "cuda"):
        return f"there are no compiled {kernels} kernels for {call.device.type}"
    dtypes = compiled_dtypes(call.device)
    if call.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the compiled {kernels} kernels add in float32 and take {', '.join(names)} and {last}, not {call.dtype}"
    return not_on_a_gpu(call, cuda) if call.device.type == "cuda" else None


def not_on_a_gpu(call: Call, cuda: str) -> str | None:
    """Why no CUDA kernel of the library runs on the call's GPU, ``None`` where they do; ``cuda`` as above."""
    if not cuda:
        return 'the CUDA part is not compiled in: run "pip install -e ." where nvcc is on PATH or CUDA_HOME is set'
    if torch.cuda.is_available() and torch.cuda.get_device_capability(call.device) < CUDA_CAPABILITY:
        return "the CUDA kernels are compiled for GPUs of compute capability {}.{} and later".format(*CUDA_CAPABILITY)
    return None


def families() -> dict[str, Family]:
    """Every family with its implementations, for ``raccgan.doctor`` and the tests."""
    names = ("depthwise_separable", "moments", "cbam", "anomaly_score")
    return {name: importlib.import_module(f"raccgan.kernels.{name}").IMPLEMENTATIONS for name in names}


def require(kernels: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Choice]:
    """Resolve ``kernels`` for every family before a long run starts, so that it fails at once or not at all.

    Raises:
        KernelError: as :func:`choose`, for the first family that cannot be served.
    """
    call = Call(device, dtype, ())
    return {family: choose(family, table, kernels, call) for family, table in families().items()}
