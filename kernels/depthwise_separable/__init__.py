"""Depthwise-separable convolution: see :mod:`raccgan.kernels.depthwise_separable.op`."""

from raccgan.kernels.depthwise_separable.around import apply_prologue, pooled, upsampled
from raccgan.kernels.depthwise_separable.native import LIBRARY
from raccgan.kernels.depthwise_separable.op import BACKENDS, depthwise_separable, packed, pointwise
from raccgan.kernels.depthwise_separable.options import NO_PROLOGUE, NORMS, SAME_SIZE, Prologue, Resize, Weights

__all__ = [
    "BACKENDS",
    "LIBRARY",
    "NORMS",
    "NO_PROLOGUE",
    "SAME_SIZE",
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
