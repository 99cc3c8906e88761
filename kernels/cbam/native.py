"""The native backend of CBAM: C++ on a CPU, CUDA C++ on a GPU.

The forward pass sweeps over x three times; only the first sweep reads from memory, the others from the cache. Compiled
are the forward pass and its gradients, all of them in one call (csrc/cpu/cbam and csrc/cuda/cbam). On a CPU the
gradients of the gradient of x are compiled too, which a gradient penalty asks for where the discriminator has CBAM. The
reference computes all other gradients of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import CbamTensors
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights
from raccgan.kernels.layout import empty_like_image

_DOUBLE_BACKWARD_DTYPES = (torch.float32, torch.bfloat16)


def supports(call: dispatch.Call) -> str | None:
    reason, pixels = dispatch.compiled(call, "CBAM"), math.prod(call.shape[2:])
    if reason is None and call.device.type == "cuda" and pixels >= 2**31:  # counted in 32 bits: csrc/cuda/cbam/pixels.h
        reason = f"the CUDA CBAM kernels take images of fewer than 2^31 pixels, not {pixels}"
    return reason


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`raccgan.kernels.cbam.cbam`; y is channels_last. x is read in place where it is that, copied otherwise.

    The same bits whatever the number of threads, like all gradients; another processor may round differently.
    """
    return autograd.run(torch.ops.raccgan.cbam_native, x, weights, norm)


def _saved_sizes(tensors: CbamTensors, groups: int) -> list[int]:
    n, c, h, w = tensors.x.shape
    return [n * (3 * c + 3 * tensors.reduce_weight.shape[0] + 3 * h * w), 2 * groups]  # csrc/ops/cbam.h


def _double_backward(
    inputs: Sequence[Tensor | None], grad_grads: Sequence[Tensor | None], saved: Tensor, batch: bool, eps: float
) -> list[Tensor | None] | None:
    """By the kernel that a CPU has for a gradient penalty, where it computes these gradients; else None."""
    grad_y, grad_mean, grad_var, *tensors = inputs
    x, *weights, mean, _ = tensors
    grad_grad_x, *others = grad_grads
    assert x is not None
    alone = grad_grad_x is not None and all(t is None for t in (grad_mean, grad_var, mean, *others))
    served = alone and x.device.type == "cpu" and x.dtype in _DOUBLE_BACKWARD_DTYPES
    if not served or batch or torch.is_grad_enabled():
        return None
    of_grad_y, *of_tensors = torch.ops.raccgan.cbam_native_double_backward(grad_grad_x, grad_y, x, *weights, eps, saved)
    return [of_grad_y, None, None, *of_tensors, None, None]


if library.load():
    autograd.register_both("cbam_native", empty_like_image, _saved_sizes, _double_backward)
    torch.library.register_fake("raccgan::cbam_native_double_backward")(
        lambda _, g, x, *rest: (empty_like_image(g), empty_like_image(x), *(t.new_empty(t.shape) for t in rest[:-2]))
    )
