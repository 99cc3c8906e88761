"""The instance norm before the convolution: the moments of each sample's channel, and one op for norm and convolution.

A norm folds into a prologue. center is the mean without its gradient. shift contains (center - mean) * scale: the value
of this term is 0, but the term carries the gradient of the mean. So nothing cancels where the mean of an image is large
beside its deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.autograd import define, inputs_of, save_inputs
from raccgan.kernels.depthwise_separable.triton import launch
from raccgan.kernels.depthwise_separable.triton.launch import NO_TERM, Affine, Convolution, Stride, Term
from raccgan.kernels.depthwise_separable.triton.ops import correlation, depthwise_vjp, jvp
from raccgan.kernels.layout import empty_image
from raccgan.kernels.moments.triton import fill_moments


def folded(mean: Tensor, inverse: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """(. - mean) * inverse, then scale and shift, as one scale and shift [N, C].

    Of what is measured from a center, ``mean`` is the mean's distance from it.
    """
    scale = inverse if scale is None else inverse * scale
    return scale, -mean * scale if shift is None else torch.addcmul(shift, mean, scale, value=-1)


def normalising(affine: Affine, x: Tensor, eps: float) -> Affine:
    """The prologue with an instance norm of x folded into its scale and shift."""
    mean, var = moments(x, affine.pre_relu)
    center, inverse = mean.detach(), torch.rsqrt(var + eps)
    scale, shift = folded(mean - center, inverse, affine.scale, affine.shift)
    return affine._replace(scale=scale, shift=shift, center=center)


def _moments_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


def _moments_backward(ctx: Any, needs: Sequence[bool], grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor]:
    x, pre_relu, mean = inputs_of(ctx)
    pixels = x.shape[2] * x.shape[3]
    factor, center = grad_var * 2 / pixels, mean.detach()
    added = grad_mean / pixels - factor * (mean - center)
    # The ReLU's mask lies over both terms, as a last one does.
    return (jvp(NO_TERM, Term(x, factor, centered=True), added, x, Affine(relu=pre_relu, center=center)),)


@define(
    "depthwise_triton_moments(Tensor x, bool pre_relu) -> (Tensor, Tensor)",
    _moments_shapes,
    _moments_backward,
    partial(save_inputs, results=slice(1), materialize=True),
)
def moments(x: Tensor, pre_relu: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [N, C], float32, of x [N, C, H, W] or of its ReLU. Any order of gradient."""
    mean, var = _moments_shapes(x)
    fill_moments(x, mean, var, pre_relu=pre_relu)
    return mean, var


def _arguments(*inputs: Any) -> tuple[Tensor, Convolution, Affine]:
    """The affine is what follows the norm, without a center."""
    x, w, scale, shift, pre_relu, relu, down, up, *_ = inputs
    return x, Convolution(w, Stride(down, up)), Affine(scale, shift, None, pre_relu, relu)


def _normalised_shapes(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_image(x, x.shape[1], *others[-3:-1]), *_moments_shapes(x)


def _normalised_backward(
    ctx: Any, needs: Sequence[bool], grad_y: Tensor | None, grad_mean: Tensor | None, grad_inverse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, mean, inverse = inputs_of(ctx)
    x, convolution, affine = _arguments(*inputs)
    center = mean.detach()
    mean = mean - center  # zero, with the mean's gradient
    scale, shift = folded(mean, inverse, affine.scale, affine.shift)
    folded_affine = affine._replace(scale=scale, shift=shift, center=center)
    needs_x, needs_w, *needs_affine = needs[:4]
    grad_x = grad_w = grad_scale = grad_shift = None
    if grad_y is not None and needs_w:
        grad_w = correlation(x, grad_y, convolution.kernel_size, convolution.stride, folded_affine)
    if grad_y is not None and (needs_x or any(needs_affine)):
        grad_x, of_scale, grad_shift = depthwise_vjp(grad_y, x, convolution, folded_affine, (needs_x, True, True))
        assert of_scale is not None
        assert grad_shift is not None
        of_scale = of_scale - grad_shift * mean
        grad_scale = of_scale * inverse
        grad_mean = _sum(grad_mean, -grad_shift * scale)
        grad_inverse = _sum(grad_inverse, of_scale if affine.scale is None else of_scale * affine.scale)
    if needs_x and (grad_mean is not None or grad_inverse is not None):
        pixels = x.shape[2] * x.shape[3]
        factor = torch.zeros_like(mean) if grad_inverse is None else grad_inverse * inverse**3 / -pixels
        added = -factor * mean if grad_mean is None else grad_mean / pixels - factor * mean
        masks = Affine(relu=affine.pre_relu, center=center)
        grad_x = jvp(Term(grad_x), Term(x, factor, centered=True), added, x, masks)
    return grad_x, grad_w, grad_scale, grad_shift


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


@define(
    "depthwise_triton_normalised(Tensor x, Tensor w, Tensor? scale, Tensor? shift, bool pre_relu, bool relu, "
    "int down, int up, SymInt height, SymInt width, float eps) -> (Tensor, Tensor, Tensor)",
    _normalised_shapes,
    _normalised_backward,
    partial(save_inputs, results=slice(1, 3)),
)
def _normalised(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    (x, convolution, affine), eps = _arguments(*inputs), inputs[-1]
    y, mean, var = _normalised_shapes(*inputs)
    fill_moments(x, mean, var, pre_relu=affine.pre_relu)
    inverse = torch.rsqrt(var + eps)
    scale, shift = folded(torch.zeros_like(mean), inverse, affine.scale, affine.shift)
    launch.depthwise(x, convolution, affine._replace(scale=scale, shift=shift, center=mean), y)
    return y, mean, inverse


def normalised(x: Tensor, convolution: Convolution, height: int, width: int, affine: Affine, eps: float) -> Tensor:
    """:func:`ops.depthwise` with an instance norm of x, or of its first ReLU, before the prologue's scale and shift.

    A node of its own, so that x's gradients by the convolution and by the moments are not two images to be added.
    """
    scale, shift, _, *relus = affine
    return _normalised(x, convolution.w, scale, shift, *relus, *convolution.stride, height, width, eps)[0]
