"""CBAM in compiled code: C++ on a CPU, CUDA C++ on a GPU. Three sweeps over x forward; only the first leaves the cache.

The kernels are the forward pass and its gradients, all of them in one call (csrc/cpu/cbam and csrc/cuda/cbam), and, on
a CPU, the gradients of the gradient of x that a gradient penalty in a critic asks for. Other gradients of gradients are
the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import TENSORS, BackwardArguments, CbamTensors
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights

_DOUBLE_BACKWARD = "raccgan::cbam_native_double_backward"
_DOUBLE_BACKWARD_DTYPES = (torch.float32, torch.bfloat16)


def supports(call: dispatch.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return dispatch.compiled(call, "CBAM") or _too_large(call)


def _too_large(call: dispatch.Call) -> str | None:
    """The CUDA kernels count an image's pixels in 32 bits (csrc/cuda/cbam/pixels.h)."""
    if call.device.type != "cuda" or len(call.shape) != 4:
        return None
    pixels = call.shape[2] * call.shape[3]
    return None if pixels < 2**31 else f"the CUDA CBAM kernels take images of fewer than 2^31 pixels, not {pixels}"


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var, as of :func:`raccgan.kernels.cbam.cbam`.

    Args:
        x: float32, bfloat16 or, on a GPU, float16; read in place where it is channels_last, copied otherwise.
        weights, norm: of any floating dtype; used as float32.

    Returns:
        y in x's dtype, channels_last, with or without autocast. The same bits whatever the number of threads, like all
        gradients; another processor may round differently.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not match.
    """
    y, own_mean, own_var, _ = torch.ops.raccgan.cbam_native(
        x, *weights, norm.mean, norm.var, norm.kind == "batch", norm.eps
    )
    return y, own_mean if norm.mean is None else norm.mean, own_var if norm.var is None else norm.var


# ---- what PyTorch asks of the ops ----------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, batch = CbamTensors(*inputs[:TENSORS]), inputs[TENSORS]
    n, c, h, w = tensors.x.shape
    moments = 1 if batch or tensors.mean is not None else n
    saved = n * (3 * c + 3 * tensors.reduce_weight.shape[0] + 3 * h * w) + 2 * moments  # csrc/ops/cbam.h
    return autograd.forward_shapes(tensors, batch, _channels_last, saved)


def _backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    return autograd.backward_shapes(BackwardArguments.of(inputs), _channels_last)


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


def _double_backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    _, grad_y, x, *weights, _, _ = inputs
    alike = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in weights)
    return _channels_last(grad_y), _channels_last(x), *alike


if library.load():
    autograd.register("cbam_native", _forward_shapes, _backward_shapes, _double_backward)
    torch.library.register_fake(_DOUBLE_BACKWARD)(_double_backward_shapes)
