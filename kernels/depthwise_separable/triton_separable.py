"""Ops around the closed family of :mod:`triton_ops`: with an instance norm before, and with the matrix product after.

Each is one node, whose gradients are the family's ops and PyTorch's matrix products: every order follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.autograd import differentiate, wanted
from raccgan.kernels.depthwise_separable import reference
from raccgan.kernels.depthwise_separable import triton_launch as launch
from raccgan.kernels.depthwise_separable.triton_ops import (
    Geometry,
    Prologue,
    correlation,
    depthwise,
    image_of,
    tangent,
    through,
)

# ---- with an instance norm ------------------------------------------------------------------------------------------


def normalising(mean: Tensor, inverse: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(. - mean) * inverse, then scale and shift, as one scale and shift [N, C].

    Of what is measured from a centre, ``mean`` is the mean's distance from it.
    """
    scale = inverse if scale is None else inverse * scale
    return scale, -mean * scale if shift is None else torch.addcmul(shift, mean, scale, value=-1)


@torch.library.custom_op("raccgan::depthwise_triton_normalised", mutates_args=())
def _normalised(
    x: Tensor, w: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, up: int, h: int, v: int,
    rectify_first: bool, rectify: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var = launch.moments(x, rectify_first)
    inverse = torch.rsqrt(var + eps)
    y = image_of(x, x.shape[1], h, v)
    affine = normalising(torch.zeros_like(mean), inverse, scale, shift)
    launch.depthwise(x, w, *affine, mean, y, stride, up, rectify_first, rectify)
    return y, mean, inverse


def normalised(x: Tensor, w: Tensor, geometry: Geometry, h: int, v: int, prologue: Prologue, eps: float) -> Tensor:
    """:func:`depthwise` with an instance norm of x, or of its first ReLU, before the prologue's scale and shift.

    A node of its own, so that x's gradients by the convolution and by the moments are not two images to be added.
    """
    result: tuple[Tensor, Tensor, Tensor] = _normalised(
        x, w, prologue.scale, prologue.shift, *geometry, h, v, prologue.rectify_first, prologue.rectify, eps
    )
    return result[0]


@_normalised.register_fake
def _(
    x: Tensor, w: Any, scale: Any, shift: Any, stride: int, up: int, h: int, v: int, *flags: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, inverse = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return image_of(x, x.shape[1], h, v), mean, inverse


def _save_normalised(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[4:10]
    ctx.set_materialize_grads(False)


def _normalised_backward(
    ctx: Any, g: Tensor | None, of_mean: Tensor | None, of_inverse: Tensor | None
) -> tuple[Any, ...]:
    x, w, scale, shift, mean, inverse = ctx.saved_tensors
    stride, up, _, _, *flags = ctx.options
    centre = mean.detach()
    mean = mean - centre  # zero, with the mean's gradient
    of_x, added = normalising(mean, inverse, scale, shift)
    geometry, prologue = Geometry(stride, up), Prologue(of_x, added, centre, *flags)
    need_x, need_w, need_scale, need_shift = (wanted(ctx, i, (x, w, scale, shift)) for i in range(4))
    grad_x = grad_w = grad_scale = grad_shift = None
    if g is not None and need_w:
        grad_w = correlation(x, g, w.shape[-1], geometry, prologue)
    if g is not None and (need_x or need_scale or need_shift):
        grad_x, of_scale, grad_shift = through(g, x, w, geometry, prologue, (need_x, True, True))
        assert of_scale is not None
        assert grad_shift is not None
        of_scale = of_scale - grad_shift * mean
        grad_scale = of_scale * inverse
        of_mean = _sum(of_mean, -grad_shift * of_x)
        of_inverse = _sum(of_inverse, of_scale if scale is None else of_scale * scale)
    if need_x and (of_mean is not None or of_inverse is not None):
        pixels = x.shape[2] * x.shape[3]
        factor = torch.zeros_like(mean) if of_inverse is None else of_inverse * inverse**3 / -pixels
        added = -factor * mean if of_mean is None else of_mean / pixels - factor * mean
        grad_x = tangent(grad_x, None, added, x, factor, x, Prologue(rectify=flags[0], centre=centre), True)
    return grad_x, grad_w, grad_scale if need_scale else None, grad_shift if need_shift else None, *[None] * 7


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


_normalised.register_autograd(_normalised_backward, setup_context=_save_normalised)


# ---- all of it in one kernel ---------------------------------------------------------------------------------------


@torch.library.custom_op("raccgan::depthwise_triton_separable", mutates_args=())
def _separable(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    centre: Tensor | None, residual: Tensor | None, stride: int, up: int, h: int, v: int, rectify_first: bool,
    rectify: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = image_of(x, pointwise.shape[0], h, v)
    total, squares, largest = launch.separable(
        x, w, pointwise, bias, scale, shift, centre, residual, y, stride, up, rectify_first, rectify, statistics
    )
    return y, total, squares, largest


def separable(
    x: Tensor,
    w: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    h: int,
    v: int,
    prologue: Prologue,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pointwise D(phi(x), w) + bias + residual [N, D, h, v], and of it, where wanted, sum, sum of squares and max.

    Args:
        pointwise: [D, C] of x's dtype.
        bias: [D] float32, or None.
        residual: [N, D, h, v] or None.
        statistics: also return them, [N, D] each, else [0].
        The others: as of :func:`depthwise`.

    Raises:
        RuntimeError: bias or residual of another shape.

    Any order of gradient. D(phi(x), w) is not kept for it, but computed again where pointwise's is asked for.
    """
    sizes = (x.shape[0], pointwise.shape[0], h, v)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _separable(
        x, w, pointwise, None if bias is None else bias.expand(sizes[1]), prologue.scale, prologue.shift,
        prologue.centre, None if residual is None else residual.expand(sizes), *geometry, h, v,
        prologue.rectify_first, prologue.rectify, statistics,
    )  # fmt: skip
    return result


@_separable.register_fake
def _(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Any, scale: Any, shift: Any, centre: Any, residual: Any,
    stride: int, up: int, h: int, v: int, rectify_first: bool, rectify: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (x.shape[0], pointwise.shape[0]) if statistics else (0,)
    total, squares, largest = (x.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return image_of(x, pointwise.shape[0], h, v), total, squares, largest


def _save_separable(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[0] if inputs[-1] else None)
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _separable_backward(ctx: Any, g: Tensor | None, *of_statistics: Tensor | None) -> tuple[Any, ...]:
    *inputs, y = ctx.saved_tensors
    x, w, pointwise, _, scale, shift, centre, _ = inputs
    stride, up, h, v, *flags, statistics = ctx.options
    if statistics and any(c is not None for c in of_statistics):
        (more,) = differentiate(reference.statistics, (y,), of_statistics, (True,))
        g = more if g is None or more is None else g + more
    if g is None:
        return (None,) * 15
    geometry, prologue = Geometry(stride, up), Prologue(scale, shift, centre, *flags)
    needs = [wanted(ctx, i, inputs) for i in range(8)]
    inner = images(rows(g) @ pointwise, x.shape[0], h, v) if needs[0] or needs[1] or needs[4] or needs[5] else g
    grad_x, grad_scale, grad_shift = through(inner, x, w, geometry, prologue, (needs[0], needs[4], needs[5]))
    return (
        grad_x,
        correlation(x, inner, w.shape[-1], geometry, prologue) if needs[1] else None,
        rows(g).t() @ rows(depthwise(x, w, geometry, h, v, prologue)) if needs[2] else None,
        rows(g).sum(dim=0, dtype=torch.float32) if needs[3] else None,
        grad_scale,
        grad_shift,
        None,
        g if needs[7] else None,
        *[None] * 7,
    )


_separable.register_autograd(_separable_backward, setup_context=_save_separable)


def rows(x: Tensor) -> Tensor:
    """[N, C, h, v] as [N * h * v, C]: a view where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(matrix: Tensor, n: int, h: int, v: int) -> Tensor:
    """[N * h * v, D] as [N, D, h, v], channels_last."""
    return matrix.view(n, h, v, matrix.shape[1]).permute(0, 3, 1, 2)
