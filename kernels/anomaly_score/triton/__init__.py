"""The anomaly score in Triton: see :mod:`.op`."""

from raccgan.kernels.anomaly_score.triton.launch import compilations
from raccgan.kernels.anomaly_score.triton.op import anomaly_score

__all__ = ["anomaly_score", "compilations"]
