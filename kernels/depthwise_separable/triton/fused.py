"""The whole op in one kernel: the depthwise tile is the left operand of a matrix product and never leaves the chip.

The kernel is one registered op. Its gradients are the ops of :mod:`ops` and PyTorch's matrix products, so every order
follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.autograd import define, inputs_of, needs_grad
from raccgan.kernels.depthwise_separable.triton import launch, tiles
from raccgan.kernels.depthwise_separable.triton.arguments import PLAIN, SCHEMA, Affine, Convolution, Stride
from raccgan.kernels.depthwise_separable.triton.ops import correlation, depthwise, depthwise_vjp
from raccgan.kernels.layout import empty_image, images, rows
from raccgan.kernels.triton_runtime import cdiv


def fuses(x: Tensor, pointwise: Tensor, kernel_size: int, stride: Stride) -> bool:
    """Whether one kernel is less work than two, by counting; no GPU has been asked.

    It saves writing the depthwise result and reading it, 2 transfers of each value to and from memory, and computes
    that result anew for each block of output channels. Reads of x again come from the first-level cache, by the data
    sheets about eight times as fast as memory (on an H100 128 bytes a clock from each of 132, against 3.35 TB/s), so a
    block more pays where it costs fewer than 16 of them. Beyond two blocks the matrix product decides, and a library's
    is better than one whose operand is computed between its steps.

    A gradient of the pointwise weight needs the depthwise result in memory again, which then saves nothing; and float32
    that may not be rounded to tf32 is not multiplied on tensor cores at all: torch.compile cannot read that flag.
    ``kernel_size`` is the convolution's before resizing is folded into it.
    """
    if torch.is_grad_enabled() and pointwise.requires_grad:
        return False
    if x.dtype == torch.float32 and (torch.compiler.is_compiling() or launch.precision() != "tf32"):
        return False
    d = pointwise.shape[0]
    again = cdiv(d, tiles.outputs_of(x.shape[1], d)) - 1
    taps = (kernel_size if stride == PLAIN else kernel_size + 1) // stride.up
    reads = taps * (stride.down * 3 + taps) / 4  # of a value of x for one of the convolution, in strips of four rows
    return again <= 1 and again * reads <= 16


class Fused(NamedTuple):
    x: Tensor
    convolution: Convolution
    pointwise: Tensor  # [D, C] of x's dtype
    bias: Tensor | None  # [D] float32
    residual: Tensor | None  # [N, D, height, width]
    affine: Affine
    size: tuple[int, int]  # height and width of the result

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> Fused:
        x, w, pointwise, bias, residual, *affine, down, up, height, width = inputs
        return cls(x, Convolution(w, Stride(down, up)), pointwise, bias, residual, Affine(*affine), (height, width))


def _shape(*inputs: Any) -> Tensor:
    x, _, pointwise, *_, size = Fused.of(inputs)
    return empty_image(x, pointwise.shape[0], *size)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    inputs = inputs_of(ctx)
    x, convolution, pointwise, _, _, affine, size = Fused.of(inputs)
    needs_x, needs_w, needs_pointwise, needs_bias, needs_residual, needs_scale, needs_shift = (
        needs_grad(ctx, i, inputs) for i in range(7)
    )
    inner = grad_y
    if needs_x or needs_w or needs_scale or needs_shift:
        inner = images(rows(grad_y) @ pointwise, grad_y)
    needs = needs_x, needs_scale, needs_shift
    grad_x, grad_scale, grad_shift = depthwise_vjp(inner, x, convolution, affine, needs)
    grad_w = grad_pointwise = None
    if needs_w:
        grad_w = correlation(x, inner, convolution.kernel_size, convolution.stride, affine)
    if needs_pointwise:
        grad_pointwise = rows(grad_y).t() @ rows(depthwise(x, convolution, *size, affine))
    return (
        grad_x,
        grad_w,
        grad_pointwise,
        rows(grad_y).sum(dim=0, dtype=torch.float32) if needs_bias else None,
        grad_y if needs_residual else None,
        grad_scale,
        grad_shift,
        *[None] * 7,
    )


@define(
    f"depthwise_triton_separable(Tensor x, Tensor w, Tensor pointwise, Tensor? bias, Tensor? residual, {SCHEMA}, "
    "int down, int up, SymInt height, SymInt width) -> Tensor",
    _shape,
    _backward,
)
def _fused(*inputs: Any) -> Tensor:
    x, convolution, pointwise, bias, residual, affine, _ = Fused.of(inputs)
    y = _shape(*inputs)
    launch.fused(x, convolution, pointwise, bias, affine, residual, y)
    return y


def fused(given: Fused) -> Tensor:
    """pointwise D(phi(x), w) + bias + residual [N, D, height, width].

    Gradients: any order. D(phi(x), w) is not kept for them, but computed again where pointwise's is needed.
    """
    x, convolution, pointwise, bias, residual, affine, size = given
    d = pointwise.shape[0]
    bias = None if bias is None else bias.expand(d)
    residual = None if residual is None else residual.expand((x.shape[0], d, *size))
    y: Tensor = _fused(x, convolution.w, pointwise, bias, residual, *affine, *convolution.stride, *size)
    return y
