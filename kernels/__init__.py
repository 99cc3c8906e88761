"""The hot operations of RA-CCGAN, one folder an op, each with interchangeable backends.

==================== ===========================================================================
depthwise_separable  pool(pointwise(depthwise(upsample(relu(norm(pre_relu(x)) * scale + shift))))) + residual
moments              mean and variance of each channel, for the norm that the next convolution folds in
cbam                 channel gate, then spatial gate (Woo et al., 2018)
anomaly_score        mean squared residuals of image and features per image, and the map per pixel
==================== ===========================================================================

Use: ``from raccgan.kernels.cbam import cbam``. Every public function takes ``kernels``: ``reference``, ``fused``,
``native`` or ``triton``; see :mod:`raccgan.kernels.dispatch` for what each name means and how a backend is chosen.
"""
