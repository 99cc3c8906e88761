"""The triton backend: Triton kernels around the library's matrix product, or one kernel where that is less work.

The norm folds into scale and shift of x - mean; its moments take one read of x. Upsampling and pool fold into the
weights of the depthwise convolution. :func:`fused.fuses` chooses between one kernel, :func:`fused.fused`, and two:
:func:`ops.depthwise`, then the library's matrix product. Both have the derivatives of the closed family in :mod:`ops`.
A 1 x 1 convolution that is not fused is the library's matrix product after the prologue, which PyTorch's operations
compute. The kernels have not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import pytorch
from raccgan.kernels.depthwise_separable.around import pooled
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights
from raccgan.kernels.depthwise_separable.triton import launch, norm, ops
from raccgan.kernels.depthwise_separable.triton.fused import fused, fuses, launch_fused
from raccgan.kernels.depthwise_separable.triton.launch import PLAIN, Affine, Convolution, Stride, Term
from raccgan.kernels.layout import images, in_autocast_dtype, rows
from raccgan.kernels.moments.triton import fill_moments
from raccgan.kernels.triton_runtime import Compilation, meta, noted


def depthwise_separable(
    x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None, *_: Tensor | None
) -> Tensor:
    """As :func:`raccgan.kernels.depthwise_separable.depthwise_separable`.

    The result is channels_last, for any x, but of a 1 x 1 convolution that is not fused.
    """
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
        y = _multiplied(pooled(u, resize.pool // stride.down), matrix, bias)
    return y if residual is None or inside is not None else y + residual


def _multiplied(u: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """The pointwise convolution of u as a matrix product, whose derivatives PyTorch makes of such products again."""
    left, right = rows(u), matrix.t()
    product = left @ right if bias is None else torch.addmm(bias.to(u.dtype), left, right)
    return images(product, u)


class _Layer(NamedTuple):
    channels: int
    out_channels: int
    size: int
    channels_last: bool = True


# Channels in no multiples of 16 are loaded one by one. They come first, as the test takes a kernel's first
# configuration for sizes of which a launch knows nothing. Each other layer has a tile of the two models' own.
_LAYERS = (_Layer(100, 120, 32), _Layer(256, 64, 8), _Layer(256, 256, 4), _Layer(1, 64, 32), _Layer(3, 96, 32, False))
_WIDEST = _Layer(96, 256, 32)
_DOWN, _UP = Stride(down=2), Stride(up=2)
_CONVOLUTIONS = {
    torch.bfloat16: ((3, PLAIN), (7, PLAIN), (4, _DOWN), (8, _UP), (4, _UP), (8, _DOWN)),
    torch.float32: ((3, PLAIN), (8, _UP)),
    torch.float16: ((3, PLAIN),),
}
"""Sizes and strides of weights, those of the two models and of their gradients in full in bfloat16."""


def compilations() -> Iterator[Compilation]:
    """For tests without a GPU: every kernel in every dtype and stride on the widest tile, and on every other tile.

    Each has prologue, bias and residual. Every tile in every stride and dtype would be minutes more.
    """
    with noted() as found:
        for layer in _LAYERS:
            _every_kernel(torch.bfloat16, 3, PLAIN, layer)
        for dtype, convolutions_of_models in _CONVOLUTIONS.items():
            for k, stride in convolutions_of_models:
                _every_kernel(dtype, k, stride, _WIDEST)
    for one in found:
        # float32 that is not rounded to tf32 is multiplied by PyTorch: see fuses
        tf32 = {"PRECISION": "tf32"} if "PRECISION" in one.constants else {}
        yield one._replace(constants={**one.constants, **tf32})


def _every_kernel(dtype: torch.dtype, k: int, stride: Stride, layer: _Layer) -> None:
    c, d, size, last = layer
    height = size * stride.up // stride.down
    x, y = meta(dtype, 2, c, size, size, last=last), meta(dtype, 2, c, height, height, last=last)
    values = meta(torch.float32, 2, c)
    affine, term = Affine(values, values, values, pre_relu=True, relu=True), Term(y, values, centered=True)
    convolution = Convolution(meta(torch.float32, c, 1, k, k), stride)
    launch.depthwise(x, convolution, affine, y)
    launch.correlation(x, y, k, stride, affine)
    launch.vjp(x, convolution, term, y, affine, y, True)
    launch.vjp(y, Convolution(), term, y, affine, y, True)
    launch.jvp(term, term, values, y, affine, y)
    fill_moments(y, values, values, pre_relu=True)
    matrix, bias, z = meta(dtype, d, c), meta(torch.float32, d), meta(dtype, 2, d, height, height, last=last)
    launch_fused(x, convolution, matrix, bias, z, affine, z)
