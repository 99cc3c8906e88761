"""The arguments of a depthwise-separable convolution beside its image, as named tuples: ``torch.func``,
``torch.export`` and ``torch.utils.checkpoint`` find the tensors inside of tuples, and not of dataclasses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NORMS = ("none", "instance")


class Weights(NamedTuple):
    """The two convolutions."""

    depthwise: Tensor  # [C, 1, k, k], k odd; zero padding k // 2 keeps the size
    depthwise_bias: Tensor | None  # [C]
    pointwise: Tensor  # [D, C, 1, 1]
    pointwise_bias: Tensor | None  # [D]

    @property
    def kernel_size(self) -> int:
        return self.depthwise.shape[-1]

    def float(self) -> Weights:
        if all(t is None or t.dtype == torch.float32 for t in self):
            return self
        return Weights(*(None if t is None else t.float() for t in self))  # type: ignore[arg-type]

    def bias(self) -> Tensor | None:
        """Both biases as one of the result, [D], in the dtype of the weights."""
        if self.depthwise_bias is None:
            return self.pointwise_bias
        through = self.pointwise.flatten(1) @ self.depthwise_bias
        return through if self.pointwise_bias is None else self.pointwise_bias + through

    def matrix(self) -> Tensor:
        """[D, C, 1, 1]: both weights as one, where the depthwise convolution is 1 x 1."""
        return self.pointwise * self.depthwise.view(1, -1, 1, 1)


class Prologue(NamedTuple):
    """What happens to the image before the convolution: relu(norm(pre_relu(x)) * scale + shift)."""

    pre_relu: bool = False  # before the norm
    norm: str = "none"
    """"instance" brings each channel of each sample to mean 0 and variance 1. It couples no samples, so it may stand in
    a discriminator under a gradient penalty."""
    eps: float = 1e-5  # added to the variance
    scale: Tensor | None = None  # [N, C], with shift or not at all; after the norm
    shift: Tensor | None = None  # [N, C]
    relu: bool = False  # after scale and shift


class Resize(NamedTuple):
    """Nearest upsampling before the convolution and average pool after it; 1 or 2 each."""

    upsample: int = 1
    pool: int = 1  # odd sizes are cut as ``avg_pool2d`` cuts them

    def size(self, n: int) -> int:
        """Height or width of the result, of an image's."""
        return n * self.upsample // self.pool


NO_PROLOGUE = Prologue()
SAME_SIZE = Resize()
