"""The ops that the Triton kernels are registered as: a family closed under differentiation, so every order follows.

    D(phi(x), w)      depthwise convolution of stride 1 (w odd), of stride 2 or transposed (w even), after a prologue
    C(phi(x), g)      its gradient in w: the correlation of phi(x) and g over the batch
    phi(x)            m ((m0 x - centre) scale + shift), the prologue: m0 and m are where its ReLUs are open, 1 where
                      it has none

With q = w convolved with a 2 x 2 box, nearest upsampling before D(., w) is the transposed convolution with q, and four
times the average pool after it is the one of stride 2: each of them is the other one's adjoint, with q flipped. So

    dD/dphi . g = D'(g, flip(w))          D' is D, or swaps stride 2 and transposed
    dD/dw . g   = C(phi, g)               and C's own gradients are D'(g, flip(v)) and D(phi, v)

phi is bilinear but for its masks, and so are its two derivatives, each of which gives the other one's:

    cotangent(g; a, s)              m m0 g s,  sum of m g (m0 a - centre),  sum of m g         over the pixels
    tangent(a, s, b, other, r)      m (m0 a s + (m0 other - centre) r + b)

There a and other are measured from the centre where they are x itself, and from zero otherwise. A norm makes the centre
the mean, without a gradient, and has (mean - centre) * scale in the shift, which is zero and has the mean's: so nothing
cancels where an image is far from zero beside its deviation. The gradient of the moments of a channel is a tangent too.

Images are float32, bfloat16 or float16; weights, scale, shift and centre [N, C] and all sums are float32. Results are
channels_last, and the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.autograd import wanted
from raccgan.kernels.depthwise_separable import triton_launch as launch


class Prologue(NamedTuple):
    """act((pre(.) - centre) * scale + shift) of an image; scale, shift and centre [N, C] float32."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    centre: Tensor | None = None  # without a gradient
    rectify_first: bool = False
    rectify: bool = False

    @property
    def nothing(self) -> bool:
        return self.scale is None and not (self.rectify_first or self.rectify)


NO_PROLOGUE = Prologue()


class Geometry(NamedTuple):
    """Of a depthwise convolution: stride 2, or transposed with stride 2 (up = 2), or neither."""

    stride: int = 1
    up: int = 1

    def transposed(self) -> Geometry:
        return Geometry(self.up, self.stride)


PLAIN = Geometry()


def resized(w: Tensor, geometry: Geometry) -> Tensor:
    """The weights [C, 1, K, K] of upsampling, then w; or of w, then the average pool; w [C, 1, k, k] where neither."""
    if geometry == PLAIN:
        return w
    # The average over a 2 x 2 box; upsampling sums where the pool averages.
    return torch.nn.functional.avg_pool2d(w, 2, stride=1, padding=1, divisor_override=1 if geometry.up == 2 else None)


# ---- depthwise convolution -----------------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton", mutates_args=())
def _depthwise(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None,
    stride: int, up: int, h: int, v: int, rectify_first: bool, rectify: bool,
) -> Tensor:  # fmt: skip
    y = image_of(x, x.shape[1], h, v)
    launch.depthwise(x, w, scale, shift, centre, y, stride, up, rectify_first, rectify)
    return y


def depthwise(x: Tensor, w: Tensor, geometry: Geometry, h: int, v: int, prologue: Prologue = NO_PROLOGUE) -> Tensor:
    """D(phi(x), w).

    Args:
        x: [N, C, H, W].
        w: [C, 1, K, K] float32, K odd for stride 1 and even otherwise; zero padding (K - 1) // 2.
        geometry: which convolution.
        h, v: sides of the result; H and W for stride 1, and at most their halves or doubles otherwise: what a smaller
            image's gradient is in a larger one whose last row was cut off.
        prologue: phi.

    Returns:
        [N, C, h, v] of x's dtype. Any order of gradient in x, w, scale and shift.
    """
    y: Tensor = _depthwise(
        x, w, prologue.scale, prologue.shift, prologue.centre, *geometry, h, v,
        prologue.rectify_first, prologue.rectify,
    )  # fmt: skip
    return y


@_depthwise.register_fake
def _(
    x: Tensor, w: Any, scale: Any, shift: Any, centre: Any, stride: int, up: int, h: int, v: int, *flags: bool
) -> Tensor:
    return image_of(x, x.shape[1], h, v)


def _save_depthwise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _depthwise_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, w, scale, shift, centre = ctx.saved_tensors
    stride, up, _, _, *flags = ctx.options
    geometry, prologue = Geometry(stride, up), Prologue(scale, shift, centre, *flags)
    needs = [wanted(ctx, i, (x, w, scale, shift)) for i in range(4)]
    grad_w = correlation(x, g, w.shape[-1], geometry, prologue) if needs[1] else None
    grad_x, grad_scale, grad_shift = through(g, x, w, geometry, prologue, (needs[0], needs[2], needs[3]))
    return grad_x, grad_w, grad_scale, grad_shift, *[None] * 7


def through(
    g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, prologue: Prologue, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift of D(phi(x), w)."""
    if not any(needs):
        return None, None, None
    if prologue.nothing:
        return depthwise(g, w.flip(2, 3), geometry.transposed(), x.shape[2], x.shape[3]), None, None
    return adjoint(g, w.flip(2, 3), x, prologue.scale, x, geometry.transposed(), prologue, needs, a_is_x=True)


_depthwise.register_autograd(_depthwise_backward, setup_context=_save_depthwise)


# ---- its gradient in the weights -----------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton_correlation", mutates_args=())
def _correlation(
    x: Tensor, g: Tensor, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None,
    k: int, stride: int, up: int, rectify_first: bool, rectify: bool,
) -> Tensor:  # fmt: skip
    return launch.correlation(x, g, scale, shift, centre, k, stride, up, rectify_first, rectify)


def correlation(x: Tensor, g: Tensor, k: int, geometry: Geometry, prologue: Prologue = NO_PROLOGUE) -> Tensor:
    """C(phi(x), g) [C, 1, k, k] float32: the gradient of D's weights, g [N, C, h, v] being that of its result."""
    w: Tensor = _correlation(
        x, g, prologue.scale, prologue.shift, prologue.centre, k, *geometry, prologue.rectify_first, prologue.rectify
    )
    return w


@_correlation.register_fake
def _(x: Tensor, g: Tensor, scale: Any, shift: Any, centre: Any, k: int, *options: Any) -> Tensor:
    return x.new_empty((x.shape[1], 1, k, k), dtype=torch.float32)


def _save_correlation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _correlation_backward(ctx: Any, w: Tensor) -> tuple[Any, ...]:
    x, g, scale, shift, centre = ctx.saved_tensors
    _, stride, up, *flags = ctx.options
    geometry, prologue = Geometry(stride, up), Prologue(scale, shift, centre, *flags)
    needs = [wanted(ctx, i, (x, g, scale, shift)) for i in range(4)]
    grad_g = depthwise(x, w, geometry, g.shape[2], g.shape[3], prologue).to(g.dtype) if needs[1] else None
    grad_x, grad_scale, grad_shift = through(g, x, w, geometry, prologue, (needs[0], needs[2], needs[3]))
    return grad_x, grad_g, grad_scale, grad_shift, *[None] * 6


_correlation.register_autograd(_correlation_backward, setup_context=_save_correlation)


# ---- its gradient in the image -------------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton_adjoint", mutates_args=())
def _adjoint(
    g: Tensor, w: Tensor, a: Tensor | None, s: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, stride: int, up: int, rectify_first: bool, rectify: bool, a_centred: bool,
    want_image: bool, want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    image = image_of(x, *x.shape[1:]) if want_image else x.new_empty(0)
    sums = launch.adjoint(
        g, w, a, s, x, scale, shift, centre, image, stride, up, rectify_first, rectify, a_centred, want_sums
    )
    return image, *sums


def adjoint(
    g: Tensor,
    w: Tensor,
    a: Tensor | None,
    s: Tensor | None,
    x: Tensor,
    geometry: Geometry,
    prologue: Prologue,
    needs: Sequence[bool],
    a_is_x: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`cotangent` of D(g, w), a convolution whose result has x's shape, in one kernel. Any order of gradient."""
    image, of_scale, of_shift = _adjoint(
        g, w, a, s, x, prologue.scale, prologue.shift, prologue.centre, *geometry, prologue.rectify_first,
        prologue.rectify, a_is_x and prologue.centre is not None, needs[0], needs[1] or needs[2],
    )  # fmt: skip
    return image if needs[0] else None, of_scale if needs[1] else None, of_shift if needs[2] else None


@_adjoint.register_fake
def _(g: Tensor, w: Any, a: Any, s: Any, x: Tensor, scale: Any, shift: Any, *options: Any) -> tuple[Tensor, ...]:
    return _shapes(x, *options[-2:])


def _shapes(x: Tensor, want_image: bool, want_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    image = image_of(x, *x.shape[1:]) if want_image else x.new_empty(0)
    sums = x.shape[:2] if want_sums else (0,)
    return image, x.new_empty(sums, dtype=torch.float32), x.new_empty(sums, dtype=torch.float32)


def _save_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:13]
    ctx.set_materialize_grads(False)


def _adjoint_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    g, w, a, s, x, scale, shift, centre = ctx.saved_tensors
    stride, up, *flags, a_centred = ctx.options
    geometry, prologue = Geometry(stride, up), Prologue(scale, shift, centre, *flags)
    need_g, need_w, need_a, need_s = (wanted(ctx, i, (g, w, a, s)) for i in range(4))
    t, ts, tb = (None if c is None or c.numel() == 0 else c for c in cotangents)
    grad_g = grad_w = None
    if need_g or need_w:
        inner = tangent(t, s, tb, None if ts is None else a, ts, x, prologue, a_centred)
        if need_g:
            grad_g = depthwise(inner, w.flip(2, 3), geometry.transposed(), g.shape[2], g.shape[3])
        if need_w:
            grad_w = correlation(g, inner, w.shape[-1], geometry)
    asked = (need_a and ts is not None, need_s and t is not None, False)
    grad_a, grad_s, _ = adjoint(g, w, t, ts, x, geometry, prologue, asked) if any(asked) else (None, None, None)
    return grad_g, grad_w, grad_a, grad_s, *[None] * 11


_adjoint.register_autograd(_adjoint_backward, setup_context=_save_adjoint)


# ---- the prologue's derivatives ------------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton_cotangent", mutates_args=())
def _cotangent(
    g: Tensor, a: Tensor | None, s: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, rectify_first: bool, rectify: bool, a_centred: bool, want_image: bool, want_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    image = image_of(x, *x.shape[1:]) if want_image else x.new_empty(0)
    sums = launch.cotangent(g, a, s, x, scale, shift, centre, image, rectify_first, rectify, a_centred, want_sums)
    return image, *sums


def cotangent(
    g: Tensor,
    a: Tensor | None,
    s: Tensor | None,
    x: Tensor,
    prologue: Prologue,
    needs: Sequence[bool],
    a_centred: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """m m0 g s [N, C, H, W], and over the pixels the sums of m g m0 a and of m g [N, C], where ``needs`` asks for each.
    Where ``a_centred``, the first sum is of m g (m0 a - centre).

    x and the prologue say where m0 and m are 1, and have no gradient here; s None is 1. Any order in g, a and s.
    """
    image, of_scale, of_shift = _cotangent(
        g, a, s, x, prologue.scale, prologue.shift, prologue.centre, prologue.rectify_first, prologue.rectify,
        a_centred, needs[0], needs[1] or needs[2],
    )  # fmt: skip
    return image if needs[0] else None, of_scale if needs[1] else None, of_shift if needs[2] else None


@_cotangent.register_fake
def _(g: Any, a: Any, s: Any, x: Tensor, scale: Any, shift: Any, *options: Any) -> tuple[Tensor, ...]:
    return _shapes(x, *options[-2:])


def _save_cotangent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:10]
    ctx.set_materialize_grads(False)


def _cotangent_backward(ctx: Any, t: Tensor | None, ts: Tensor | None, tb: Tensor | None) -> tuple[Any, ...]:
    g, a, s, x, scale, shift, centre = ctx.saved_tensors
    *flags, a_centred = ctx.options
    prologue = Prologue(scale, shift, centre, *flags)
    need_g, need_a, need_s = (wanted(ctx, i, (g, a, s)) for i in range(3))
    t, ts, tb = (None if c is None or c.numel() == 0 else c for c in (t, ts, tb))
    grad_g = tangent(t, s, tb, None if ts is None else a, ts, x, prologue, a_centred) if need_g else None
    asked = (need_a and ts is not None, need_s and t is not None, False)
    grad_a, grad_s, _ = cotangent(g, t, ts, x, prologue, asked) if any(asked) else (None, None, None)
    return grad_g, grad_a, grad_s, *[None] * 9


_cotangent.register_autograd(_cotangent_backward, setup_context=_save_cotangent)


@torch.library.custom_op("raccgan::depthwise_triton_tangent", mutates_args=())
def _tangent(
    a: Tensor | None, s: Tensor | None, b: Tensor | None, other: Tensor | None, r: Tensor | None,
    x: Tensor, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None, rectify_first: bool, rectify: bool,
    other_centred: bool,
) -> Tensor:  # fmt: skip
    out = image_of(x, *x.shape[1:])
    launch.tangent(a, s, b, other, r, x, scale, shift, centre, out, rectify_first, rectify, other_centred)
    return out


def tangent(
    a: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    other: Tensor | None,
    r: Tensor | None,
    x: Tensor,
    prologue: Prologue,
    other_centred: bool = False,
) -> Tensor:
    """m (m0 (a s + other r) + b) [N, C, H, W] in x's dtype; images and b that are None are left out, s and r are 1.
    Where ``other_centred``, m0 other - centre stands for m0 other.

    x and the prologue say where m0 and m are 1, and have no gradient here. Any order in the others.
    """
    out: Tensor = _tangent(
        a, s, b, other, r, x, prologue.scale, prologue.shift, prologue.centre, prologue.rectify_first,
        prologue.rectify, other_centred,
    )  # fmt: skip
    return out


@_tangent.register_fake
def _(a: Any, s: Any, b: Any, other: Any, r: Any, x: Tensor, *options: Any) -> Tensor:
    return image_of(x, *x.shape[1:])


def _save_tangent(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _tangent_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    a, s, _, other, r, x, scale, shift, centre = ctx.saved_tensors
    *flags, other_centred = ctx.options
    prologue = Prologue(scale, shift, centre, *flags)
    needs = [wanted(ctx, i, ctx.saved_tensors) for i in range(5)]
    first = cotangent(g, a, s, x, prologue, needs[:3]) if any(needs[:3]) else (None, None, None)
    asked = (*needs[3:], False)
    second = cotangent(g, other, r, x, prologue, asked, other_centred) if any(asked) else (None, None, None)
    return *first, *second[:2], *[None] * 7


_tangent.register_autograd(_tangent_backward, setup_context=_save_tangent)


# ---- moments of each sample's channel ------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton_moments", mutates_args=())
def moments(x: Tensor, rectify_first: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [N, C], float32, of x [N, C, H, W] or of its ReLU. Any order of gradient."""
    return launch.moments(x, rectify_first)


@moments.register_fake
def _(x: Tensor, rectify_first: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.rectify_first = inputs[1]


def _moments_backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> tuple[Tensor, None]:
    x, mean = ctx.saved_tensors
    pixels = x.shape[2] * x.shape[3]
    factor, centre = of_var * 2 / pixels, mean.detach()
    added = of_mean / pixels - factor * (mean - centre)
    # The ReLU's mask lies over both terms, as a last one does.
    prologue = Prologue(rectify=ctx.rectify_first, centre=centre)
    return tangent(None, None, added, x, factor, x, prologue, other_centred=True), None


moments.register_autograd(_moments_backward, setup_context=_save_moments)


def image_of(like: Tensor, c: int, h: int, v: int) -> Tensor:
    sizes = (like.shape[0], c, h, v)
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
