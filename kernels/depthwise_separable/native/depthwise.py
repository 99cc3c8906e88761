"""The depthwise half of the native backend, the u of :mod:`op`: csrc/cpu/depthwise and csrc/cuda/depthwise.

A channel of u depends on one channel of one sample, so that channel stays in the cache through norm, ReLU, resizing and
convolution, and again through their first and second derivatives. A gradient penalty is one more pass, instead of some
forty of PyTorch's operations.

Three ops are registered: the forward pass, its gradients, and the gradients of its gradient of x, for which a gradient
penalty asks. All other derivatives consist of PyTorch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.autograd import differentiate, needs_grad, register
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.convolutions import Depthwise
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, SAME_SIZE, Prologue, Resize
from raccgan.kernels.layout import empty_image

_Tensors = Sequence[Tensor | None]


class Options(NamedTuple):
    """What follows the tensors in the schema of every op here."""

    upsample: int
    pool: int
    pre_relu: bool
    normalise: bool
    relu: bool
    eps: float

    @classmethod
    def of(cls, prologue: Prologue, resize: Resize) -> Options:
        return cls(*resize, prologue.pre_relu, prologue.norm == "instance", prologue.relu, prologue.eps)


def depthwise(x: Tensor, w: Tensor, prologue: Prologue = NO_PROLOGUE, resize: Resize = SAME_SIZE) -> Tensor:
    """u, channels_last and of x's dtype, for x [N, C, H, W] and w [C, 1, k, k], k 3, 5 or 7; ``resize`` not both 2.

    x is read in place where it is channels_last, copied otherwise. The same bits whatever the number of threads, like
    all gradients; another processor may round differently.

    Gradients: every order, for x, w, scale and shift.
    """
    y: Tensor = torch.ops.raccgan.depthwise_native(x, w, prologue.scale, prologue.shift, *Options.of(prologue, resize))
    return y


def _composed(options: Options, x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """What depthwise_native computes, of operations that any order of derivative goes through."""
    scale, shift = (None if t is None else t.to(x.dtype) for t in (scale, shift))
    norm = "instance" if options.normalise else "none"
    x = apply_prologue(x, Prologue(options.pre_relu, norm, options.eps, scale, shift, options.relu))
    return pooled(Depthwise.apply(upsampled(x, options.upsample), w.to(x.dtype)), options.pool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = sum(1 for value in inputs if value is None or isinstance(value, Tensor))
    ctx.save_for_backward(*inputs[:tensors])
    behind = tensors + len(Options._fields)
    ctx.options, ctx.flags = Options(*inputs[tensors:behind]), inputs[behind:]
    ctx.set_materialize_grads(False)


def _and_nothing(ctx: Any, grads: _Tensors) -> tuple[Tensor | None, ...]:
    return (*grads, *[None] * (len(ctx.options) + len(ctx.flags)))


def _in_dtypes(grads: _Tensors, tensors: _Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that are needed, in the dtypes of the tensors."""
    found = zip(grads, tensors, needs, strict=True)
    return [grad.to(t.dtype) if need and grad is not None and t is not None else None for grad, t, need in found]


def _forward_shape(x: Tensor, w: Tensor, scale: Any, shift: Any, upsample: int, pool: int, *options: Any) -> Tensor:
    resize = Resize(upsample, pool)
    return empty_image(x, x.shape[1], resize.size(x.shape[2]), resize.size(x.shape[3]))


def _forward_backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return _and_nothing(ctx, [None] * 4)
    tensors, affine = ctx.saved_tensors, needs_grad(ctx, 2) or needs_grad(ctx, 3)
    needs = needs_grad(ctx, 0), needs_grad(ctx, 1), affine
    found = torch.ops.raccgan.depthwise_native_backward(grad_y, *tensors, *ctx.options, *needs)
    return _and_nothing(ctx, _in_dtypes(found, tensors, (*needs, affine)))


def _backward_shape(
    grad_y: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_w, needs_affine = options[len(Options._fields) :]
    of_scale, of_shift = (_float(x, x.shape[:2], needs_affine) for _ in range(2))
    return _like(x, needs_x), _float(x, w.shape, needs_w), of_scale, of_shift


def _backward_backward(ctx: Any, grad_grad_x: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """The gradients of grad_y, x, w, scale and shift, of the gradient of x and those of the others."""
    needed = [needs_grad(ctx, i) for i in range(5)]
    if any(other is not None for other in others):
        run = partial(_gradients, ctx.options, ctx.flags)
        return _and_nothing(ctx, differentiate(run, ctx.saved_tensors, (grad_grad_x, *others), needed))
    if grad_grad_x is None:
        return _and_nothing(ctx, [None] * 5)
    tensors = ctx.saved_tensors
    needs = (needed[0], needed[1] and ctx.options.normalise, needed[2], needed[3] and tensors[3] is not None)
    found = torch.ops.raccgan.depthwise_native_double_backward(grad_grad_x, *tensors, *ctx.options, *needs)
    return _and_nothing(ctx, (*_in_dtypes(found, tensors[:4], needs), None))


def _gradients(options: Options, needs: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What depthwise_native_backward computes for (grad_y, x, w, scale, shift), differentiable."""
    grad_y, *inputs = tensors
    leaves = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in inputs]
    y = _composed(options, *leaves)  # type: ignore[arg-type]  # x and w are there
    found = torch.autograd.grad(
        y, [t for t in leaves if t is not None], grad_y, create_graph=True, allow_unused=True, materialize_grads=True
    )
    by_input = iter(found)
    gradients = [None if t is None else next(by_input) for t in leaves]
    asked = (needs[0], needs[1], needs[2], needs[2])
    return tuple(gradient if one else None for gradient, one in zip(gradients, asked, strict=True))


def _double_backward_shape(
    grad_grad_x: Tensor, grad_y: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_y, needs_x, needs_w, needs_scale = options[len(Options._fields) :]
    return _like(grad_y, needs_y), _like(x, needs_x), _float(x, w.shape, needs_w), _float(x, x.shape[:2], needs_scale)


def _double_backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Third order, by PyTorch's operations."""
    needed = [needs_grad(ctx, i) for i in range(6)]

    def run(grad_grad_x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_x, *_) = _gradients(ctx.options, (True, False, False), *tensors)
        return tuple(differentiate(lambda *_: (grad_x,), tensors, (grad_grad_x,), (*ctx.flags, False))[:4])

    return _and_nothing(ctx, differentiate(run, ctx.saved_tensors, grads, needed))


def _like(t: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(t, memory_format=torch.channels_last) if needed else t.new_empty(0)


def _float(t: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    return t.new_empty(shape, dtype=torch.float32) if needed else t.new_empty(0)


if library.load():
    register("raccgan::depthwise_native", _forward_shape, _forward_backward, _save)
    register("raccgan::depthwise_native_backward", _backward_shape, _backward_backward, _save)
    register("raccgan::depthwise_native_double_backward", _double_backward_shape, _double_backward_backward, _save)
