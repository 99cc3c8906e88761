"""The hot operations of RA-CCGAN, one folder a family, each with interchangeable implementations.

==================== ===========================================================================
depthwise_separable  pool(pointwise(depthwise(up(act(norm(pre(x)) * scale + shift))))) + residual
moments              mean and variance of each channel, for the norm that the next convolution folds in
cbam                 channel gate, then spatial gate (Woo et al., 2018)
anomaly_score        mean squared residuals of image and features per image, and the map per pixel
==================== ===========================================================================

Use: ``from raccgan.kernels.cbam import cbam``. Every public function takes ``kernels``: ``reference``, ``fused``,
``native`` or ``triton``; see :mod:`raccgan.kernels.backend` for what each name means and who serves which call.
"""
