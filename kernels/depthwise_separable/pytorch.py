"""The pytorch backend: PyTorch's own convolutions on less arithmetic than the reference's. Exact up to rounding.

1. Both convolutions and the pool are families closed under differentiation: :mod:`convolutions`, :mod:`around`.
2. Pointwise convolution and average pool commute, biases included: pooling first leaves a quarter of the matrix
   product.
3. A 1 x 1 depthwise convolution folds into the pointwise one: W = Wp diag(wd), b = bp + Wp bd. For larger
   kernels only the depthwise bias folds, unless the image is so small that adding the bias is cheaper.
"""

from __future__ import annotations

from torch import Tensor

from raccgan.kernels.depthwise_separable import convolutions
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights


def depthwise_separable(
    x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None, *_: Tensor | None
) -> Tensor:
    """As :func:`raccgan.kernels.depthwise_separable.depthwise_separable`."""
    x = upsampled(apply_prologue(x, prologue), resize.upsample)
    if weights.kernel_size > 1:
        x = convolutions.depthwise(x, weights.depthwise)
    return convolutions.pointwise(*convolutions.operands(pooled(x, resize.pool), weights), residual)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    return convolutions.pointwise(x, weight, bias)
