"""The derivatives of the prologue phi(x) = m ((m0 x - center) scale + shift), as registered ops.

phi is bilinear but for its masks m0 and m, where its ReLUs are open. Its vector-Jacobian and Jacobian-vector products
are each other's gradients:

    prologue_vjp(g; a, s)              m m0 g s,  sum of m g (m0 a - center),  sum of m g      over the pixels
    prologue_jvp(a, s; b, r; added)    m (m0 a s + (m0 b - center) r + added)

There a and b are measured from the center where they are x itself, and from zero otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.autograd import inputs_of, needs_grad, register_autograd, save_few, save_inputs
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.arguments import NO_TERM, SCHEMA, Affine, Term
from raccgan.kernels.layout import empty_image


class _Vjp(NamedTuple):
    grad: Tensor
    term: Term
    x: Tensor
    affine: Affine
    needs_image: bool
    needs_sums: bool

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _Vjp:
        grad, image, factor, x, *affine, centered, needs_image, needs_sums = inputs
        return cls(grad, Term(image, factor, centered), x, Affine(*affine), needs_image, needs_sums)


@torch.library.custom_op(
    "raccgan::depthwise_triton_prologue_vjp",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? image, Tensor? factor, Tensor x, {SCHEMA}, bool centered, bool needs_image, "
    "bool needs_sums) -> (Tensor, Tensor, Tensor)",
)
def _prologue_vjp(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, term, x, affine, needs_image, needs_sums = _Vjp.of(inputs)
    image = empty_image(x, *x.shape[1:]) if needs_image else x.new_empty(0)
    return image, *launch.prologue_vjp(grad, term, x, affine, image, needs_sums)


def prologue_vjp(
    grad: Tensor, term: Term, x: Tensor, affine: Affine, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """m m0 grad s [N, C, H, W], and the sums over the pixels of m grad (m0 a - center) and of m grad [N, C].

    Args:
        term: a and s; a - 0 stands for a - center where it is not centered.
        x, affine: say where m0 and m are 1, and have no gradient here.
        needs: which of the three; None in place of the others.

    Gradients: any order, for grad, a and s.
    """
    needs_sums = needs[1] or needs[2]
    image, of_scale, of_shift = _prologue_vjp(
        grad, term.image, term.factor, x, *affine, term.centered, needs[0], needs_sums
    )
    return image if needs[0] else None, of_scale if needs[1] else None, of_shift if needs[2] else None


@_prologue_vjp.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, x, _, needs_image, needs_sums = _Vjp.of(inputs)
    return vjp_shapes(x, needs_image, needs_sums)


def _prologue_vjp_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    grad, term, x, affine, *_ = _Vjp.of(inputs)
    needs_y, needs_image, needs_factor = (needs_grad(ctx, i, inputs) for i in range(3))
    of_image, of_scale, of_shift = present(grads)
    grad_grad = vjp_backward(of_image, of_scale, of_shift, term, x, affine) if needs_y else None
    grad_image = grad_factor = None
    needs = (needs_image and of_scale is not None, needs_factor and of_image is not None, False)
    if any(needs):
        grad_image, grad_factor, _ = prologue_vjp(grad, Term(of_image, of_scale), x, affine, needs)
    return grad_grad, grad_image, grad_factor, *[None] * 9


def vjp_backward(
    of_image: Tensor | None,
    of_scale: Tensor | None,
    of_shift: Tensor | None,
    term: Term,
    x: Tensor,
    affine: Affine,
) -> Tensor:
    """The gradient of prologue_vjp in its ``grad``, of those of its three results."""
    second = NO_TERM if of_scale is None else Term(term.image, of_scale, term.centered)
    return prologue_jvp(Term(of_image, term.factor), second, of_shift, x, affine)


def vjp_shapes(x: Tensor, needs_image: bool, needs_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    image = empty_image(x, *x.shape[1:]) if needs_image else x.new_empty(0)
    sums = x.shape[:2] if needs_sums else (0,)
    return image, x.new_empty(sums, dtype=torch.float32), x.new_empty(sums, dtype=torch.float32)


def present(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of results that are there: those left out are empty, and so are their gradients."""
    return [None if grad is None or grad.numel() == 0 else grad for grad in grads]


register_autograd(_prologue_vjp, _prologue_vjp_backward, save_few)


class _Jvp(NamedTuple):
    first: Term
    second: Term
    added: Tensor | None
    x: Tensor
    affine: Affine

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> _Jvp:
        image, factor, added, other, other_factor, x, *affine, centered = inputs
        return cls(Term(image, factor), Term(other, other_factor, centered), added, x, Affine(*affine))


@torch.library.custom_op(
    "raccgan::depthwise_triton_prologue_jvp",
    mutates_args=(),
    schema=f"(Tensor? image, Tensor? factor, Tensor? added, Tensor? other, Tensor? other_factor, Tensor x, {SCHEMA}, "
    "bool centered) -> Tensor",
)
def _prologue_jvp(*inputs: Any) -> Tensor:
    first, second, added, x, affine = _Jvp.of(inputs)
    out = empty_image(x, *x.shape[1:])
    launch.prologue_jvp(first, second, added, x, affine, out)
    return out


def prologue_jvp(first: Term, second: Term, added: Tensor | None, x: Tensor, affine: Affine) -> Tensor:
    """m (m0 a s + (m0 b - center) r + added) [N, C, H, W] in x's dtype.

    Args:
        first: a and s. An image that is None is left out.
        second: b and r; b - 0 stands for b - center where it is not centered.
        added: [N, C], or None.
        x, affine: say where m0 and m are 1, and have no gradient here.

    Gradients: any order, for the others.
    """
    out: Tensor = _prologue_jvp(*first[:2], added, *second[:2], x, *affine, second.centered)
    return out


@_prologue_jvp.register_fake
def _(*inputs: Any) -> Tensor:
    x = _Jvp.of(inputs).x
    return empty_image(x, *x.shape[1:])


def _prologue_jvp_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    first, second, _, x, affine = _Jvp.of(inputs)
    needs = [needs_grad(ctx, i, inputs) for i in range(5)]
    of_first: tuple[Tensor | None, ...] = (None, None, None)
    of_second: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[:3]):
        of_first = prologue_vjp(grad, first, x, affine, needs[:3])
    if any(needs[3:]):
        of_second = prologue_vjp(grad, second, x, affine, (*needs[3:], False))
    return *of_first, *of_second[:2], *[None] * 7


register_autograd(_prologue_jvp, _prologue_jvp_backward, save_inputs)
