"""Moments of each channel: see :mod:`raccgan.kernels.moments.op`."""

from raccgan.kernels.moments.op import BACKENDS, Moments, moments

__all__ = ["BACKENDS", "Moments", "moments"]
