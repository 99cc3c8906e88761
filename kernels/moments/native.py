"""The compiled kernels: one pass over x for both moments, and one for their gradient.

d/dx <a, mean(x)> + <b, var(x)> = (a + 2 b (x - mean)) / M        over M = N * H * W pixels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.autograd import differentiate, needs_grad, register
from raccgan.kernels.moments import reference

_FORWARD = "raccgan::moments_native"
_BACKWARD = "raccgan::moments_native_backward"


def supports(call: dispatch.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return dispatch.compiled(call, "moments")


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in :func:`raccgan.kernels.moments`; any order of derivative.

    The same bits whatever the number of threads. Compiled is the first derivative; the second is PyTorch's operations.
    """
    mean, var = torch.ops.raccgan.moments_native(x)
    return mean, var


def _forward_shape(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[1],)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _save_forward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _forward_backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    grad: Tensor = torch.ops.raccgan.moments_native_backward(grad_mean, grad_var, *ctx.saved_tensors)
    return grad


def _backward_shape(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _save_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_backward(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
    needed = [needs_grad(ctx, i) for i in range(4)]
    return tuple(differentiate(reference.gradient, ctx.saved_tensors, (grad_grad_x,), needed))


if library.load():
    register(_FORWARD, _forward_shape, _forward_backward, _save_forward)
    register(_BACKWARD, _backward_shape, _backward_backward, _save_backward)
