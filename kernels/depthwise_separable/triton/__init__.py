"""The triton backend of the depthwise-separable convolution: see :mod:`.op`."""

from raccgan.kernels.depthwise_separable.triton.op import depthwise_separable

__all__ = ["depthwise_separable"]
