"""Trace a training step once into a flat list of ops; then replay the list, or compile it.

torch.compile does not differentiate twice, as a gradient penalty requires. So autograd runs first and the ops that it
calls, those of both derivatives among them, are traced. Replayed, they give the same bits without the time of Python
and autograd between the kernels, which is a quarter of a small image's score; and torch.compile takes the list.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from raccgan.errors import InputError
from raccgan.models import compiling
from raccgan.models.compiling import Decompositions, storage_address, traced
from raccgan.models.straight_line import straight_line

Terms = dict[str, Tensor]  # what is reported of a step: scalars without graph, by name

Objective = Callable[..., tuple[Tensor, Terms]]  # of a step's tensors: a differentiable loss, and what is reported

OFTEN = 200  # calls after which a trace pays: it takes as long as it saves in a hundred to five hundred calls

_Layout = tuple[torch.Size, tuple[int, ...]]
_Found = tuple[Terms, list[Tensor | None]]  # the terms, and a gradient for each weight that the loss depends on


class TracedStep:
    """The terms of an objective and the gradients of ``weights``, traced at the first call and then replayed.

    Python's control flow is frozen at the first call: backends, trainable weights, shapes, memory formats. The
    objective must not decide by a tensor's value nor draw random numbers. Weights and buffers remain the networks' own.
    In float32 the replay gives the bits that autograd gives. In autocast the gradients of a weight that is used more
    than once are added in float32, since each use is a cast of its own.

    Args:
        networks: all whose buffers the objective may update.
        compiled: torch.compile turns the list into C++, in one to two minutes: the same up to rounding.
        rounded: the objective is of bfloat16, in which the gradients of a new network are mostly rounding: those of the
            compiled list are not compared with autograd's, as they are otherwise.
        warn: is told, in one line, if the list does not compile and is replayed; without it the first call raises.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Sequence[nn.Parameter],
        networks: Iterable[nn.Module],
        *,
        compiled: bool = False,
        rounded: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._objective, self._weights = objective, weights
        self._compiled, self._rounded, self._warn = compiled, rounded, warn
        self._buffers = [buffer for network in networks for buffer in network.buffers()]
        self._layouts: list[_Layout] = []
        self._replay: Callable[..., _Found] | None = None

    def __call__(self, *inputs: Tensor) -> Terms:
        """Leave the gradients in the weights' ``grad``, as ``backward`` does if there are none, and return the terms.

        A ValueError if shapes or memory formats differ from the first call's, or the objective decides by a value. At
        the first call, a CompileError if there is no ``warn``, and an InputError if the compiled list is wrong.
        """
        layouts = [_layout(t) for t in inputs]
        if self._replay is None:
            self._replay, self._layouts = self._trace(inputs), layouts
        elif layouts != self._layouts:
            raise ValueError(f"traced for tensors of these shapes and strides: {self._layouts}; got {layouts}")
        with torch.no_grad():
            terms, gradients = self._replay(*inputs)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        return terms

    def _trace(self, inputs: Sequence[Tensor]) -> Callable[..., _Found]:
        before = [buffer.clone() for buffer in self._buffers]
        try:
            if self._compiled:
                try:
                    return self._compile(inputs, before)
                except compiling.CompileError as error:
                    if self._warn is None:
                        raise
                    self._warn(f"{error.what} does not compile here: {error.reason}; it goes on without compiling")
            return straight_line(traced(self._differentiated, inputs))
        finally:
            self._restore(before)  # a trace counts batches too: make_fx takes the scalar count for a constant

    def _compile(self, inputs: Sequence[Tensor], before: Sequence[Tensor]) -> Callable[..., _Found]:
        graph = traced(self._differentiated, inputs, _COMPILED_OTHERWISE)
        graph.recompile()  # torch.fx's own function of the list, which torch.compile reads
        replay = compiling.compiled(graph, "the training step", dynamic=False)
        self._restore(before)
        wanted = self._differentiated(*inputs)
        self._restore(before)
        with torch.no_grad():
            _require_alike(replay(*inputs), wanted, rounded=self._rounded)
        return replay

    @torch.no_grad()
    def _restore(self, before: Sequence[Tensor]) -> None:
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(value)

    def _differentiated(self, *inputs: Tensor) -> _Found:
        with torch.enable_grad():
            loss, terms = self._objective(*inputs)
        found = torch.autograd.grad(loss, self._weights, allow_unused=True)
        return terms, _as_by_backward(found, self._weights, inputs)


class Replayed:
    """A function of tensors without gradients, traced for every shape with which it is called often: the same bits.

    The function must not decide by a tensor's value, draw random numbers or change a tensor; its weights must stay as
    they are. Calls from several threads are safe. ``after`` is the call of a shape, from 1, at which it is traced.
    """

    def __init__(self, function: Callable[..., Any], after: int = OFTEN) -> None:
        self._function, self._after = function, after
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Callable[..., Any]] = {}
        self._locks: dict[int, Lock] = {}  # by process: in a forked child, one that its parent held would stay locked

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((*_layout(t), t.dtype) for t in inputs)
        replay = self._replays.get(key)
        if replay is None:
            self._calls[key] += 1
            if self._calls[key] < self._after:
                return self._function(*inputs)
            # Not in inference mode, in which PyTorch traces upsampling as the gathering of each pixel.
            one_at_a_time = self._locks.setdefault(os.getpid(), Lock())
            with one_at_a_time, torch.inference_mode(False), torch.no_grad():
                replay = self._replays.get(key)
                if replay is None:
                    replay = straight_line(traced(self._function, inputs), constant=True)
                self._replays[key] = replay
        return replay(*inputs)


def _layout(t: Tensor) -> _Layout:
    """Shape and strides, without the strides of dimensions of size 1, which say nothing: a grey image may have two."""
    return t.shape, tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _as_by_backward(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients as ``backward`` leaves them: in the memory format of the weight, since a fused optimiser walks through
    both, and with memory of their own, since what scales gradients in place must not scale one twice.
    """
    taken = {storage_address(t) for t in (*weights, *inputs)}
    made: list[Tensor | None] = []
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is not None:
            if gradient.stride() != weight.stride() or storage_address(gradient) in taken:
                gradient = torch.empty_like(weight).copy_(gradient)
            taken.add(storage_address(gradient))
        made.append(gradient)
    return made


def _require_alike(got: _Found, wanted: _Found, *, rounded: bool) -> None:
    """Raise an InputError if a compiled step's terms or gradients differ from autograd's, where those are finite."""
    # Rounding alone moves a new network's penalty: in bfloat16, with four seeds at 32 px, eager PyTorch's was 0.9 to
    # 1.6 times float32's, and ours 0.7 to 1.5 times. Two that are right may be a factor of three apart.
    scale = 2.0 if rounded else 0.1
    wrong = []
    for name, term in wanted[0].items():
        right, found = term.item(), got[0][name].item()
        if math.isfinite(right) and not abs(found - right) <= scale * max(1.0, min(abs(right), abs(found))):  # NaN: not
            wrong.append(f"{name} {found:.4g}, not {right:.4g}")
    ours, theirs = (torch.cat([g.flatten() for g in one[1] if g is not None]) for one in (got, wanted))
    if not rounded and theirs.isfinite().all() and not (ours - theirs).norm() <= scale * theirs.norm():
        wrong.append(f"gradients are off by more than {scale:.0%}")
    if wrong:
        raise InputError(
            f"torch.compile computes something else than the training step: {wrong[0]}; train without compiling, or "
            "with another version of PyTorch"
        )


def _embedding_gradient(gradient: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool) -> Tensor:
    """The gradient of an embedding as a matrix product: torch.compile's C++ of the sum writes past the end of its
    tensor with two threads, up to PyTorch 2.13 (https://github.com/pytorch/pytorch/issues/191837).
    """
    chosen = torch.arange(count, device=index.device)[:, None] == index.flatten()
    return chosen.to(gradient.dtype) @ gradient.flatten(0, -2)


_COMPILED_OTHERWISE: Decompositions = {torch.ops.aten.embedding_dense_backward.default: _embedding_gradient}
