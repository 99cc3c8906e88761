"""Autograd for the native and the triton backend of the moments. Both have two ops of one schema:

NAME(x) -> (mean, var)    NAME_backward(grad_mean, grad_var, x, mean) -> grad_x
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import autograd
from raccgan.kernels.autograd import differentiate, needs_grad
from raccgan.kernels.moments import reference


def shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and variance."""
    shape = (x.shape[1],)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def register(name: str, like: Callable[[Tensor], Tensor]) -> None:
    """Give raccgan::NAME and raccgan::NAME_backward their gradients and fakes; ``like`` makes an empty grad_x of x."""

    def save_forward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[0])

    def of_forward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        grad: Tensor = getattr(torch.ops.raccgan, f"{name}_backward")(grad_mean, grad_var, *ctx.saved_tensors)
        return grad

    def save_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def of_backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
        needed = [needs_grad(ctx, i) for i in range(4)]
        return tuple(differentiate(reference.gradient, ctx.saved_tensors, (grad_grad_x,), needed))

    autograd.register(f"raccgan::{name}", shapes, of_forward, save_forward)
    autograd.register(f"raccgan::{name}_backward", lambda *inputs: like(inputs[2]), of_backward, save_backward)
