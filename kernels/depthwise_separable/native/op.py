"""The native backend: one C++ pass over x computes all up to the matrix product, and each derivative is one pass too.

    u = pool(depthwise(upsample(relu(norm(pre_relu(x)) * scale + shift))))           :mod:`depthwise`
    y = pointwise(u) + residual                                                       :mod:`pointwise`

On a CPU, where no gradient is recorded, one op does both and adds the depthwise bias as it writes u. Each thread takes
chunks of the batch through both, so that the product reads a tile of u from the cache. Measured within one run on two
cores of an AMD EPYC: scores of 16 images took 0.91 (32 px) and 0.94 (128 px) of the time, in bfloat16 0.95 and 0.95,
and the score of one image 0.97 to 0.98. Training keeps u for the gradient of the pointwise weights and gains nothing.

On a GPU, one kernel computes y from x where :func:`fused.fuses`; elsewhere the library computes the product. A 1 x 1
convolution is one matrix product after the prologue, which PyTorch's operations compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.depthwise_separable import convolutions
from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.native import fused
from raccgan.kernels.depthwise_separable.native.depthwise import Options, depthwise
from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES, product
from raccgan.kernels.depthwise_separable.options import Prologue, Resize, Weights
from raccgan.kernels.layout import empty_image, in_autocast_dtype

KERNEL_SIZES = (1, 3, 5, 7)
_ROW = 2**24


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
    if fused.fuses(x, weights, resize):
        matrix, bias = weights.pointwise.flatten(1).to(x.dtype), weights.float().bias()
        inside = residual if residual is not None and residual.dtype == x.dtype else None
        y: Tensor = fused.fused(x, weights.depthwise, matrix, bias, inside, prologue, resize)
        return y if residual is None or inside is not None else y + residual
    if _in_one_call(x, weights, prologue, resize, residual):
        scale, shift = prologue.scale, prologue.shift
        y = torch.ops.raccgan.depthwise_separable_native(
            x, *weights.float(), scale, shift, residual, packed, *Options.of(prologue, resize)
        )
        return y
    pool = resize.pool if resize.upsample == 1 else 1  # the kernels resize one way or the other
    u = depthwise(x, weights.depthwise, prologue, Resize(resize.upsample, pool))
    return product(*convolutions.operands(pooled(u, resize.pool // pool), weights), residual)


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


def _separable_shape(x: Tensor, w: Tensor, bias: Any, pointwise: Tensor, *others: Any) -> Tensor:
    resize = Resize(*others[-len(Options._fields) :][:2])
    return empty_image(x, pointwise.shape[0], resize.size(x.shape[2]), resize.size(x.shape[3]))


if library.load():
    torch.library.register_fake("raccgan::depthwise_separable_native")(
        _separable_shape
    )  # which is called where no gradient is recorded
