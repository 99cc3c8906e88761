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
from raccgan.kernels.autograd import differentiate, inputs_of, register
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.convolutions import Depthwise
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, SAME_SIZE, Prologue, Resize
from raccgan.kernels.layout import empty_image, empty_like_image

_Tensors = Sequence[Tensor | None]
_TENSORS = 4  # x, w, scale and shift


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
    return torch.ops.raccgan.depthwise_native(x, w, prologue.scale, prologue.shift, *Options.of(prologue, resize))


def _composed(options: Options, x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor]:
    """What depthwise_native computes, of operations that PyTorch differentiates to any order."""
    scale, shift = (None if t is None else t.to(x.dtype) for t in (scale, shift))
    norm = "instance" if options.normalise else "none"
    x = apply_prologue(x, Prologue(options.pre_relu, norm, options.eps, scale, shift, options.relu))
    return (pooled(Depthwise.apply(upsampled(x, options.upsample), w.to(x.dtype)), options.pool),)


def _gradients(options: Options, needs: Sequence[bool], grad_y: Tensor, *inputs: Tensor | None) -> _Tensors:
    return differentiate(partial(_composed, options), inputs, (grad_y,), (*needs, needs[-1]))


def empty_result(x: Tensor, channels: int, upsample: int, pool: int) -> Tensor:
    """Room for [N, channels, H * upsample // pool, W * upsample // pool], channels_last."""
    resize = Resize(upsample, pool)
    return empty_image(x, channels, resize.size(x.shape[2]), resize.size(x.shape[3]))


def _forward_backward(ctx: Any, needs: Sequence[bool], grad_y: Tensor) -> _Tensors:
    needs_x, needs_w, *needs_affine = needs[:_TENSORS]
    return torch.ops.raccgan.depthwise_native_backward(grad_y, *inputs_of(ctx), needs_x, needs_w, any(needs_affine))


def _backward_shape(grad_y: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any) -> tuple[Tensor, ...]:
    needs_x, needs_w, needs_affine = options[len(Options._fields) :]
    of_scale, of_shift = (_float(x, x.shape[:2], needs_affine) for _ in range(2))
    return _like(x, needs_x), _float(x, w.shape, needs_w), of_scale, of_shift


def _backward_backward(ctx: Any, needs: Sequence[bool], grad_grad_x: Tensor | None, *others: Tensor | None) -> _Tensors:
    """The gradients of grad_y, x, w, scale and shift, of the gradient of x and those of the others."""
    tensors, options, flags = _divided(inputs_of(ctx), 1 + _TENSORS)
    if any(other is not None for other in others):
        run = partial(_gradients, options, flags)
        return differentiate(run, tensors, (grad_grad_x, *others), needs[: len(tensors)])
    needs_y, needs_x, needs_w, needs_scale, _ = needs[: len(tensors)]
    needs_x = needs_x and options.normalise  # all else is piecewise linear in x
    of_y, of_x, of_w, of_scale = torch.ops.raccgan.depthwise_native_double_backward(
        grad_grad_x, *tensors, *options, needs_y, needs_x, needs_w, needs_scale
    )
    return of_y, of_x if needs_x else None, of_w, of_scale


def _double_backward_shape(
    grad_grad_x: Tensor, grad_y: Tensor, x: Tensor, w: Tensor, scale: Any, shift: Any, *options: Any
) -> tuple[Tensor, ...]:
    needs_y, needs_x, needs_w, needs_scale = options[len(Options._fields) :]
    return _like(grad_y, needs_y), _like(x, needs_x), _float(x, w.shape, needs_w), _float(x, x.shape[:2], needs_scale)


def _double_backward_backward(ctx: Any, needs: Sequence[bool], *grads: Tensor | None) -> _Tensors:
    """Third order, by PyTorch's operations."""
    (grad_grad_x, *tensors), options, flags = _divided(inputs_of(ctx), 2 + _TENSORS)

    def run(grad_grad_x: Tensor, *tensors: Tensor | None) -> _Tensors:
        grad_x = partial(_gradients, options, (True, False, False))
        return differentiate(grad_x, tensors, (grad_grad_x, None, None, None), (*flags, False))[:-1]

    return differentiate(run, (grad_grad_x, *tensors), grads, needs[: 2 + _TENSORS])


def _divided(inputs: list[Any], tensors: int) -> tuple[list[Any], Options, list[Any]]:
    """An op's inputs: tensors, options, and what follows."""
    behind = tensors + len(Options._fields)
    return inputs[:tensors], Options(*inputs[tensors:behind]), inputs[behind:]


def _like(t: Tensor, needed: bool) -> Tensor:
    return empty_like_image(t) if needed else t.new_empty(0)


def _float(t: Tensor, shape: Sequence[int], needed: bool) -> Tensor:
    return t.new_empty(shape, dtype=torch.float32) if needed else t.new_empty(0)


if library.load():
    register(
        "raccgan::depthwise_native",
        lambda x, w, scale, shift, *options: empty_result(x, x.shape[1], *options[:2]),
        _forward_backward,
    )
    register("raccgan::depthwise_native_backward", _backward_shape, _backward_backward)
    register("raccgan::depthwise_native_double_backward", _double_backward_shape, _double_backward_backward)
