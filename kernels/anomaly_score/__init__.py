"""The anomaly score of f-AnoGAN: see :mod:`raccgan.kernels.anomaly_score.op`."""

from raccgan.kernels.anomaly_score.op import BACKENDS, AnomalyScore, anomaly_score

__all__ = ["BACKENDS", "AnomalyScore", "anomaly_score"]
