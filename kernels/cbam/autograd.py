"""Autograd for the native and the triton backend of CBAM. Both register two ops of one schema:

    NAME(x .. var, batch, eps) -> (y, mean, var, saved)
    NAME_backward(grad_y, grad_mean, grad_var, x .. var, batch, eps, saved, needs_x .. needs_moments) -> (x .. var)

x .. var are :class:`CbamTensors`, needs_x .. needs_moments :class:`CbamNeeds`. ``saved`` is one float32 tensor with all
that the backward op needs of the forward op's work. Given moments are not returned: mean and var are then empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.autograd import differentiate, inputs_of, register, save_inputs
from raccgan.kernels.cbam import reference
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights


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


def backward_arguments(
    *inputs: Any,
) -> tuple[Sequence[Tensor | None], CbamTensors, tuple[bool, float, Tensor], CbamNeeds]:
    """The backward op's gradients, tensors, (batch, eps, saved) and needs."""
    given = 3 + TENSORS
    return inputs[:3], CbamTensors(*inputs[3:given]), inputs[given : given + 3], CbamNeeds(*inputs[given + 3 :])


def forward_shapes(
    like: Callable[[Tensor], Tensor], saved_sizes: Callable[..., list[int]], *inputs: Any
) -> tuple[Tensor, ...]:
    """Empty outputs of the forward op: ``like`` makes one like x; the saved floats' number is of tensors and groups."""
    tensors, batch = CbamTensors(*inputs[:TENSORS]), inputs[TENSORS]
    x, groups = tensors.x, 1 if batch or tensors.mean is not None else tensors.x.shape[0]
    moments, saved = groups if tensors.mean is None else 0, sum(saved_sizes(tensors, groups))
    return like(x), *(x.new_empty(count, dtype=torch.float32) for count in (moments, moments, saved))


def backward_shapes(like: Callable[[Tensor], Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    """Empty outputs of the backward op, without elements where they are not needed; ``like`` makes a tensor like x."""
    _, tensors, _, needs = backward_arguments(*inputs)
    x = tensors.x

    def empty(t: Tensor | None, needed: bool) -> Tensor:
        if t is None or not needed:
            return x.new_empty(0, dtype=torch.float32 if t is None or t is x else t.dtype)
        return like(t) if t is x else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return tuple(empty(t, needed) for t, needed in zip(tensors, needs.by_tensor(), strict=True))


def run(op: Callable[..., Any], x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var by the forward op."""
    y, mean, var, _ = op(x, *weights, norm.mean, norm.var, norm.kind == "batch", norm.eps)
    return y, mean if norm.mean is None else norm.mean, var if norm.var is None else norm.var


_Tensors = Sequence[Tensor | None]
Second = Callable[[_Tensors, _Tensors, Tensor, bool, float], _Tensors | None]
"""Gradients of the gradients, where a kernel computes them: of (the backward op's tensors grad_y .. var, the gradients
of its outputs x .. var, saved, batch, eps) the gradients of the former; None where no kernel does."""


def register_both(
    name: str,
    like: Callable[[Tensor], Tensor],
    saved_sizes: Callable[..., list[int]],
    second: Second = lambda *_: None,
) -> None:
    """Give raccgan::NAME and raccgan::NAME_backward their gradients and fakes, see :func:`forward_shapes`."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[-1])
        save_inputs(ctx, (*inputs, output[-1]))

    def of_forward(
        ctx: Any, needs: Sequence[bool], grad_y: Tensor | None, *grads: Tensor | None
    ) -> Sequence[Tensor | None]:
        inputs = inputs_of(ctx)
        tensors = CbamTensors(*inputs[:TENSORS])
        grad_mean, grad_var, _ = grads if tensors.mean is None else (None, None, None)  # moments that were given: empty
        grad_y = torch.zeros_like(tensors.x) if grad_y is None else grad_y
        backward = getattr(torch.ops.raccgan, f"{name}_backward")
        return backward(grad_y, grad_mean, grad_var, *inputs, *CbamNeeds.of(needs[:TENSORS]))

    def of_backward(ctx: Any, needs: Sequence[bool], *grad_grads: Tensor | None) -> _Tensors:
        grads, tensors, (batch, eps, saved), computed = backward_arguments(*inputs_of(ctx))
        given = (*grads, *tensors)
        # What was not needed is an output without elements, and nothing comes through it.
        through = [grad if there else None for grad, there in zip(grad_grads, computed.by_tensor(), strict=True)]
        if (found := second(given, through, saved, batch, eps)) is not None:
            return found
        kind, used = "batch" if batch else "instance", [g is not None for g in through]

        def cbam(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, *weights, mean, var = (None if t is None else t.float() for t in tensors)
            assert x is not None
            norm = CbamNorm(kind if mean is None else "fixed", mean, var, eps)
            y, mean, var = reference.cbam(x, CbamWeights(*weights), norm, _convolve_by_columns)
            return y.to(tensors[0].dtype), mean, var

        def first(*given: Tensor | None) -> _Tensors:
            return differentiate(cbam, given[3:], given[:3], used)

        return differentiate(first, given, through, needs[: len(given)])

    register(f"raccgan::{name}", partial(forward_shapes, like, saved_sizes), of_forward, save)
    register(f"raccgan::{name}_backward", partial(backward_shapes, like), of_backward)


def _convolve_by_columns(planes: Tensor, weight: Tensor) -> Tensor:
    """The same as a matrix product: PyTorch cannot trace a convolution's second gradients for sizes not yet known."""
    k = weight.shape[-1]
    columns = F.unfold(planes, k, padding=k // 2)  # [N, 2 * k * k, H * W]
    return (weight.flatten(1) @ columns).view(planes.shape[0], 1, *planes.shape[2:])
