"""The triton backend of the depthwise-separable convolution: see :mod:`.op`."""

from raccgan.kernels.depthwise_separable.triton.op import compilations, depthwise_separable

__all__ = ["compilations", "depthwise_separable"]
