"""Moments of each channel over batch and pixels, by which a batch norm normalises (Ioffe, Szegedy; 2015).

The norm itself is no op. It is folded into a scale and a shift, which the convolution that reads x next applies: see
:mod:`raccgan.kernels.depthwise_separable`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import dispatch, triton_runtime
from raccgan.kernels.moments import native, reference, triton

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(dispatch.always, reference.moments),
    "native": dispatch.Backend(native.supports, native.moments),
    "triton": dispatch.Backend(triton_runtime.supports, triton.moments),
}


class Moments(NamedTuple):
    """Of each channel, [C] each, float32 at least."""

    mean: Tensor
    var: Tensor  # biased


def moments(x: Tensor, *, kernels: str = "fused") -> Moments:
    """Mean and biased variance of each channel.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        kernels: which backend, see :mod:`raccgan.kernels.dispatch`.

    Gradients: any order, through both moments. By ``torch.func`` and in forward mode too where ``kernels`` is
        "reference" or "fused".

    Raises:
        ValueError: x is not [N, C, H, W], or has no values.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names a backend that cannot serve this call.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"moments: x must be [N, C, H, W] and floating point, got {list(x.shape)} of {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"moments: x has no values, got {list(x.shape)}")
    return Moments(*dispatch.choose("moments", BACKENDS, kernels, dispatch.Call.of(x)).run(x))
