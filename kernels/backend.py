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

Among those that can run, ``fused`` takes the one that was measured to be the fastest, by the table of
:mod:`raccgan.kernels.measured`. For what nobody measured the order of preference decides, and on a GPU no kernel of
ours is taken then.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from raccgan.kernels import measured

NAMES = ("reference", "fused", "native", "triton")

# In order of preference, where nothing was measured: `fused` takes the first that can run. `rewritten` is PyTorch's own
# operations on less arithmetic; it has no name of its own in --kernels.
_PREFERENCE = ("native", "triton", "rewritten")
_KERNELS = ("native", "triton")

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""What the compiled CPU kernels take that write a tensor of x's dtype; they add in float32."""

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Likewise the CUDA kernels."""

CUDA_CAPABILITY = (8, 0)
"""The oldest GPU that setup.py compiles for."""


class KernelError(RuntimeError):
    """An implementation that was asked for by name cannot serve the call. One line: what, why, what would mend it."""


class Call(NamedTuple):
    """What the choice depends on: the first input's device, dtype and shape, and of what was measured the nearest."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # () for any
    kind: str = ""
    pass_: str = "forward"

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor | None = None, kind: str = "", twice: bool = False) -> Call:
        """The call of an op on x.

        Args:
            weight: one of its weights, if it has any: with x it says whether gradients are recorded.
            kind: what else its time depends on, as in the table of :mod:`raccgan.kernels.measured`.
            twice: whether it may stand in a critic under a gradient penalty.
        """
        recorded = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
        pass_ = "forward" if not recorded else "penalty" if twice else "backward"
        return cls(x.device, x.dtype, tuple(x.shape), kind, pass_)


class Implementation(NamedTuple):
    """One implementation of one family."""

    run: Callable[..., Any]
    can_run: Callable[[Call], str | None]


class Choice(NamedTuple):
    """The implementation that serves a call, and for each one passed over the reason."""

    name: str
    run: Callable[..., Any]
    passed_over: dict[str, str]  # of those that would have come first


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
    if kernels == "fused":
        return _fastest(family, implementations, call)
    reason = why_not(family, implementations, kernels, call)
    if reason is not None:
        raise KernelError(
            f"--kernels {kernels} cannot serve {family}: {reason}; --kernels fused takes the best that can run here"
        )
    return Choice(kernels, implementations[kernels].run, {})


def _fastest(family: str, implementations: Family, call: Call) -> Choice:
    passed_over: dict[str, str] = {}
    for name, by_name_only in _in_turn(family, call):
        reason = why_not(family, implementations, name, call) or by_name_only
        if reason is None:
            return Choice(name, implementations[name].run, passed_over)
        passed_over[name] = reason
    return Choice("reference", implementations["reference"].run, passed_over)


Turn = tuple[tuple[str, str | None], ...]  # whom to ask, one after the other, and why `fused` takes no other answer


def _in_turn(family: str, call: Call) -> Turn:
    """Remembered, it takes a third of a microsecond. torch.compile makes guards of the powers of two alone."""
    if not torch.compiler.is_compiling():
        return _remembered(family, call.device, call.dtype, call.shape[1:], call.kind, call.pass_)
    shape = tuple(measured.up_to_a_power_of_two(n) for n in call.shape[1:])
    return _ordered(family, call.device, call.dtype, shape, call.kind, call.pass_)


def _ordered(
    family: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], kind: str, pass_: str
) -> Turn:
    of = _class_of(family, dtype, shape, kind, pass_)
    try:
        fastest_first = measured.fastest_first(family, device, of) or ()
    except measured.TableError as error:
        raise KernelError(str(error)) from None
    others = [name for name in _PREFERENCE if name not in fastest_first and (name in _KERNELS or not fastest_first)]
    if fastest_first and device.type == "cpu":
        others = [name for name in others if name != "triton"]  # so that no call waits to hear why not
    return tuple((name, _by_name_only(name, device, name in fastest_first)) for name in (*others, *fastest_first))


# What torch.compiler.assume_constant_result does to a function; that would import all of the compiler now.
_ordered._dynamo_marked_constant = True  # type: ignore[attr-defined]
_remembered = lru_cache(maxsize=4096)(_ordered)


def _class_of(family: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str, pass_: str) -> measured.Class | None:
    """The class of calls on [N, *shape]; ``None`` for any shape."""
    if len(shape) < 2:
        return None
    channels, side = (measured.up_to_a_power_of_two(n) for n in (shape[0], max(shape[1:])))
    return measured.Class(family, pass_, kind, str(dtype).removeprefix("torch."), channels, side)


def _by_name_only(name: str, device: torch.device, measured: bool) -> str | None:
    """Why ``fused`` passes over what could run here: one line, or ``None``."""
    if name == "triton" and device.type == "cpu":
        return "interpreted, which is for tests: on a CPU it has to be asked for by name"
    if name in _KERNELS and device.type == "cuda" and not measured:
        return f"not measured on a GPU yet: --kernels {name} takes it"
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
