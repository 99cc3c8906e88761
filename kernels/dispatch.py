"""The dispatcher: which backend serves a call. No other module decides that, falls back or asks what hardware there is.

=========== ==============================================================================================
reference   plain PyTorch: the definition of each op, any device, dtype and kind of derivative
pytorch     PyTorch's own ops on less arithmetic, any device and dtype; for tests and benchmarks to ask for
native      the compiled extension: C++ on a CPU, CUDA C++ on a GPU
triton      the Triton kernels, on a GPU
fused       automatic choice: the fastest by qualification, or the first of the above that serves the call
=========== ==============================================================================================

On a GPU ``fused`` takes native and triton where :mod:`raccgan.kernels.qualification` has tried calls of that class on
that device, and they were right and faster. On a CPU the order is native, pytorch, reference, unless a user has had the
backends qualified there.

A backend that is asked for by name serves the call or refuses with a :class:`KernelError`. Only ``fused`` falls back,
and logs each reason once to the logger ``raccgan.kernels`` at level DEBUG. ``python -m raccgan.doctor`` prints them.

The public function of an op checks its arguments, calls :func:`choose` once, and calls the ``run`` of the answer.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from raccgan.kernels import library, probe, torch_internals
from raccgan.kernels.qualification import table

NAMES = ("reference", "fused", "native", "triton")  # what --kernels takes
BACKENDS = ("native", "triton", "pytorch", "reference")  # in the order in which ``fused`` asks them
COMPILED_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

_logger = logging.getLogger("raccgan.kernels")
_logged: set[tuple[str, str, str]] = set()

# Settled once, at import, so that torch.compile sees constants.
_MISSING = library.why_not()
_CUDA = library.cuda()


class KernelError(RuntimeError):
    """A backend that was asked for by name cannot serve the call. One line: what, why, what would mend it."""


class Call(NamedTuple):
    """What the choice depends on. A tuple, because each call of an op makes one."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic: autocast's, where that is on and the op follows it
    shape: tuple[int, ...] = ()  # of the first input; () for any
    kernel_size: int = 0  # of a convolution: k of k x k; 0 for any
    transform: str | None = None  # "torch.func" or "forward-mode AD", where the call is differentiated by it

    @classmethod
    def of(cls, x: torch.Tensor, kernel_size: int = 0, dtype: torch.dtype | None = None) -> Call:
        """The call of an op whose first input is x; ``dtype`` where that is not x's."""
        return cls(x.device, dtype or x.dtype, x.shape, kernel_size, torch_internals.transform())


@dataclass(frozen=True)
class Backend:
    """One implementation of one op."""

    supports: Callable[[Call], str | None]  # None where the backend serves the call, else one line that says why not
    run: Callable[..., Any]  # the op; it serves every call that ``supports`` accepts


Backends = Mapping[str, Backend]  # an op's, by name; "reference" is one of them


class Choice(NamedTuple):
    """The backend that serves a call, of :func:`choose`."""

    name: str
    run: Callable[..., Any]
    refused: Mapping[str, str] = {}  # by backend that ``fused`` would have preferred: why it was not taken


def choose(op: str, backends: Backends, kernels: str, call: Call) -> Choice:
    """The backend that serves ``call`` of ``op`` under the name ``kernels``; a KernelError if none does."""
    if kernels != "fused":
        if kernels not in BACKENDS:
            raise KernelError(f"no kernels called {kernels!r}; choose from {', '.join(NAMES)}")
        reason = _refusal(backends[kernels], kernels, call) if kernels in backends else f"{op} has no {kernels} backend"
        if reason is None:
            return Choice(kernels, backends[kernels].run)
        raise KernelError(
            f"--kernels {kernels} cannot serve {op}: {reason}; --kernels fused takes the best that can run here"
        )
    refused: dict[str, str] = {}
    found = table.row(op, call.device, call.dtype, call.shape, call.kernel_size)
    for name in BACKENDS if found is None else dict.fromkeys((*found.order, *BACKENDS)):
        if name not in backends:
            continue
        reason = _refusal(backends[name], name, call) or _left_out(name, call, found)
        if reason is None:
            return Choice(name, backends[name].run, refused if found is None else {**found.refused, **refused})
        refused[name] = reason
        _log_once(op, name, reason)
    raise KernelError(f"no backend serves {op}: " + "; ".join(f"{name}: {reason}" for name, reason in refused.items()))


def _refusal(backend: Backend, name: str, call: Call) -> str | None:
    if call.transform is not None and name != "reference":
        # Their derivatives are registered for reverse-mode autograd alone.
        return f"{call.transform} differentiates PyTorch's own operations alone: --kernels reference is made of those"
    return backend.supports(call)


def _left_out(name: str, call: Call, found: table.Row | None) -> str | None:
    """Why ``fused`` does not take a backend that could serve the call."""
    if found is not None:
        return None if name in found.order else found.refused.get(name)
    if name in ("native", "triton") and call.device.type == "cuda":
        return f"calls of this class were not tried on this GPU: --kernels {name} takes it"
    # Measured on two cores of an AMD EPYC on 30 November 2026 (bench/results/dispatch-amd-epyc.json): 293 classes of
    # calls together took 1709.7 ms by native alone, 1706.4 ms with this rule, and 1701.4 ms by the fastest of each.
    if name == "native" and call.kernel_size == 1 and call.shape[1:2] == (1,):
        return "PyTorch's operations were measured to be faster for a 1x1 convolution of one channel"
    return None


@torch_internals.constant
def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _logged:
        _logged.add((op, name, reason))
        _logger.debug("%s: not %s: %s", op, name, reason)


def always(call: Call) -> str | None:
    """``supports`` of what PyTorch's own operations serve."""
    return None


def compiled(call: Call, kernels: str, device: str | None = None) -> str | None:
    """``supports`` of compiled kernels, called ``kernels``, that take the dtypes of ``device``, or of the call's."""
    if _MISSING is not None:
        return _MISSING
    if call.device.type not in COMPILED_DTYPES:
        return f"there are no compiled {kernels} kernels for {call.device.type}"
    dtypes = COMPILED_DTYPES[device or call.device.type]
    if call.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"the compiled {kernels} kernels add in float32 and take {', '.join(names)} and {last}, not {call.dtype}"
    if call.device.type != "cuda":
        return None
    if not _CUDA:
        return 'the CUDA part is not compiled in: run "pip install -e ." where nvcc is on PATH or CUDA_HOME is set'
    return probe.refusal(call.device)


def ops() -> dict[str, Backends]:
    """Every op with its backends, for ``raccgan.doctor`` and the tests."""
    names = ("depthwise_separable", "moments", "cbam", "anomaly_score")
    return {name: importlib.import_module(f"raccgan.kernels.{name}").BACKENDS for name in names}


def tables() -> dict[str, Backends]:
    """The backends of every op by the name under which its calls are chosen: those of :func:`ops`, and pointwise."""
    return ops() | {"pointwise": importlib.import_module("raccgan.kernels.depthwise_separable.op").POINTWISE}


def require(kernels: str, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Choice]:
    """Resolve ``kernels`` for every op before a long run starts; a KernelError for the first that is not served."""
    call = Call(device, dtype)
    return {op: choose(op, backends, kernels, call) for op, backends in ops().items()}
