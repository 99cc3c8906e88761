"""Depthwise and pointwise convolution by PyTorch's operations, as two families closed under differentiation.

Depthwise, with stride 1 and "same" padding: the gradients of D(x, w) are D(g, flip(w)) in x and C(x, g) in w, the
correlation over the batch. Those of C are D(g, flip(v)) in x and D(x, v) in g. Eager PyTorch differentiates its weight
gradient with one small convolution per channel.

The pointwise family is P(x, w), its transpose T(g, w), and the product of x and g over all pixels. Eager PyTorch
differentiates that product by a convolution whose kernel is as large as the image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.autograd import needed
from raccgan.kernels.depthwise_separable.options import Weights
from raccgan.kernels.layout import empty_image, images, in_autocast_dtype, rows

FEW, WIDE = 20_000_000, 64 * 128  # see _as_matrices


def depthwise(x: Tensor, w: Tensor) -> Tensor:
    """D(x, w) for x [N, C, H, W], w [C, 1, k, k] with k odd; stride 1, zero padding k // 2. Any order of derivative."""
    return Depthwise.apply(in_autocast_dtype(x), in_autocast_dtype(w))


def pointwise(x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """P(x, w) + b + residual for x [N, C, H, W], w [D, C, 1, 1], b [D] or None. Any order of derivative."""
    x, w, b = in_autocast_dtype(x), in_autocast_dtype(w), b if b is None else in_autocast_dtype(b)
    # Of one small image, the detour through autograd took as long as the product.
    y: Tensor = Pointwise.apply(x, w, b) if torch.is_grad_enabled() else _pointwise(x, w, b)
    return y if residual is None else y + residual


def operands(u: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, w and b, of which P(x, w) + b is what is left to do after a depthwise convolution without its bias.

    ``u`` is what the depthwise convolution made; of a 1 x 1 one, which is part of w then, its input.
    """
    if weights.kernel_size == 1:
        bias = weights.bias()  # before the matrix: autograd adds up a weight's gradients in the order of its uses
        return u, weights.matrix(), bias
    # Whether reading u twice and writing it is less than reading all weights once more; a graph's batch is open.
    few = not torch.compiler.is_compiling() and 3 * u.numel() <= weights.pointwise.numel()
    if weights.depthwise_bias is not None and few:
        return u + weights.depthwise_bias[:, None, None].to(u.dtype), weights.pointwise, weights.pointwise_bias
    return u, weights.pointwise, weights.bias()


class Depthwise(torch.autograd.Function):
    """D(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, padding=w.shape[-1] // 2, groups=w.shape[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (needs_x, needs_w) = ctx.saved_tensors, needed(ctx)
        grad_x = Depthwise.apply(g, w.flip(2, 3)) if needs_x else None
        return grad_x, DepthwiseCorrelation.apply(x, g, w.shape[-1]) if needs_w else None


class DepthwiseCorrelation(torch.autograd.Function):
    """C(x, g) [C, 1, k, k]: sum over n,h,w of x[n, c, h + i - k//2, w + j - k//2] * g[n, c, h, w]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, g)
        w = x.new_empty(x.shape[1], 1, k, k)  # convolution_backward reads only its shape
        return _convolution_backward(g, x, w, (False, True, False), groups=x.shape[1])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (x, g), (needs_x, needs_g, _) = ctx.saved_tensors, needed(ctx)
        grad_x = Depthwise.apply(g, v.flip(2, 3)) if needs_x else None
        return grad_x, Depthwise.apply(x, v) if needs_g else None, None


class Pointwise(torch.autograd.Function):
    """P(x, w) + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _pointwise(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, w), (needs_x, needs_w, needs_b) = ctx.saved_tensors, needed(ctx)
        grad_x = PointwiseTransposed.apply(g, w) if needs_x else None
        grad_w = PointwiseProduct.apply(x, g) if needs_w else None
        return grad_x, grad_w, rows(g).sum(dim=0) if needs_b else None


class PointwiseTransposed(torch.autograd.Function):
    """T(g, w) [N, C, H, W]: P's gradient in x. It reads w as it lies, where P(g, w^T) would copy it."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(g, w)
        if _as_matrices(g, w):
            return images(rows(g) @ w.flatten(1), g)
        spread = _in_sixteen(g)
        x = empty_image(spread, w.shape[1], *spread.shape[2:])  # convolution_backward reads only its shape
        grad = _convolution_backward(spread, x, w, (True, False, False))[0]
        return grad if spread is g else images(rows(grad), g)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> tuple[Tensor | None, ...]:
        (g, w), (needs_g, needs_w) = ctx.saved_tensors, needed(ctx)
        grad_g = Pointwise.apply(t, w, None) if needs_g else None
        return grad_g, PointwiseProduct.apply(t, g) if needs_w else None


class PointwiseProduct(torch.autograd.Function):
    """The gradient of P's weight, [D, C, 1, 1]: the sum over n,h,w of g times x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        w = x.new_empty(g.shape[1], x.shape[1], 1, 1)  # as above
        if _as_matrices(x, w) and _as_matrices(g, w):
            return (rows(g).t() @ rows(x)).view(w.shape)
        spread = _in_sixteen(x), _in_sixteen(g)
        if spread[0].shape[0] == spread[1].shape[0]:  # else they lie differently
            x, g = spread
        return _convolution_backward(g, x, w, (False, True, False))[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (x, g), (needs_x, needs_g) = ctx.saved_tensors, needed(ctx)
        grad_x = PointwiseTransposed.apply(g, v) if needs_x else None
        return grad_x, Pointwise.apply(x, v, None) if needs_g else None


def _pointwise(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if _as_matrices(x, w):
        left, columns = rows(x), w.flatten(1).t()
        if w.shape[1] == 1:
            return images(left * columns if b is None else torch.addcmul(b, left, columns), x)
        return images(left @ columns if b is None else torch.addmm(b, left, columns), x)
    spread = _in_sixteen(x)
    y = F.conv2d(spread, w, b)
    return y if spread is x else images(rows(y), x)


def _as_matrices(x: Tensor, w: Tensor) -> bool:
    """Whether to multiply matrices instead of calling a convolution, for images x of either side of weights w.

    An image of one channel is channels_last and NCHW at once, and PyTorch's convolution takes it for NCHW and copies
    the other side: 17.5 ms against 0.3 for float32 [64, 1, 32, 32] to 64 channels on one core.

    Elsewhere on a CPU a convolution takes some 60 microseconds more to begin and packs w at every call. Over shapes of
    the published models P, T and the product took 1.4, 2.3 and 1.9 times as long with it as with matrices in float32 up
    to FEW multiply-adds, and 1.3, 2.2 and 2.0 in bfloat16 with at least WIDE weights (medians, two cores of a Xeon). On
    an EPYC a product in float32 ran at less than half of what a large convolution reaches.
    """
    if w.shape[1] == 1:
        return True
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # the compiler's guards would be on the batch
        return False
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if x.dtype == torch.bfloat16 and w.numel() >= WIDE:
        return True
    return x.dtype in (torch.float32, torch.bfloat16) and x.numel() // x.shape[1] * w.numel() <= FEW


def _in_sixteen(x: Tensor) -> Tensor:
    """The same pixels as sixteen images of one row, where PyTorch's convolution gains by it.

    In float32 and with one thread PyTorch asks oneDNN only from sixteen images on, which is 1.4 to 2.5 times as fast as
    what it does otherwise. With rows of fewer pixels oneDNN loses.
    """
    n, c, height, width = x.shape
    pixels = n * height * width
    if (
        torch.compiler.is_compiling()  # which chooses by itself
        or n >= 16
        or pixels % 16
        or pixels < 16 * 16
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or torch.get_num_threads() > 1
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return x
    return rows(x).view(16, 1, pixels // 16, c).permute(0, 3, 1, 2)


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, bool, bool], groups: int = 1) -> Any:
    padding = [w.shape[-1] // 2] * 2
    return torch.ops.aten.convolution_backward(
        g, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], groups, list(mask)
    )
