"""What is computed again and again, as one list of operations: recorded once, then replayed, or compiled.

A training step spends much of its time between the kernels: in Python, in autograd, which builds a graph at every call
and walks it, and in small operations on one core. torch.compile would see to that, but does not differentiate twice, as
a gradient penalty has to be. So autograd runs first, and what it does is recorded: the operations of the forward pass,
of its derivative and of that one's derivative, in their order. Replayed, they give the same bits without autograd. And
they are a function without derivatives, which is what torch.compile takes.

A score has no derivatives, but Python between its kernels, which for a single small image is a quarter of the time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from raccgan.errors import InputError
from raccgan.models import compiling
from raccgan.models.straight_line import straight_line

Terms = dict[str, Tensor]
"""What is reported of a step: scalars without graph, by name."""

Objective = Callable[..., tuple[Tensor, Terms]]
"""A loss, differentiable, and what is reported of it, of a step's tensors."""

OFTEN = 200
"""Calls after which a recording of them pays: it takes as long as it saves in a hundred to five hundred."""

_Decompositions = Mapping[OpOverload, Callable[..., Any]]

_Layout = tuple[torch.Size, tuple[int, ...]]

_Found = tuple[Terms, list[Tensor | None]]
"""The terms, and a gradient for each weight that the loss depends on."""


class Recording:
    """The terms and gradients of an objective, recorded at the first call and replayed from then on.

    Whatever the objective decides in Python is decided at the first call: who serves an op, which weights learn, shapes
    and memory formats. It may not decide by a tensor's value, nor draw random numbers. Weights and buffers remain the
    networks' own, and each call moves the buffers as the objective does.

    In float32 the replay gives the bits that autograd gives. In autocast a weight's gradients from several uses are
    added in float32, each use being a cast of its own.

    With ``compiled`` torch.compile turns the list into C++, in one to two minutes: the same up to rounding.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Sequence[nn.Parameter],
        networks: Iterable[nn.Module],
        *,
        compiled: bool = False,
        rounded: bool = False,
    ) -> None:
        """Of an objective, its gradients with respect to ``weights``.

        Args:
            networks: all whose buffers the objective may move.
            compiled: have the list turned into C++.
            rounded: the objective's arithmetic is bfloat16, in which gradients of a new network are mostly rounding, so
                that compiled ones cannot be compared with autograd's, as they are otherwise before they are used.
        """
        self._objective, self._weights, self._compiled, self._rounded = objective, weights, compiled, rounded
        self._buffers = [buffer for network in networks for buffer in network.buffers()]
        self._like: list[_Layout] = []
        self._replay: Callable[..., _Found] | None = None

    def __call__(self, *inputs: Tensor) -> Terms:
        """Leave the gradients in the weights' ``grad``, as ``backward`` on none does, and return the terms.

        Raises:
            ValueError: other shapes or memory formats than at the first call, or at that one, the objective decides by
                a tensor's value.
            InputError: at the first call, it does not compile here or the result computes something else.
        """
        like = [_layout(t) for t in inputs]
        if self._replay is None:
            self._replay, self._like = self._record(inputs), like
        elif like != self._like:
            raise ValueError(f"recorded for tensors of these shapes and strides: {self._like}; got {like}")
        with torch.no_grad():
            terms, gradients = self._replay(*inputs)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        return terms

    def _record(self, inputs: Sequence[Tensor]) -> Callable[..., _Found]:
        before = [buffer.clone() for buffer in self._buffers]
        try:
            graph = _recorded(self._differentiated, inputs, _COMPILED_OTHERWISE if self._compiled else None)
        finally:
            self._restore(before)  # counts of batches move even then: make_fx takes a scalar for a constant
        if not self._compiled:
            return straight_line(graph)
        graph.recompile()  # torch.fx's own function, which nothing else runs
        replay = compiling.compiled(graph, "the training step", dynamic=False)
        wanted = self._differentiated(*inputs)
        self._restore(before)
        with torch.no_grad():
            _require_alike(replay(*inputs), wanted, rounded=self._rounded)
        self._restore(before)
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
    """A function of tensors without gradients, recorded for every shape with which it is called often: the same bits.

    It may not decide by a tensor's value, draw random numbers or change a tensor; what it holds stays as it is.
    """

    def __init__(self, function: Callable[..., Any], after: int = OFTEN) -> None:
        """``after``: at which call of a shape it is recorded."""
        self._function, self._after = function, after
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Callable[..., Any]] = {}
        self._one_at_a_time = Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        like = tuple((*_layout(t), t.dtype) for t in inputs)
        replay = self._recordings.get(like)
        if replay is None:
            self._calls[like] += 1
            if self._calls[like] < self._after:
                return self._function(*inputs)
            # Not in inference mode, in which PyTorch records upsampling as the gathering of each pixel.
            with self._one_at_a_time, torch.inference_mode(False), torch.no_grad():
                replay = self._recordings.get(like)
                if replay is None:
                    replay = straight_line(_recorded(self._function, inputs), constant=True)
                self._recordings[like] = replay
        return replay(*inputs)


def _layout(t: Tensor) -> _Layout:
    """Shape and strides, but for dimensions of size 1, whose stride says nothing: a grey image has two that are one."""
    return t.shape, tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _recorded(
    function: Callable[..., Any], inputs: Sequence[Tensor], otherwise: _Decompositions | None = None
) -> GraphModule:
    """What ``function`` does to tensors like these, some operations replaced by what does ``otherwise``.

    Nothing is computed: tensors without data ("fake") go through it, which costs neither time in kernels nor memory.

    Raises:
        ValueError: it decides by a tensor's value.
    """
    trace = make_fx(
        lambda *tensors: function(*tensors),  # make_fx counts a method's arguments with self
        decomposition_table=otherwise,
        tracing_mode="fake",
        _allow_non_fake_inputs=True,  # weights and buffers, which stay the networks' own
    )
    try:
        graph = trace(*inputs)
    except GuardOnDataDependentSymNode as error:
        raise ValueError("what decides by a tensor's value cannot be recorded: replayed, it would not ask") from error
    graph.graph.eliminate_dead_code()
    return graph


def _as_by_backward(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients as ``backward`` leaves them: each with memory of its own, in its weight's memory format.

    A fused optimiser walks both side by side, and what scales gradients in place must not scale one twice.
    """
    taken = {t.untyped_storage()._cdata for t in (*weights, *inputs)}  # known by its address: it may have no data
    made: list[Tensor | None] = []
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient is not None:
            if gradient.stride() != weight.stride() or gradient.untyped_storage()._cdata in taken:
                gradient = torch.empty_like(weight).copy_(gradient)
            taken.add(gradient.untyped_storage()._cdata)
        made.append(gradient)
    return made


def _require_alike(got: _Found, wanted: _Found, *, rounded: bool) -> None:
    """Refuse what was compiled wrongly: torch.compile is a large machine, see below for one of its faults.

    Raises:
        InputError: another value of a term, or other gradients, than autograd's, where those are finite.
    """
    # What rounding alone makes of a new network's penalty: in bfloat16, with four seeds at 32 px, eager PyTorch's was
    # 0.9 to 1.6 times float32's, and ours 0.7 to 1.5 times. Two that are right may be a factor of three apart.
    scale = 2.0 if rounded else 0.1
    for name, term in wanted[0].items():
        right, found = term.item(), got[0][name].item()
        if math.isfinite(right) and not abs(found - right) <= scale * max(1.0, min(abs(right), abs(found))):  # NaN: not
            raise InputError(f"{_WRONG}: {name} {found:.4g}, not {right:.4g}; {_INSTEAD}")
    ours, theirs = (torch.cat([g.flatten() for g in one[1] if g is not None]) for one in (got, wanted))
    if not rounded and theirs.isfinite().all() and not (ours - theirs).norm() <= scale * theirs.norm():
        raise InputError(f"{_WRONG}: gradients are off by more than {scale:.0%}; {_INSTEAD}")


_WRONG = "torch.compile computes something else than the training step"
_INSTEAD = "train without compiling, or with another version of PyTorch"


def _embedding_gradient(gradient: Tensor, index: Tensor, count: int, padding: int, by_frequency: bool) -> Tensor:
    """As a matrix product. What torch.compile makes of the sum for two threads writes past the tensor's end, up to
    PyTorch 2.13: https://github.com/pytorch/pytorch/issues/191837."""
    chosen = torch.arange(count, device=index.device)[:, None] == index.flatten()
    return chosen.to(gradient.dtype) @ gradient.flatten(0, -2)


_COMPILED_OTHERWISE: _Decompositions = {torch.ops.aten.embedding_dense_backward.default: _embedding_gradient}
