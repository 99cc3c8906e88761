"""The triton backend: Triton kernels around the library's matrix product, or one kernel where that is less work.

The norm folds into scale and shift of x - mean; its moments take one read of x. Upsampling and pool fold into the
weights of the depthwise convolution. :func:`fused.fuses` chooses between one kernel, :func:`fused.fused`, and two:
:func:`ops.depthwise`, then the library's matrix product. Both have the derivatives of the closed family in :mod:`ops`.
A 1 x 1 convolution that is not fused is the library's matrix product after the prologue, which PyTorch's operations
compute. The kernels have not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import convolutions
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights
from raccgan.kernels.depthwise_separable.triton import norm, ops
from raccgan.kernels.depthwise_separable.triton.arguments import Affine, Stride
from raccgan.kernels.depthwise_separable.triton.fused import Fused, fused, fuses
from raccgan.kernels.layout import images, in_autocast_dtype, rows


def depthwise_separable(
    x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None, *_: Tensor | None
) -> Tensor:
    """As :func:`raccgan.kernels.depthwise_separable.depthwise_separable`.

    The result is channels_last, for any x, but of a 1 x 1 convolution that is not fused.
    """
    x = in_autocast_dtype(x)
    stride = Stride(resize.pool if resize.upsample == 1 else 1, resize.upsample)
    if resize.upsample * resize.pool < 4 and fuses(x, weights.pointwise, weights.kernel_size, stride):
        return _in_one_kernel(x, weights, prologue, stride, residual)
    if weights.kernel_size == 1:  # the depthwise weight is part of the matrix
        u = pooled(upsampled(apply_prologue(x, prologue), resize.upsample), resize.pool)
        return convolutions.pointwise(*convolutions.operands(u, weights), residual)
    convolution, size = ops.resized(weights.depthwise.float(), stride), _size(x, stride)
    if prologue.norm == "instance":
        u = norm.normalised(x, convolution, *size, _affine(prologue), prologue.eps)
    else:
        u = ops.depthwise(x, convolution, *size, _affine(prologue))
    y = _multiplied(pooled(u, resize.pool // stride.down), weights.pointwise.to(x.dtype), weights.float().bias())
    return y if residual is None else y + residual


def _in_one_kernel(x: Tensor, weights: Weights, prologue: Prologue, stride: Stride, residual: Tensor | None) -> Tensor:
    affine = _affine(prologue)
    if prologue.norm == "instance":
        affine = norm.normalising(affine, x, prologue.eps)
    convolution = ops.resized(weights.depthwise.float(), stride)
    matrix, bias = weights.pointwise.flatten(1).to(x.dtype), weights.float().bias()
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    y = fused(Fused(x, convolution, matrix, bias, inside, affine, _size(x, stride)))
    return y if residual is None or inside is not None else y + residual


def _affine(prologue: Prologue) -> Affine:
    scale, shift = (None if t is None else t.float() for t in (prologue.scale, prologue.shift))
    return Affine(scale, shift, None, prologue.pre_relu, prologue.relu)


def _size(x: Tensor, stride: Stride) -> tuple[int, int]:
    height, width = x.shape[2:]
    return height * stride.up // stride.down, width * stride.up // stride.down


def _multiplied(u: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The pointwise convolution of u as a matrix product, whose derivatives PyTorch makes of such products again."""
    left, matrix = rows(u), w.flatten(1).t()
    product = left @ matrix if bias is None else torch.addmm(bias.to(u.dtype), left, matrix)
    return images(product, u)
