"""The ops that the Triton kernels are registered as: a family closed under differentiation, so every order follows.

    D(phi(x), w)      depthwise convolution of stride 1 (w odd), of stride 2 or transposed (w even), after a prologue
    C(phi(x), g)      its gradient in w: the correlation of phi(x) and g over the batch
    phi(x)            m ((m0 x - center) scale + shift), the prologue: m0 and m are where its ReLUs are open, 1 where
                      it has none

With q = w convolved with a 2 x 2 box, nearest upsampling before D(., w) is the transposed convolution with q, and four
times the average pool after it is the one of stride 2: each of them is the other one's adjoint, with q flipped. So

    dD/dphi . g = D'(g, flip(w))          D' is D, or swaps stride 2 and transposed
    dD/dw . g   = C(phi, g)               and C's own gradients are D'(g, flip(v)) and D(phi, v)

The derivatives of phi are in :mod:`prologue`, the norm that it has folded in is in :mod:`norm`.

Images are float32, bfloat16 or float16; weights, scale, shift and center [N, C] and all sums are float32. Results are
channels_last, and the same bits every time. A registered op takes the tuples of :mod:`arguments` field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.autograd import inputs_of, needs_grad, register_autograd, save_few, save_inputs
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.arguments import (
    NO_AFFINE,
    PLAIN,
    SCHEMA,
    Affine,
    Convolution,
    Stride,
    Term,
)
from raccgan.kernels.depthwise_separable.triton.prologue import present, vjp_backward, vjp_shapes
from raccgan.kernels.layout import empty_image


def resized(w: Tensor, stride: Stride) -> Convolution:
    """Upsampling, then w [C, 1, k, k]; or w, then the average pool; w alone where the stride is neither."""
    if stride == PLAIN:
        return Convolution(w)
    # The average over a 2 x 2 box; upsampling sums where the pool averages.
    divisor = 1 if stride.up == 2 else None
    return Convolution(torch.nn.functional.avg_pool2d(w, 2, stride=1, padding=1, divisor_override=divisor), stride)


# ---- depthwise convolution -----------------------------------------------------------------------------------------


class _Depthwise(NamedTuple):
    x: Tensor
    convolution: Convolution
    affine: Affine
    size: tuple[int, int]

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _Depthwise:
        x, w, *affine, down, up, height, width = inputs
        return cls(x, Convolution(w, Stride(down, up)), Affine(*affine), (height, width))


@torch.library.custom_op(
    "raccgan::depthwise_triton",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w, {SCHEMA}, int down, int up, SymInt height, SymInt width) -> Tensor",
)
def _depthwise(*inputs: Any) -> Tensor:
    x, convolution, affine, size = _Depthwise.of(inputs)
    y = empty_image(x, x.shape[1], *size)
    launch.depthwise(x, convolution, affine, y)
    return y


def depthwise(x: Tensor, convolution: Convolution, height: int, width: int, affine: Affine = NO_AFFINE) -> Tensor:
    """D(phi(x), w), [N, C, height, width] of x's dtype, with zero padding (K - 1) // 2.

    Args:
        x: [N, C, H, W].
        height, width: H and W for stride 1, and at most their halves or doubles otherwise: what a smaller image's
            gradient is in a larger one whose last row was cut off.
        affine: phi.

    Gradients: any order, for x, w, scale and shift.
    """
    y: Tensor = _depthwise(x, convolution.w, *affine, *convolution.stride, height, width)
    return y


@_depthwise.register_fake
def _(*inputs: Any) -> Tensor:
    x, _, _, size = _Depthwise.of(inputs)
    return empty_image(x, x.shape[1], *size)


def _depthwise_backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    x, convolution, affine, _ = _Depthwise.of(inputs)
    needs_x, needs_w, needs_scale, needs_shift = (needs_grad(ctx, i, inputs) for i in range(4))
    grad_w = correlation(x, grad_y, convolution.kernel_size, convolution.stride, affine) if needs_w else None
    needs = needs_x, needs_scale, needs_shift
    grad_x, grad_scale, grad_shift = depthwise_vjp(grad_y, x, convolution, affine, needs)
    return grad_x, grad_w, grad_scale, grad_shift, *[None] * 7


def depthwise_vjp(
    grad_y: Tensor, x: Tensor, convolution: Convolution, affine: Affine, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift of D(phi(x), w)."""
    if not any(needs):
        return None, None, None
    if affine.nothing:
        return depthwise(grad_y, convolution.transposed(), x.shape[2], x.shape[3]), None, None
    term = Term(x, affine.scale, centered=affine.center is not None)
    return adjoint(grad_y, convolution.transposed(), term, x, affine, needs)


register_autograd(_depthwise, _depthwise_backward, save_inputs)


# ---- its gradient in the weights -----------------------------------------------------------------------------------


@torch.library.custom_op(
    "raccgan::depthwise_triton_correlation",
    mutates_args=(),
    schema=f"(Tensor x, Tensor grad, {SCHEMA}, int kernel_size, int down, int up) -> Tensor",
)
def _correlation(*inputs: Any) -> Tensor:
    x, grad, *affine, kernel_size, down, up = inputs
    return launch.correlation(x, grad, kernel_size, Stride(down, up), Affine(*affine))


def correlation(x: Tensor, grad: Tensor, kernel_size: int, stride: Stride, affine: Affine = NO_AFFINE) -> Tensor:
    """C(phi(x), grad) [C, 1, k, k] float32: the gradient of D's weights, ``grad`` being that of its result."""
    w: Tensor = _correlation(x, grad, *affine, kernel_size, *stride)
    return w


@_correlation.register_fake
def _(x: Tensor, grad: Tensor, *others: Any) -> Tensor:
    kernel_size = others[len(Affine._fields)]
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size), dtype=torch.float32)


def _correlation_backward(ctx: Any, grad_w: Tensor) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    x, grad, *values, _, down, up = inputs
    convolution, affine = Convolution(grad_w, Stride(down, up)), Affine(*values)
    needs_x, needs_grad_y, needs_scale, needs_shift = (needs_grad(ctx, i, inputs) for i in range(4))
    grad_grad = None
    if needs_grad_y:
        _, _, height, width = grad.shape
        grad_grad = depthwise(x, convolution, height, width, affine).to(grad.dtype)
    needs = needs_x, needs_scale, needs_shift
    grad_x, grad_scale, grad_shift = depthwise_vjp(grad, x, convolution, affine, needs)
    return grad_x, grad_grad, grad_scale, grad_shift, *[None] * 6


register_autograd(_correlation, _correlation_backward, save_inputs)


# ---- its gradient in the image -------------------------------------------------------------------------------------


class _Adjoint(NamedTuple):
    grad: Tensor
    convolution: Convolution
    term: Term
    x: Tensor
    affine: Affine
    needs_image: bool
    needs_sums: bool

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _Adjoint:
        grad, w, image, factor, x, *affine, down, up, centered, needs_image, needs_sums = inputs
        term = Term(image, factor, centered)
        return cls(grad, Convolution(w, Stride(down, up)), term, x, Affine(*affine), needs_image, needs_sums)


@torch.library.custom_op(
    "raccgan::depthwise_triton_adjoint",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor w, Tensor? image, Tensor? factor, Tensor x, {SCHEMA}, int down, int up, "
    "bool centered, bool needs_image, bool needs_sums) -> (Tensor, Tensor, Tensor)",
)
def _adjoint(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, convolution, term, x, affine, needs_image, needs_sums = _Adjoint.of(inputs)
    image = empty_image(x, *x.shape[1:]) if needs_image else x.new_empty(0)
    return image, *launch.adjoint(grad, convolution, term, x, affine, image, needs_sums)


def adjoint(
    grad: Tensor, convolution: Convolution, term: Term, x: Tensor, affine: Affine, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`prologue.prologue_vjp` of D(grad, w), whose result has x's shape, in one kernel. Any order of gradient."""
    image, of_scale, of_shift = _adjoint(
        grad,
        convolution.w,
        term.image,
        term.factor,
        x,
        *affine,
        *convolution.stride,
        term.centered,
        needs[0],
        needs[1] or needs[2],
    )
    return image if needs[0] else None, of_scale if needs[1] else None, of_shift if needs[2] else None


@_adjoint.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, x, _, needs_image, needs_sums = _Adjoint.of(inputs)
    return vjp_shapes(x, needs_image, needs_sums)


def _adjoint_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    grad, convolution, term, x, affine, *_ = _Adjoint.of(inputs)
    needs_y, needs_w, needs_image, needs_factor = (needs_grad(ctx, i, inputs) for i in range(4))
    of_image, of_scale, of_shift = present(grads)
    grad_grad = grad_w = grad_image = grad_factor = None
    if needs_y or needs_w:
        inner = vjp_backward(of_image, of_scale, of_shift, term, x, affine)
        if needs_y:
            grad_grad = depthwise(inner, convolution.transposed(), *grad.shape[2:])
        if needs_w:
            grad_w = correlation(grad, inner, convolution.kernel_size, convolution.stride)
    needs = (needs_image and of_scale is not None, needs_factor and of_image is not None, False)
    if any(needs):
        grad_image, grad_factor, _ = adjoint(grad, convolution, Term(of_image, of_scale), x, affine, needs)
    return grad_grad, grad_w, grad_image, grad_factor, *[None] * 11


register_autograd(_adjoint, _adjoint_backward, save_few)
