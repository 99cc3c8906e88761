"""Moments of each channel over batch and pixels: what a batch norm normalises with (Ioffe, Szegedy; 2015).

The norm itself is no op: folded into a scale and a shift, it is part of the convolution that reads x next, see
:mod:`raccgan.kernels.depthwise_separable`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import backend
from raccgan.kernels.moments import native, reference, triton

IMPLEMENTATIONS: backend.Family = {
    "reference": backend.Implementation(reference.moments, backend.always),
    "native": backend.Implementation(native.moments, native.can_run),
    "triton": backend.Implementation(triton.moments, triton.can_run),
}


class Moments(NamedTuple):
    """Of each channel, [C] each, float32 at least."""

    mean: Tensor
    var: Tensor  # biased


def moments(x: Tensor, *, kernels: str = "fused") -> Moments:
    """Mean and biased variance of each channel.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        kernels: which implementation, see :mod:`raccgan.kernels.backend`.

    Gradients: any order, through both moments.

    Raises:
        ValueError: x is not [N, C, H, W].
        raccgan.kernels.backend.KernelError: ``kernels`` names what cannot serve this call.
    """
    if x.dim() != 4:
        raise ValueError(f"moments: x must be [N, C, H, W], got {list(x.shape)}")
    return Moments(*backend.choose("moments", IMPLEMENTATIONS, kernels, backend.Call.of(x)).run(x))
