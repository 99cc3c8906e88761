"""The native backend: one C++ pass over x computes all up to the matrix product, and each derivative is one pass too.

    u = pool(depthwise(upsample(relu(norm(pre_relu(x)) * scale + shift))))           :mod:`depthwise`
    y = pointwise(u) + residual                                                       :mod:`pointwise`

On a CPU, where no gradient is recorded, one op does both and adds the depthwise bias as it writes u. Each thread takes
chunks of the batch through both, so that the product reads a tile of u from the cache (docs/kernels.md has times).
Training keeps u for the gradient of the pointwise weights and gains nothing.

On a GPU, one kernel computes y from x where :func:`fuses`; elsewhere the library computes the product. A 1 x 1
convolution is one matrix product after the prologue, which PyTorch's operations compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library, torch_internals
from raccgan.kernels.autograd import inputs_of, register
from raccgan.kernels.depthwise_separable import convolutions
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.native.depthwise import Options, depthwise, empty_result
from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES, product
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, SAME_SIZE, Prologue, Resize, Weights
from raccgan.kernels.layout import in_autocast_dtype

KERNEL_SIZES = (1, 3, 5, 7)
_ROW = 2**24
_FUSED = "raccgan::depthwise_native_fused"
_TENSORS = 7  # of the fused op: x, w, pointwise, bias, scale, shift and residual

# Settled once, at import, so that torch.compile sees constants. The op has a CPU kernel only in the tests' build.
DEVICES = tuple(
    device
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if library.load() and torch_internals.has_kernel(_FUSED, key)
)

OUTPUT_BLOCK = 128  # channels of y that a block of threads computes; another one computes their u anew
_MULTIPLY_ADDS_A_BYTE = 10  # by an H100's data sheet: 33.5 T float32 multiply-adds a second against 3.35 TB/s


def supports(call: dispatch.Call) -> str | None:
    reason = dispatch.compiled(call, "depthwise")
    if reason is not None:
        return reason
    if call.kernel_size and call.kernel_size not in KERNEL_SIZES:
        sizes = ", ".join(f"{k}x{k}" for k in KERNEL_SIZES)
        return f"the compiled depthwise kernels are {sizes}, not {call.kernel_size}x{call.kernel_size}"
    if call.device.type == "cuda" and len(call.shape) == 4 and call.shape[1] * call.shape[3] >= _ROW:
        # They count a value's place from a tile's first pixel on in 32 bits (csrc/cuda/depthwise/images.h).
        values = call.shape[1] * call.shape[3]
        return f"the CUDA depthwise kernels take rows of fewer than {_ROW} values, not {values} (channels times width)"
    return None


def depthwise_separable(
    x: Tensor,
    weights: Weights,
    prologue: Prologue,
    resize: Resize,
    residual: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """As :func:`raccgan.kernels.depthwise_separable.depthwise_separable`.

    The result is channels_last wherever the compiled kernels run, as PyTorch's own convolutions answer channels_last
    weights: NCHW would slow down every layer after this one.
    """
    x = in_autocast_dtype(x)
    if weights.kernel_size == 1:
        u = pooled(upsampled(apply_prologue(x, prologue), resize.upsample), resize.pool)
        return product(*convolutions.operands(u, weights), residual)
    if fuses(x, weights, resize):
        matrix, bias = weights.pointwise.flatten(1).to(x.dtype), weights.float().bias()
        inside = residual if residual is not None and residual.dtype == x.dtype else None
        y: Tensor = fused(x, weights.depthwise, matrix, bias, inside, prologue, resize)
        return y if residual is None or inside is not None else y + residual
    if _in_one_call(x, weights, prologue, resize, residual):
        scale, shift = prologue.scale, prologue.shift
        return torch.ops.raccgan.depthwise_separable_native(
            x, *weights.float(), scale, shift, residual, packed, *Options.of(prologue, resize)
        )
    pool = resize.pool if resize.upsample == 1 else 1  # the kernels resize one way or the other
    u = depthwise(x, weights.depthwise, prologue, Resize(resize.upsample, pool))
    return product(*convolutions.operands(pooled(u, resize.pool // pool), weights), residual)


def fuses(x: Tensor, weights: Weights, resize: Resize) -> bool:
    """Whether one kernel serves, and is less work than two, by counting; no GPU has been asked.

    It saves writing each depthwise result and reading it, and computes it anew for each block of output channels but
    the first. Beyond two blocks the matrix product decides, and a library's is better than one whose operand is
    computed between its steps. A gradient of the pointwise weight needs the depthwise result in memory again, which
    then saves nothing. What is not channels_last goes the way it went.
    """
    factor = resize.upsample * resize.pool
    if x.device.type not in DEVICES or factor > 2 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if torch.is_grad_enabled() and weights.pointwise.requires_grad:
        return False
    taps = weights.kernel_size if factor == 1 else (weights.kernel_size + 1) // resize.upsample
    again = (weights.pointwise.shape[0] - 1) // OUTPUT_BLOCK
    return again <= 1 and again * taps * taps <= 2 * x.element_size() * _MULTIPLY_ADDS_A_BYTE


def fused(
    x: Tensor,
    w: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    prologue: Prologue = NO_PROLOGUE,
    resize: Resize = SAME_SIZE,
) -> Tensor:
    """y for pointwise [D, C] of x's dtype, bias [D] float32 and a residual of x's dtype; else as :func:`depthwise`.

    Products add in float32. Those of float32 are of tf32 where PyTorch lets its convolutions round to that, and else of
    three tf32 numbers, near float32. The same bits every time.

    Gradients: every order, for all tensors. The depthwise result is not kept for them, but computed again where
        pointwise's is needed.
    """
    return torch.ops.raccgan.depthwise_native_fused(
        x, w, pointwise, bias, prologue.scale, prologue.shift, residual, *Options.of(prologue, resize), _tf32(x)
    )


def _tf32(x: Tensor) -> bool:
    """Whether float32 may be multiplied as tf32: by the flag of the convolution in whose place the product stands."""
    if not x.is_cuda or torch.compiler.is_compiling():  # a CPU's convolutions do not round; a graph has no flags
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]  # PyTorch declares none


def _fused_backward(ctx: Any, needs: Sequence[bool], grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, w, pointwise, _, scale, shift, _, *options, _ = inputs_of(ctx)
    needs_x, needs_w, needs_matrix, needs_bias, *needs_affine = needs[: _TENSORS - 1]
    grad_x = grad_w = grad_scale = grad_shift = grad_matrix = None
    if needs_x or needs_w or any(needs_affine):
        through = convolutions.PointwiseTransposed.apply(grad_y, pointwise[:, :, None, None])
        grad_x, grad_w, grad_scale, grad_shift = torch.ops.raccgan.depthwise_native_backward(
            through, x, w, scale, shift, *options, needs_x, needs_w, any(needs_affine)
        )
    if needs_matrix:
        u = torch.ops.raccgan.depthwise_native(x, w, scale, shift, *options)
        grad_matrix = convolutions.PointwiseProduct.apply(u, grad_y).flatten(1)
    grad_bias = grad_y.sum(dim=(0, 2, 3), dtype=torch.float32) if needs_bias else None
    return grad_x, grad_w, grad_matrix, grad_bias, grad_scale, grad_shift, grad_y


def _in_one_call(x: Tensor, weights: Weights, prologue: Prologue, resize: Resize, residual: Tensor | None) -> bool:
    """Whether the op that makes y of x without gradients serves: of one small image, calls take as long as the work."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or resize.upsample * resize.pool > 2:
        return False
    if residual is not None and residual.dtype != x.dtype:
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = (x, residual, *weights, prologue.scale, prologue.shift)
    return not any(t is not None and t.requires_grad for t in tensors)


if library.load():
    register(
        _FUSED,
        lambda x, w, pointwise, *others: empty_result(x, pointwise.shape[0], *others[_TENSORS - 3 : _TENSORS - 1]),
        _fused_backward,
    )
    torch.library.register_fake("raccgan::depthwise_separable_native")(  # called where no gradient is recorded
        lambda x, w, bias, pointwise, *others: empty_result(x, pointwise.shape[0], *others[5:7])
    )
