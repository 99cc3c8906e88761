"""Registers compiled ops with autograd, and helps their backward functions: what is needed, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, torch_internals


def needed(ctx: Any) -> list[bool]:
    """Of each input of the node ``ctx``: whether the backward pass that runs now uses its gradient.

    ``ctx.needs_input_grad`` says only that the input requires a gradient. ``torch.autograd.grad(value, x)``, with which
    a gradient penalty begins, uses none of the weights', and computing them would cost as much as x's.
    """
    if torch.compiler.is_compiling():
        return list(ctx.needs_input_grad)
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the inputs that require a gradient
    return [requires and torch_internals.will_execute(next(nodes)) for requires in ctx.needs_input_grad]


def save_inputs(
    ctx: Any, inputs: Sequence[Any], output: Any = None, *, results: slice | None = None, materialize: bool = False
) -> None:
    """Keep an op's inputs, and ``results`` behind them, for :func:`inputs_of`.

    The gradient of a result that nobody used will be None, or zeros where ``materialize``.
    """
    inputs = inputs if results is None else (*inputs, *output[results])
    ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in inputs])
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.set_materialize_grads(materialize)


def inputs_of(ctx: Any) -> list[Any]:
    """What :func:`save_inputs` kept, in its order."""
    return [other if t is None else t for t, other in zip(ctx.saved_tensors, ctx.others, strict=True)]


def register(
    op: Any, shape: Callable[..., Any], backward: Callable[..., Sequence[Any]], save: Callable[..., None] = save_inputs
) -> None:
    """Give an op its gradient, and ``shape`` for its empty results.

    ``backward(ctx, needs, *grads)`` computes the gradients of the op's first inputs. Those that are not needed are
    dropped; autograd casts the others to their inputs' dtypes. It refuses gradients that carry a forward-mode
    derivative: it would be lost.
    """
    torch.library.register_fake(op)(shape)

    def checked(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch_internals.forward_mode():
            raise dispatch.KernelError(
                f"forward-mode AD through the backward of {op} would be lost: use --kernels reference"
            )
        needs = needed(ctx)
        found = () if all(grad is None for grad in grads) else backward(ctx, needs, *grads)
        return tuple(grad if need else None for grad, need in zip_longest(found, needs))

    torch.library.register_autograd(op, checked, setup_context=save)


def define(
    schema: str,
    shape: Callable[..., Any],
    backward: Callable[..., Sequence[Any]],
    save: Callable[..., None] = save_inputs,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: makes a function the registered op of ``schema``, NAME(...) -> ..., with all of :func:`register`."""

    def decorate(run: Callable[..., Any]) -> Any:
        op, bracket, rest = schema.partition("(")
        registered = torch.library.custom_op(f"raccgan::{op}", run, mutates_args=(), schema=bracket + rest)
        register(registered, shape, backward, save)
        return registered

    return decorate


def differentiate(
    run: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``run(*inputs)`` where ``needs``, by autograd: differentiable again if gradients are recorded now.

    For a backward that has no kernel of its own: ``run`` computes what the kernel computes out of operations that
    PyTorch can differentiate. ``grads`` are the gradients of its results.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: an input may have been computed from another one, and that path is not ours to follow.
        own = [t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        outputs = run(*own)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad]
    asked = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs], asked, [g.to(o.dtype) for o, g in pairs], create_graph=again, allow_unused=True
    )
    remaining = iter(found)
    return [next(remaining) if need and t is not None else None for t, need in zip(own, needs, strict=True)]
