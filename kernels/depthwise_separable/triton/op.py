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

from raccgan.kernels.depthwise_separable import pytorch
from raccgan.kernels.depthwise_separable.around import pooled
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights
from raccgan.kernels.depthwise_separable.triton import norm, ops
from raccgan.kernels.depthwise_separable.triton.fused import fused, fuses
from raccgan.kernels.depthwise_separable.triton.launch import Affine, Stride
from raccgan.kernels.layout import images, in_autocast_dtype, rows


def depthwise_separable(
    x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None, *_: Tensor | None
) -> Tensor:
    """As the op; the result is channels_last, for any x, but of a 1 x 1 convolution that is not fused."""
    x = in_autocast_dtype(x)
    stride = Stride(resize.pool if resize.upsample == 1 else 1, resize.upsample)
    one_kernel = resize.upsample * resize.pool < 4 and fuses(x, weights.pointwise, weights.kernel_size, stride)
    if weights.kernel_size == 1 and not one_kernel:  # the depthwise weight is part of the matrix
        return pytorch.depthwise_separable(x, weights, prologue, resize, residual)
    convolution = ops.resized(weights.depthwise.float(), stride)
    matrix, bias = weights.pointwise.flatten(1).to(x.dtype), weights.float().bias()
    scale, shift = (None if t is None else t.float() for t in (prologue.scale, prologue.shift))
    affine = Affine(scale, shift, None, prologue.pre_relu, prologue.relu)
    size = x.shape[2] * stride.up // stride.down, x.shape[3] * stride.up // stride.down
    inside = None
    if one_kernel:
        affine = norm.normalising(affine, x, prologue.eps) if prologue.norm == "instance" else affine
        inside = residual if residual is not None and residual.dtype == x.dtype else None
        y = fused(x, convolution, matrix, bias, inside, affine, size)
    else:
        if prologue.norm == "instance":
            u = norm.normalised(x, convolution, *size, affine, prologue.eps)
        else:
            u = ops.depthwise(x, convolution, *size, affine)
        u = pooled(u, resize.pool // stride.down)  # derivatives of a matrix product are such again
        left, right = rows(u), matrix.t()
        y = images(left @ right if bias is None else torch.addmm(bias.to(u.dtype), left, right), u)
    return y if residual is None or inside is not None else y + residual
