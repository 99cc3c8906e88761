"""Registers compiled ops with autograd, and helps their backward functions: what is needed, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, torch_internals


def needs_grad(ctx: Any, i: int, inputs: Sequence[Any] = ()) -> bool:
    """Whether the backward pass that runs now uses the gradient of input ``i`` of the node ``ctx``.

    ``inputs`` are the node's inputs, needed where one before ``i`` may be no tensor: only tensors are in the graph.

    ``ctx.needs_input_grad`` says only that the input requires a gradient. ``torch.autograd.grad(value, x)``, with which
    a gradient penalty begins, uses none of the weights', and computing them would cost as much as x's.
    """
    if not ctx.needs_input_grad[i]:
        return False
    if torch.compiler.is_compiling():
        return True
    place = i - sum(not isinstance(t, Tensor) for t in inputs[:i])
    return torch_internals.will_execute(ctx.next_functions[place][0])


def register(op: Any, shape: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Give an op what PyTorch asks of it: its outputs' shapes, its backward, and what that has to keep.

    The backward refuses gradients that carry a forward-mode derivative: it would be lost.
    """
    torch.library.register_fake(op)(shape)

    def checked(ctx: Any, *grads: Any) -> Any:
        if torch_internals.forward_mode():
            raise dispatch.KernelError(
                f"forward-mode AD through the backward of {op} would be lost: use --kernels reference"
            )
        return backward(ctx, *grads)

    torch.library.register_autograd(op, checked, setup_context=save)


def save_inputs(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    """Keep all inputs of an op, for :func:`inputs_of` in its backward."""
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def save_few(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    """:func:`save_inputs` for an op of several results: the gradient of one that nobody used is None, and not zeros."""
    save_inputs(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def define(
    schema: str, shape: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None] = save_inputs
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: makes a function the registered op of ``schema``, NAME(...) -> ..., with all of :func:`register`."""

    def decorate(run: Callable[..., Any]) -> Any:
        op, bracket, rest = schema.partition("(")
        registered = torch.library.custom_op(f"raccgan::{op}", run, mutates_args=(), schema=bracket + rest)
        register(registered, shape, backward, save)
        return registered

    return decorate


def inputs_of(ctx: Any) -> list[Any]:
    """The inputs that :func:`save_inputs` kept, in their order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def differentiate(
    run: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``run(*inputs)`` where ``needed``, by autograd: differentiable again if gradients are recorded now.

    For a backward that has no kernel of its own: ``run`` computes what the kernel computes out of operations that
    PyTorch can differentiate. ``grads`` are the gradients of its results.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: an input may have been computed from another one, and that path is not ours to follow.
        own = [t if t is None else t.view_as(t) for t in inputs]
        outputs = run(*own)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    asked = [t for t, need in zip(own, needed, strict=True) if need and t is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], asked, [g.to(o.dtype) for o, g in pairs], create_graph=again, allow_unused=True
    )
    remaining = iter(found)
    return [next(remaining) if need and t is not None else None for t, need in zip(own, needed, strict=True)]
