"""The native backend of the depthwise-separable convolution: the compiled kernels of csrc/."""

from raccgan.kernels.depthwise_separable.native.op import depthwise_separable, supports
from raccgan.kernels.depthwise_separable.native.pointwise import LIBRARY, packed, pointwise

__all__ = ["LIBRARY", "depthwise_separable", "packed", "pointwise", "supports"]
