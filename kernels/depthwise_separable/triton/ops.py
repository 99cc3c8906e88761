"""The ops that the Triton kernels are registered as: a family closed under differentiation, so every order follows.

    D(phi(x), w)      depthwise convolution of stride 1 (w odd), of stride 2 or transposed (w even), after a prologue
    C(phi(x), g)      its gradient in w: the correlation of phi(x) and g over the batch
    phi(x)            m ((m0 x - center) scale + shift), the prologue: m0 and m are 1 where its ReLUs are open, 0 where
                      they are closed, and 1 where it has none

Let q be w convolved with a 2 x 2 box. Then nearest upsampling before D(., w) is the transposed convolution with q, and
four times the average pool after D(., w) is the convolution of stride 2 with q. Each of the two is the adjoint of the
other, with q flipped. So

    dD/dphi . g = D'(g, flip(w))          D' is D, or swaps stride 2 and transposed
    dD/dw . g   = C(phi, g)               and C's own gradients are D'(g, flip(v)) and D(phi, v)

phi is bilinear except for its masks. Its vector-Jacobian and Jacobian-vector products are each other's gradients:

    vjp(g; a, s)              m m0 g s,  sum of m g (m0 a - center),  sum of m g      over the pixels
    jvp(a, s; b, r; added)    m (m0 a s + (m0 b - center) r + added)

If a or b is x itself, the center is subtracted from it; otherwise nothing is. :mod:`norm` has the norm that is folded
into phi.

Images are float32, bfloat16 or float16; weights, scale, shift and center [N, C] and all sums are float32. Results are
channels_last, and the same bits every time. A registered op takes the tuples of :mod:`launch` field by field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.autograd import define, inputs_of
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.launch import NO_AFFINE, SCHEMA, Affine, Convolution, Stride, Term
from raccgan.kernels.layout import empty_image, empty_like_image

_Tensors = tuple[Tensor | None, ...]


def resized(w: Tensor, stride: Stride) -> Convolution:
    """Upsampling, then w [C, 1, k, k]; or w, then the average pool; w alone where the stride is neither."""
    if stride == Stride():
        return Convolution(w)
    # The average over a 2 x 2 box; upsampling sums where the pool averages.
    divisor = 1 if stride.up == 2 else None
    return Convolution(torch.nn.functional.avg_pool2d(w, 2, stride=1, padding=1, divisor_override=divisor), stride)


def _depthwise_arguments(*inputs: Any) -> tuple[Tensor, Convolution, Affine]:
    x, w, *affine, down, up, _, _ = inputs
    return x, Convolution(w, Stride(down, up)), Affine(*affine)


def _depthwise_shape(x: Tensor, *others: Any) -> Tensor:
    return empty_image(x, x.shape[1], *others[-2:])


def _depthwise_backward(ctx: Any, needs: Sequence[bool], grad_y: Tensor) -> _Tensors:
    x, convolution, affine = _depthwise_arguments(*inputs_of(ctx))
    needs_x, needs_w, *needs_affine = needs[:4]
    grad_w = correlation(x, grad_y, convolution.kernel_size, convolution.stride, affine) if needs_w else None
    grad_x, *of_affine = depthwise_vjp(grad_y, x, convolution, affine, (needs_x, *needs_affine))
    return grad_x, grad_w, *of_affine


def depthwise_vjp(
    grad_y: Tensor, x: Tensor, convolution: Convolution, affine: Affine, needs: Sequence[bool]
) -> _Tensors:
    """The gradients of x, scale and shift of D(phi(x), w)."""
    if not any(needs):
        return None, None, None
    if affine.scale is None and not (affine.pre_relu or affine.relu):
        return depthwise(grad_y, convolution.transposed(), x.shape[2], x.shape[3]), None, None
    term = Term(x, affine.scale, centered=affine.center is not None)
    return vjp(grad_y, convolution.transposed(), term, x, affine, needs)


@define(
    f"depthwise_triton(Tensor x, Tensor w, {SCHEMA}, int down, int up, SymInt height, SymInt width) -> Tensor",
    _depthwise_shape,
    _depthwise_backward,
)
def _depthwise(*inputs: Any) -> Tensor:
    y = _depthwise_shape(*inputs)
    launch.depthwise(*_depthwise_arguments(*inputs), y)
    return y


def depthwise(x: Tensor, convolution: Convolution, height: int, width: int, affine: Affine = NO_AFFINE) -> Tensor:
    """D(phi(x), w), [N, C, height, width] of x's dtype, with zero padding (K - 1) // 2.

    height and width are x's for stride 1, and at most their halves or doubles otherwise: what a smaller image's
    gradient is in a larger one whose last row was cut off.

    Gradients: any order, for x, w, scale and shift.
    """
    return _depthwise(x, convolution.w, *affine, *convolution.stride, height, width)


def _correlation_backward(ctx: Any, needs: Sequence[bool], grad_w: Tensor) -> _Tensors:
    x, grad, *values, _, down, up = inputs_of(ctx)
    convolution, affine = Convolution(grad_w, Stride(down, up)), Affine(*values)
    needs_x, needs_grad, *needs_affine = needs[:4]
    grad_grad = depthwise(x, convolution, grad.shape[2], grad.shape[3], affine) if needs_grad else None
    grad_x, *of_affine = depthwise_vjp(grad, x, convolution, affine, (needs_x, *needs_affine))
    return grad_x, grad_grad, *of_affine


@define(
    f"depthwise_triton_correlation(Tensor x, Tensor grad, {SCHEMA}, int kernel_size, int down, int up) -> Tensor",
    lambda x, *others: x.new_empty((x.shape[1], 1, others[-3], others[-3]), dtype=torch.float32),
    _correlation_backward,
)
def _correlation(*inputs: Any) -> Tensor:
    x, grad, *affine, kernel_size, down, up = inputs
    return launch.correlation(x, grad, kernel_size, Stride(down, up), Affine(*affine))


def correlation(x: Tensor, grad: Tensor, kernel_size: int, stride: Stride, affine: Affine = NO_AFFINE) -> Tensor:
    """C(phi(x), grad) [C, 1, k, k] float32: the gradient of D's weights, ``grad`` being that of its result."""
    return _correlation(x, grad, *affine, kernel_size, *stride)


def _vjp_arguments(*inputs: Any) -> tuple[Tensor, Convolution, Term, Tensor, Affine]:
    grad, w, image, factor, x, *affine, down, up, centered, _, _ = inputs
    return grad, Convolution(w, Stride(down, up)), Term(image, factor, centered), x, Affine(*affine)


def _vjp_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, needs_image, needs_sums = inputs[4], *inputs[-2:]
    image = empty_like_image(x) if needs_image else x.new_empty(0)
    sums = x.shape[:2] if needs_sums else (0,)
    return image, x.new_empty(sums, dtype=torch.float32), x.new_empty(sums, dtype=torch.float32)


def _vjp_backward(ctx: Any, needs: Sequence[bool], *grads: Tensor | None) -> _Tensors:
    grad, convolution, term, x, affine = _vjp_arguments(*inputs_of(ctx))
    needs_y, needs_w, needs_image, needs_factor = needs[:4]
    # Results that were not needed are empty, and so are their gradients.
    of_image, of_scale, of_shift = (None if g is None or g.numel() == 0 else g for g in grads)
    grad_grad = grad_w = grad_image = grad_factor = None
    if needs_y or needs_w:
        second = Term() if of_scale is None else Term(term.image, of_scale, term.centered)
        inner = grad_grad = jvp(Term(of_image, term.factor), second, of_shift, x, affine)
        if convolution.w is not None:
            grad_grad = depthwise(inner, convolution.transposed(), *grad.shape[2:]) if needs_y else None
            grad_w = correlation(grad, inner, convolution.kernel_size, convolution.stride) if needs_w else None
    needs = (needs_image and of_scale is not None, needs_factor and of_image is not None, False)
    if any(needs):
        grad_image, grad_factor, _ = vjp(grad, convolution, Term(of_image, of_scale), x, affine, needs)
    return grad_grad, grad_w, grad_image, grad_factor


@define(
    f"depthwise_triton_vjp(Tensor grad, Tensor? w, Tensor? image, Tensor? factor, Tensor x, {SCHEMA}, "
    "int down, int up, bool centered, bool needs_image, bool needs_sums) -> (Tensor, Tensor, Tensor)",
    _vjp_shapes,
    _vjp_backward,
)
def _vjp(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    image, *_ = _vjp_shapes(*inputs)
    return image, *launch.vjp(*_vjp_arguments(*inputs), image, inputs[-1])


def vjp(
    grad: Tensor, convolution: Convolution, term: Term, x: Tensor, affine: Affine, needs: Sequence[bool]
) -> _Tensors:
    """m m0 g s [N, C, H, W], and the sums over the pixels of m g (m0 a - center) and of m g [N, C], in one kernel.

    g is D(grad, w), or grad without weights; ``term`` is a and s. x and affine say where m0 and m are 1, and have no
    gradient here. None in the place of what is not needed.

    Gradients: any order, for grad, w, a and s.
    """
    flags = (term.centered, needs[0], needs[1] or needs[2])
    found = _vjp(grad, convolution.w, term.image, term.factor, x, *affine, *convolution.stride, *flags)
    return tuple(one if need else None for one, need in zip(found, needs, strict=True))


def _jvp_arguments(*inputs: Any) -> tuple[Term, Term, Tensor | None, Tensor, Affine]:
    image, factor, added, other, other_factor, x, *affine, centered = inputs
    return Term(image, factor), Term(other, other_factor, centered), added, x, Affine(*affine)


def _jvp_backward(ctx: Any, needs: Sequence[bool], grad: Tensor) -> _Tensors:
    first, second, _, x, affine = _jvp_arguments(*inputs_of(ctx))
    nothing: _Tensors = (None, None, None)
    of_first = vjp(grad, Convolution(), first, x, affine, needs[:3]) if any(needs[:3]) else nothing
    second_needs = (*needs[3:5], False)
    of_second = vjp(grad, Convolution(), second, x, affine, second_needs) if any(second_needs) else nothing
    return *of_first, *of_second[:2]


@define(
    "depthwise_triton_jvp(Tensor? image, Tensor? factor, Tensor? added, Tensor? other, Tensor? other_factor, "
    f"Tensor x, {SCHEMA}, bool centered) -> Tensor",
    lambda *inputs: empty_like_image(inputs[5]),
    _jvp_backward,
)
def _jvp(*inputs: Any) -> Tensor:
    out = empty_like_image(inputs[5])
    launch.jvp(*_jvp_arguments(*inputs), out)
    return out


def jvp(first: Term, second: Term, added: Tensor | None, x: Tensor, affine: Affine) -> Tensor:
    """m (m0 a s + (m0 b - center) r + added) [N, C, H, W] in x's dtype.

    ``first`` is a and s, ``second`` b and r; an image that is None is left out, and so is ``added``. x and affine say
    where m0 and m are 1, and have no gradient here.

    Gradients: any order, for the others.
    """
    return _jvp(*first[:2], added, *second[:2], x, *affine, second.centered)
