"""Generator: a latent and a class to an image (BigGAN, Brock et al., 2019, with depthwise-separable convolutions)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.kernels.depthwise_separable import Prologue, Resize
from raccgan.models.blocks import CBAM, BatchNorm, ConditionalBatchNorm, Pointwise, convolution, initialise
from raccgan.models.few_channels import FewChannels


class GeneratorBlock(nn.Module):
    """norm -> ReLU -> nearest x2 -> conv 7x7 -> norm -> ReLU -> conv 7x7, beside a skip; then CBAM (if ``attention``).

    Both norms are conditional. The skip is nearest x2, after a spectrally normalised 1x1 convolution if the channels
    change: the two commute, and the convolution of fewer pixels is less work.
    """

    def __init__(
        self, channels: int, out_channels: int, condition: int, *, kind: str, kernels: str, attention: bool
    ) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(channels, condition, kernels)
        self.first = convolution(kind, channels, out_channels, 7, kernels)
        self.norm2 = ConditionalBatchNorm(out_channels, condition, kernels)
        self.second = convolution(kind, out_channels, out_channels, 7, kernels)
        self.skip: nn.Module | None = None
        if channels != out_channels:
            self.skip = spectral_norm(Pointwise(channels, out_channels, kernels))
        self.attention = CBAM(out_channels, kernels) if attention else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, C, H, W], under the condition y [N, condition], to [N, D, 2 H, 2 W]."""
        skip = x if self.skip is None else self.skip(x)
        skip = F.interpolate(skip, scale_factor=2, mode="nearest")
        scale, shift = self.norm1(x, y)
        h = self.first(x, Prologue(scale=scale, shift=shift, relu=True), Resize(upsample=2))
        scale, shift = self.norm2(h, y)
        h = self.second(h, Prologue(scale=scale, shift=shift, relu=True), residual=skip)
        return h if self.attention is None else self.attention(h)


class Generator(nn.Module):
    """G(z, y): images in [-1, 1] from latents and classes.

    z is split into equal chunks. A linear layer makes the first chunk 4 x 4 pixels; the condition of each block is one
    more chunk, beside the class embedding that all blocks share.

    Args:
        widths: channels at 4 x 4 and after each block; the image is 4 * 2^(len(widths) - 1) pixels high and wide.
        classes, image_channels, latent, embedding: sizes.
        attention: which blocks CBAM follows, as :func:`raccgan.config.attention_blocks` reads it.
        kind: of the convolutions, one of :data:`raccgan.models.blocks.CONVOLUTIONS`.
        kernels: the backend of the ops.

    Raises:
        ValueError: ``latent`` does not divide into len(widths) chunks, or ``attention`` names no blocks.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        classes: int,
        image_channels: int,
        latent: int,
        embedding: int = 128,
        attention: Collection[int] = (),
        kind: str = "depthwise-separable",
        kernels: str = "fused",
    ) -> None:
        super().__init__()
        blocks = len(widths) - 1
        if latent % (blocks + 1):
            raise ValueError(f"latent {latent} does not divide into {blocks + 1} equal chunks")
        self.chunk = latent // (blocks + 1)
        self.latent = latent
        self.widths = tuple(widths)
        condition = embedding + self.chunk
        self.embedding = nn.Embedding(classes, embedding)
        self.linear = nn.Linear(self.chunk, 16 * widths[0])
        self.blocks = nn.ModuleList(
            GeneratorBlock(c, d, condition, kind=kind, kernels=kernels, attention=i in attention)
            for i, (c, d) in enumerate(pairwise(widths))
        )
        self.norm = BatchNorm(widths[-1], kernels)
        self.head = cast(nn.Conv2d, spectral_norm(nn.Conv2d(widths[-1], image_channels, 3, padding=1)))
        self.few_channels = FewChannels(widths[-1], image_channels, kernels)
        self.kernels = kernels
        initialise(self)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images [N, C, H, W] for latents z [N, latent] and class indices y [N] (int64)."""
        first, *rest = z.split(self.chunk, dim=1)
        shared = self.embedding(y)
        h = self.linear(first).view(-1, self.widths[0], 4, 4).contiguous(memory_format=torch.channels_last)
        for block, chunk in zip(self.blocks, rest, strict=True):
            h = block(h, torch.cat([shared, chunk], dim=1))
        return torch.tanh(self._image(h))

    def _image(self, h: Tensor) -> Tensor:
        """The last norm, ReLU and convolution, before tanh: [N, C, H, W] to [N, image_channels, H, W]."""
        if self.kernels == "reference" or h.device.type != "cpu":
            image: Tensor = self.head(F.relu(self.norm(h)))
            return image
        scale, shift = self.norm.scale_and_shift(h)
        return cast(Tensor, self.few_channels(h, scale, shift, self.head.weight, self.head.bias))
