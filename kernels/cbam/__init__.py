"""CBAM, the convolutional block attention module: see :mod:`raccgan.kernels.cbam.op`."""

from raccgan.kernels.cbam.op import BACKENDS, CbamResult, cbam
from raccgan.kernels.cbam.options import INSTANCE, NORMS, CbamNorm, CbamWeights

__all__ = ["BACKENDS", "INSTANCE", "NORMS", "CbamNorm", "CbamResult", "CbamWeights", "cbam"]
