"""CBAM in Triton: see :mod:`.op`."""

from raccgan.kernels.cbam.triton.op import cbam

__all__ = ["cbam"]
