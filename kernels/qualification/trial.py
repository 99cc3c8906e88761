"""One recorded call, by one backend: is it right, to the order of derivative that is asked of it, and how long is it?

Right is what is as near to the reference in float64 as the reference in the call's own dtype is, up to a factor. Errors
are taken by the norm: one value at the kink of a ReLU or of a maximum falls on the other side by rounding alone, and
that must not refuse a kernel. So where a first draw of numbers is off, a second and a third one decide.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.dispatch import Backend
from raccgan.kernels.qualification.record import Like, Recorded

Run = Callable[..., Any]
Named = list[tuple[str, Tensor | None]]

SEEDS = (1, 2, 3)
SAMPLES = 3  # at most, of a comparison with float64, which takes long on most GPUs
FACTOR = 4.0  # times the reference's own error
LEAST = 32.0  # units in the last place that are allowed where the reference has none
ROUNDS = 7  # of measuring
SECONDS = 0.25  # of measuring, at most, a backend and a call

_OUTPUTS = {"cbam": 1}  # how many outputs a loss reaches: of CBAM's y, mean and var, the first


class RefusedError(Exception):
    """A backend is wrong. One line: what of it, and by how much."""


def made(recorded: Recorded, device: torch.device, samples: int, seed: int, dtype: torch.dtype | None = None) -> Any:
    """Arguments with random data, the same values in every dtype."""
    draw = torch.Generator(device).manual_seed(seed)

    def fill(value: Any) -> Any:
        if isinstance(value, Like):
            return _tensor(value, device, samples, draw, dtype)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(fill, value))
        return value

    return tuple(map(fill, recorded.arguments))


def _tensor(like: Like, device: torch.device, samples: int, draw: torch.Generator, dtype: torch.dtype | None) -> Tensor:
    t = torch.randn(like.size(samples), generator=draw, device=device)
    if like.name.endswith(".var"):
        t = t.abs() + 0.5
    elif not like.batched and t.dim() > 1:
        t = t / math.sqrt(t[0].numel())  # so that results are of the size of the input
    t = t.to(like.dtype).to(dtype or like.dtype)
    if like.channels_last:
        t = t.contiguous(memory_format=torch.channels_last)
    return t.requires_grad_(like.requires_grad)


def _tensors(value: Any, name: str = "") -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Like):
        yield value.name
    elif isinstance(value, tuple):
        for part in value:
            yield from _names(part)


def results(run: Run, recorded: Recorded, arguments: Any, *, autocast: bool = True) -> Named:
    """Outputs, gradients and second derivatives, by name; gradients of a weighted sum of the outputs."""
    found: Named = []
    pairs = zip(_names(recorded.arguments), _tensors(arguments), strict=True)
    leaves = [(name, t) for name, t in pairs if t.requires_grad]
    for second in (False, True) if recorded.second_order and leaves else (False,):
        with torch.set_grad_enabled(bool(leaves)):
            outputs = _outputs(run, recorded, arguments, autocast=autocast)
            if not second:
                found += [(f"values of output {i}", o) for i, o in enumerate(outputs)]
            loss = _weighted(outputs[: _OUTPUTS.get(recorded.kind.op)])
            if not leaves or loss is None:
                break
            if not second:
                grads = torch.autograd.grad(loss, [t for _, t in leaves], allow_unused=True)
                found += [(f"the gradient of {name}", g) for (name, _), g in zip(leaves, grads, strict=True)]
            elif leaves[0][1] is arguments[0]:
                (grad_x,) = torch.autograd.grad(loss, arguments[0], create_graph=True)
                loss = _weighted((grad_x,))
                if loss is not None:
                    grads = torch.autograd.grad(loss, [t for _, t in leaves], allow_unused=True)
                    found += [
                        (f"the second derivative of {name}", g) for (name, _), g in zip(leaves, grads, strict=True)
                    ]
    return found


def _outputs(run: Run, recorded: Recorded, arguments: Any, *, autocast: bool = True) -> tuple[Tensor, ...]:
    enabled = autocast and recorded.autocast is not None
    with torch.autocast(arguments[0].device.type, dtype=recorded.autocast or torch.bfloat16, enabled=enabled):
        output = run(*arguments)
    return output if isinstance(output, tuple) else (output,)


def _weighted(outputs: tuple[Tensor, ...]) -> Tensor | None:
    """A sum whose weights are the same in every dtype; None where no output has a gradient."""
    terms = []
    for seed, output in enumerate(outputs):
        if output.requires_grad:
            terms.append(
                (output * _weights(output.shape, output.device, seed).to(output.dtype)).sum(
                    dtype=torch.promote_types(output.dtype, torch.float32)
                )
            )
    return torch.stack([term.double() for term in terms]).sum() if terms else None


@lru_cache(maxsize=8)
def _weights(shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(1000 + seed)
    return torch.randn(shape, generator=draw, device=device).bfloat16()


class Trial:
    """What a recorded call has to give, for backends to be checked against; computed when first needed."""

    def __init__(self, recorded: Recorded, reference: Backend, device: torch.device) -> None:
        self.recorded, self.reference, self.device = recorded, reference, device

    def check(self, backend: Backend) -> float:
        """The largest relative error of a backend.

        Raises:
            RefusedError: in each draw it gives other numbers than the reference, or numbers that are not finite; or
                other bits each time.
        """
        for seed in SEEDS:
            try:
                error = self._check_few(backend, seed)
                break
            except RefusedError:
                if seed == SEEDS[-1]:
                    raise
        if backend is not self.reference:
            self._check_all(backend)
        return error

    @lru_cache(maxsize=1)  # noqa: B019  # a trial ends with its call
    def _right(self, seed: int) -> tuple[Named, Named]:
        """By the reference: in float64, and in the call's own dtype."""
        samples = min(SAMPLES, self.recorded.samples)
        wide = made(self.recorded, self.device, samples, seed, torch.float64)
        own = made(self.recorded, self.device, samples, seed)
        wanted = results(self.reference.run, self.recorded, wide, autocast=False)
        return wanted, results(self.reference.run, self.recorded, own)

    def _check_few(self, backend: Backend, seed: int) -> float:
        wanted, beside = self._right(seed)
        own = made(self.recorded, self.device, min(SAMPLES, self.recorded.samples), seed)
        got = results(backend.run, self.recorded, own)
        worst = 0.0
        for (name, g), (_, w), (_, b) in zip(got, wanted, beside, strict=True):
            allowed = FACTOR * _error(b, w, name) + LEAST * _eps(self.recorded)
            error = _error(g, w, name)
            if not error <= allowed:
                raise RefusedError(f"wrong: {name} is off by {error:.1e}, {allowed:.1e} is allowed")
            worst = max(worst, error)
        return worst

    @cached_property
    def _whole(self) -> Named:
        """Of all samples, by the reference in the call's own dtype, whose second derivatives would take long."""
        return results(self.reference.run, self.recorded._replace(second_order=False), self._arguments)

    @cached_property
    def _arguments(self) -> Any:
        return made(self.recorded, self.device, self.recorded.samples, 3)

    def _check_all(self, backend: Backend) -> None:
        """All samples, twice: the same bits."""
        first, second = (results(backend.run, self.recorded, self._arguments) for _ in range(2))
        allowed = min(0.25, 8 * math.sqrt(_eps(self.recorded)))  # a kink alone moves the square root of a unit
        samples = f"at {self.recorded.samples} samples"
        for (name, w), (_, a) in zip(self._whole, first, strict=False):
            if not (error := _error(a, w, name)) <= allowed:
                raise RefusedError(f"wrong {samples}: {name} is off by {error:.1e}, {allowed:.1e} is allowed")
        for (name, a), (_, b) in zip(first, second, strict=True):
            if a is not None and b is not None and not torch.equal(a, b):
                raise RefusedError(f"not the same bits twice: {name} {samples}")


def _eps(recorded: Recorded) -> float:
    return torch.finfo(getattr(torch, recorded.kind.dtype)).eps


def _error(got: Tensor | None, wanted: Tensor | None, name: str) -> float:
    """||got - wanted|| / ||wanted||; no gradient is one of zeros."""
    if got is None or wanted is None:
        other = wanted if got is None else got
        return 0.0 if other is None or other.numel() == 0 else float(other.detach().double().norm())
    if got.shape != wanted.shape:
        raise RefusedError(f"wrong: {name} is {list(got.shape)}, not {list(wanted.shape)}")
    if not bool(got.isfinite().all()):
        raise RefusedError(f"wrong: {name} is not finite")
    if got.numel() == 0:
        return 0.0
    wanted = wanted.detach().double()
    least = 1e-3 * math.sqrt(wanted.numel())  # what should be zero is compared with the size of the data
    return float((got.detach().double() - wanted).norm() / wanted.norm().clamp_min(least))


def times(
    recorded: Recorded, backends: Mapping[str, Backend], device: torch.device, say: Callable[[str], None]
) -> dict[str, float]:
    """Milliseconds of a call by each backend, derivatives included: medians of rounds that take turns.

    ``say`` is told whose turn it is.
    """
    arguments = made(recorded, device, recorded.samples, 4)
    first = {}
    for name, backend in backends.items():
        say(name)
        first[name] = _timed(backend.run, recorded, arguments, device)  # compiles, and fills caches
        if first[name] < 1e3:
            first[name] = _timed(backend.run, recorded, arguments, device)
    found: dict[str, list[float]] = {name: [] for name in backends}
    contenders = [name for name in backends if first[name] < 3 * min(first.values())]
    for _ in range(ROUNDS):
        for name, backend in backends.items():
            if name in contenders and sum(found[name]) < 1e3 * SECONDS:
                say(name)
                repeats = max(1, min(20, round(0.5 / max(first[name], 1e-3))))  # half a millisecond at least
                spent = sum(_timed(backend.run, recorded, arguments, device) for _ in range(repeats))
                found[name].append(spent / repeats)
    return {name: median(spent) if spent else first[name] for name, spent in found.items()}


def _timed(run: Run, recorded: Recorded, arguments: Any, device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        results(run, recorded, arguments)
        return 1e3 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    results(run, recorded, arguments)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)
