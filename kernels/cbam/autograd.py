"""The way of the compiled and of the Triton kernels through autograd. Both backends register two ops of one schema:

    NAME(x .. var, batch, eps) -> (y, mean, var, saved)
    NAME_backward(grad_y, grad_mean, grad_var, x .. var, batch, eps, saved, needs_x .. needs_moments) -> (x .. var)

x .. var are :class:`CbamTensors`, needs_x .. needs_moments :class:`CbamNeeds`. ``saved`` is one float32 tensor with all
that the backward op needs of the forward op's work. Given moments are not returned: mean and var are then empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import autograd
from raccgan.kernels.autograd import needs_grad
from raccgan.kernels.cbam.second_order import gradients_of_gradients


class CbamTensors(NamedTuple):
    """The tensor arguments of the ops, or the gradient of each, in the ops' order."""

    x: Tensor
    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    spatial_weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    mean: Tensor | None
    var: Tensor | None


TENSORS = len(CbamTensors._fields)


class CbamNeeds(NamedTuple):
    """Which gradients the backward op computes."""

    x: bool
    mlp: bool  # reduce_weight to expand_bias
    spatial_weight: bool
    norm: bool  # norm_weight and norm_bias
    moments: bool  # mean and var

    @classmethod
    def of(cls, needed: Sequence[bool]) -> CbamNeeds:
        """All that compute a gradient which is needed, of one flag for each of :class:`CbamTensors`."""
        x, *mlp, spatial_weight, norm_weight, norm_bias, mean, var = needed
        return cls(x, any(mlp), spatial_weight, norm_weight or norm_bias, mean or var)

    def by_tensor(self) -> tuple[bool, ...]:
        """A flag for each of :class:`CbamTensors`."""
        return (self.x, *4 * (self.mlp,), self.spatial_weight, *2 * (self.norm,), *2 * (self.moments,))


class BackwardArguments(NamedTuple):
    """The arguments of the backward op."""

    grad_y: Tensor
    grad_mean: Tensor | None
    grad_var: Tensor | None
    tensors: CbamTensors
    batch: bool
    eps: float
    saved: Tensor
    needs: CbamNeeds

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> BackwardArguments:
        """Of the op's arguments, one after the other."""
        grads, tensors, others = arguments[:3], arguments[3 : 3 + TENSORS], arguments[3 + TENSORS :]
        batch, eps, saved, *needs = others
        return cls(*grads, CbamTensors(*tensors), batch, eps, saved, CbamNeeds(*needs))


def forward_shapes(
    tensors: CbamTensors, batch: bool, new: Callable[[Tensor], Tensor], saved: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of the forward op: ``new`` makes a tensor like x, ``saved`` is how many floats are saved."""
    moments = 0 if tensors.mean is not None else 1 if batch else tensors.x.shape[0]

    def floats(count: int) -> Tensor:
        return tensors.x.new_empty(count, dtype=torch.float32)

    return new(tensors.x), floats(moments), floats(moments), floats(saved)


def backward_shapes(arguments: BackwardArguments, new: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Empty outputs of the backward op, without elements where they are not needed; ``new`` makes a tensor like x."""
    tensors, x = arguments.tensors, arguments.tensors.x

    def empty(t: Tensor | None, needed: bool) -> Tensor:
        if t is None or not needed:
            return x.new_empty(0, dtype=torch.float32 if t is None or t is x else t.dtype)
        return new(t) if t is x else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return tuple(empty(t, needed) for t, needed in zip(tensors, arguments.needs.by_tensor(), strict=True))


class Context(FunctionCtx):
    """What the nodes of both ops keep."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    batch: bool
    eps: float
    needs: CbamNeeds  # of the backward op


_Tensors = Sequence[Tensor | None]
Second = Callable[[_Tensors, _Tensors, Tensor, bool, float], _Tensors | None]
"""Gradients of the gradients, where a kernel computes them: of (the backward op's tensors grad_y .. var, the gradients
of its outputs x .. var, saved, batch, eps) the gradients of the former; None where no kernel does."""


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    second: Second = lambda *_: None,
) -> None:
    """Give raccgan::NAME and raccgan::NAME_backward their gradients, and fakes that make their empty outputs."""

    def save_forward(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[-1])
        ctx.save_for_backward(*inputs[:TENSORS], output[-1])
        ctx.set_materialize_grads(False)
        ctx.batch, ctx.eps = inputs[TENSORS:]

    def of_forward(
        ctx: Context, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        tensors = CbamTensors(*inputs)  # type: ignore[arg-type]
        if tensors.mean is not None:
            grad_mean = grad_var = None  # of the empty tensors in the place of moments that were given
        needed = [needs_grad(ctx, i, tensors) for i in range(TENSORS)]
        if grad_y is None:
            grad_y = torch.zeros_like(tensors.x)
        found = getattr(torch.ops.raccgan, f"{name}_backward")(
            grad_y, grad_mean, grad_var, *tensors, ctx.batch, ctx.eps, saved, *CbamNeeds.of(needed)
        )
        return *(grad if need else None for grad, need in zip(found, needed, strict=True)), None, None

    def save_backward(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        arguments = BackwardArguments.of(inputs)
        ctx.save_for_backward(*inputs[: 3 + TENSORS], arguments.saved)
        ctx.set_materialize_grads(False)
        ctx.batch, ctx.eps, ctx.needs = arguments.batch, arguments.eps, arguments.needs

    def of_backward(ctx: Context, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        assert saved is not None
        # What was not needed is an output without elements, and nothing comes through it.
        through = [grad if computed else None for grad, computed in zip(grad_grads, ctx.needs.by_tensor(), strict=True)]
        needed = [needs_grad(ctx, i, inputs) for i in range(3 + TENSORS)]
        found = second(inputs, through, saved, ctx.batch, ctx.eps)
        if found is None:
            found = gradients_of_gradients(inputs, through, needed, batch=ctx.batch, eps=ctx.eps)
        rest = (None,) * (3 + len(CbamNeeds._fields))
        return *(grad if need else None for grad, need in zip(found, needed, strict=True)), *rest

    autograd.register(f"raccgan::{name}", forward, of_forward, save_forward)
    autograd.register(f"raccgan::{name}_backward", backward, of_backward, save_backward)
