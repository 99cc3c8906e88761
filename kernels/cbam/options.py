"""The arguments of CBAM beside its image, as named tuples: PyTorch finds the tensors inside of tuples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NORMS = ("batch", "instance", "fixed")


class CbamWeights(NamedTuple):
    """The channel gate's MLP, which average and max share, then the spatial gate's convolution and norm."""

    reduce_weight: Tensor  # [R, C]
    reduce_bias: Tensor  # [R]
    expand_weight: Tensor  # [C, R]
    expand_bias: Tensor  # [C]
    spatial_weight: Tensor  # [1, 2, k, k], k odd, over the planes [max over C, mean over C]; no bias
    norm_weight: Tensor  # [1]
    norm_bias: Tensor  # [1]


class CbamNorm(NamedTuple):
    """Which mean and variance the spatial gate's norm takes."""

    kind: str = "instance"
    """"batch": over N, H and W. "instance": over H and W of each sample; that couples no samples, so it may stand in a
    critic under a gradient penalty. "fixed": ``mean`` and ``var``, for inference."""
    mean: Tensor | None = None  # [1], for "fixed" only
    var: Tensor | None = None  # [1], for "fixed" only
    eps: float = 1e-5  # added to the variance


INSTANCE = CbamNorm()
