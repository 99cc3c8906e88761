"""Autograd for the native and the triton backend of the moments. Both have two ops of one schema:

NAME(x) -> (mean, var)    NAME_backward(grad_mean, grad_var, x, mean) -> grad_x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.autograd import differentiate, inputs_of, register, save_inputs
from raccgan.kernels.moments import reference


def shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and variance."""
    return x.new_empty(x.shape[1], dtype=torch.float32), x.new_empty(x.shape[1], dtype=torch.float32)


def register_both(name: str, like: Callable[[Tensor], Tensor]) -> None:
    """Give raccgan::NAME and raccgan::NAME_backward their gradients and fakes; ``like`` makes an empty grad_x of x."""

    def of_forward(ctx: Any, needs: Sequence[bool], *grads: Tensor) -> tuple[Tensor]:
        return (getattr(torch.ops.raccgan, f"{name}_backward")(*grads, *inputs_of(ctx)),)

    def of_backward(ctx: Any, needs: Sequence[bool], grad_grad_x: Tensor) -> list[Tensor | None]:
        return differentiate(reference.gradient, inputs_of(ctx), (grad_grad_x,), needs)

    register(f"raccgan::{name}", shapes, of_forward, partial(save_inputs, results=slice(1), materialize=True))
    register(f"raccgan::{name}_backward", lambda *inputs: like(inputs[2]), of_backward)
