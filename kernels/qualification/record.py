"""Lists the calls of ops that a function makes, on tensors without data: nothing is computed, and no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from raccgan.kernels import dispatch
from raccgan.kernels.qualification.table import Class


class Like(NamedTuple):
    """A tensor, without its data."""

    name: str  # of the argument, such as "weights.depthwise"
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    requires_grad: bool
    batched: bool  # its first dimension is the number of samples

    def size(self, samples: int) -> tuple[int, ...]:
        """Its shape for another number of samples."""
        return (samples, *self.shape[1:]) if self.batched else self.shape


class Recorded(NamedTuple):
    """One call of an op."""

    kind: Class
    arguments: tuple[Any, ...]  # of a backend's ``run``, with :class:`Like` in the place of tensors
    samples: int
    autocast: torch.dtype | None  # the dtype in which autocast computed; None where it was off
    second_order: bool  # its gradient is differentiated again

    @property
    def work(self) -> int:
        """Values of the first input: by it the classes are ordered, so that what takes longest is tried first."""
        return int(torch.Size(self.arguments[0].shape).numel())


def recorded(function: Callable[[], Any], *, second_order: bool = False) -> list[Recorded]:
    """The calls of ops in ``function``, each once, in order of their first appearance.

    ``function`` runs on fake tensors, real ones that it reaches included, and must not decide by a tensor's value.
    ``second_order``: its calls stand under a gradient penalty.
    """
    found: dict[Recorded, None] = {}
    with _listening(lambda one: found.setdefault(one), second_order), FakeTensorMode(allow_non_fake_inputs=True):
        function()
    return list(found)


@contextmanager
def _listening(heard: Callable[[Recorded], object], second_order: bool) -> Iterator[None]:
    """Put in the place of every op's backends its reference, which tells of each call."""
    tables: dict[str, Any] = dispatch.tables()
    kept = {op: dict(backends) for op, backends in tables.items()}
    for op, backends in tables.items():
        backends.clear()
        backends["reference"] = _telling(op, kept[op]["reference"].run, heard, second_order)
    try:
        yield
    finally:
        for op, backends in tables.items():
            backends.clear()
            backends.update(kept[op])


def _telling(op: str, run: Callable[..., Any], heard: Callable[[Recorded], object], second: bool) -> dispatch.Backend:
    names = [*signature(run).parameters]  # of the reference's arguments, and "_" for what it does not read
    calls: list[dispatch.Call] = []  # the last one that the dispatcher asked about: that which it runs next

    def supports(call: dispatch.Call) -> None:
        calls[:] = [call]

    def tell(*arguments: Any) -> Any:
        (call,) = calls
        kind = Class.of(op, call.dtype, call.shape, call.kernel_size)
        samples, device = call.shape[0], call.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        told = tuple(_described(a, name, samples) for a, name in zip(arguments, names, strict=False))
        heard(Recorded(kind, told, samples, autocast, second))
        return run(*arguments)

    return dispatch.Backend(supports, tell)


def _described(value: Any, name: str, samples: int) -> Any:
    """An argument without data. What a backend packed for itself is left out: another one could not read it."""
    if name in ("packed", "_"):
        return None
    if isinstance(value, Tensor):
        # Weights of C channels may look like a batch of C samples.
        batched = not name.startswith(("weight", "bias", "norm")) and value.dim() > 0 and value.shape[0] == samples
        strided = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        requires = value.requires_grad and torch.is_grad_enabled()
        return Like(name, tuple(value.shape), value.dtype, strided, requires, batched)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = (_described(v, f"{name}.{field}", samples) for field, v in zip(value._fields, value, strict=True))
        return type(value)(*parts)
    return value
