"""The anomaly score in Triton: see :mod:`.op`."""

from raccgan.kernels.anomaly_score.triton.ahead import compilations
from raccgan.kernels.anomaly_score.triton.op import anomaly_score, supports

__all__ = ["anomaly_score", "compilations", "supports"]
