"""CBAM in Triton: see :mod:`.op`."""

from raccgan.kernels.cbam.triton.op import cbam, compilations

__all__ = ["cbam", "compilations"]
