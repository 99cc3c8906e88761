"""Depthwise-separable convolution: see :mod:`raccgan.kernels.depthwise_separable.op`."""

from raccgan.kernels.depthwise_separable.op import BACKENDS, depthwise_separable, packed, pointwise
from raccgan.kernels.depthwise_separable.options import NORMS, Prologue, Resize, Weights
from raccgan.kernels.depthwise_separable.prologue import apply_prologue
from raccgan.kernels.depthwise_separable.resizing import pooled, upsampled

__all__ = [
    "BACKENDS",
    "NORMS",
    "Prologue",
    "Resize",
    "Weights",
    "apply_prologue",
    "depthwise_separable",
    "packed",
    "pointwise",
    "pooled",
    "upsampled",
]
