"""Generator: a latent and a class to an image (BigGAN, Brock et al., 2019, with depthwise-separable convolutions)."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.config import Config
from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable
from raccgan.models.blocks import CBAM, BatchNorm, ConditionalBatchNorm, Pointwise, convolution, initialise


class GeneratorBlock(nn.Module):
    """norm -> ReLU -> nearest x2 -> conv 7x7 -> norm -> ReLU -> conv 7x7, beside a skip; then CBAM (if ``attention``).

    Both norms are conditional. The skip is nearest x2, after a spectrally normalised 1x1 convolution if the channels
    change: the two commute, and the convolution of fewer pixels is less work.
    """

    def __init__(self, config: Config, channels: int, out_channels: int, *, attention: bool) -> None:
        super().__init__()
        condition = config.embedding + config.latent_size // len(config.widths)
        self.norm1 = ConditionalBatchNorm(channels, condition, config.kernels)
        self.first = convolution(config, channels, out_channels, 7)
        self.norm2 = ConditionalBatchNorm(out_channels, condition, config.kernels)
        self.second = convolution(config, out_channels, out_channels, 7)
        changes = channels != out_channels
        self.skip = spectral_norm(Pointwise(channels, out_channels, config.kernels)) if changes else None
        self.attention = CBAM(out_channels, config.kernels) if attention else None

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
    more chunk, beside the class embedding that all blocks share. Each block doubles height and width. ``channels`` are
    those of an image, ``classes`` how many there are.
    """

    sums: Tensor
    here: Tensor
    places: Tensor

    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        self.widths, attended = config.widths, config.attended("generator")
        self.chunk = config.latent_size // len(self.widths)
        self.embedding = nn.Embedding(classes, config.embedding)
        self.linear = nn.Linear(self.chunk, 16 * self.widths[0])
        self.blocks = nn.ModuleList(
            GeneratorBlock(config, c, d, attention=i in attended) for i, (c, d) in enumerate(pairwise(self.widths))
        )
        self.norm = BatchNorm(self.widths[-1], config.kernels)
        k = 3 if config.generator_head == "3x3" else 1
        self.head = cast(nn.Conv2d, spectral_norm(nn.Conv2d(self.widths[-1], channels, k, padding=k // 2)))
        for name, constant in _constants(self.widths[-1], channels).items():
            self.register_buffer(name, constant, persistent=False)
        self.kernels = config.kernels
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
        """The last norm, ReLU and convolution, before tanh: [N, C, H, W] to [N, D, H, W].

        The convolution 3 x 3 to few channels is depthwise-separable convolutions by constants. To one channel, a
        depthwise convolution is summed over the channels. To more, one matrix product multiplies a pixel by all nine
        taps, and a second convolution moves the 9 D results to their places and adds them up. On two cores of an AMD
        EPYC, 96 x 128 x 128 to 3 channels takes 0.4 to 0.6 of the time of PyTorch's norm, ReLU and convolution, 0.86 to
        0.99 with gradients; 64 x 32 x 32 to one channel 0.2 to 0.3, 0.55 to 0.7 with gradients.
        """
        if self.kernels == "reference" or h.device.type != "cpu" or self.head.kernel_size == (1, 1):
            return cast(Tensor, self.head(F.relu(self.norm(h))))
        scale, shift = self.norm.scale_and_shift(h)
        prologue = Prologue(scale=scale, shift=shift, relu=True)
        weight, bias = self.head.weight, self.head.bias
        if len(weight) == 1:
            weights = Weights(weight.transpose(0, 1), None, self.sums, bias)
            return depthwise_separable(h, weights, prologue, kernels=self.kernels)
        taps = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1)
        of_taps = depthwise_separable(h, Weights(self.here, None, taps, None), prologue, kernels=self.kernels)
        return depthwise_separable(of_taps, Weights(self.places, None, self.sums, bias), kernels=self.kernels)


def _constants(channels: int, image_channels: int) -> dict[str, Tensor]:
    """The weights of :meth:`Generator._image` that do not learn."""
    if image_channels == 1:
        return {"sums": torch.ones(1, channels, 1, 1)}
    here = torch.zeros(channels, 1, 3, 3)
    here[:, :, 1, 1] = 1
    places = torch.eye(9).view(9, 1, 1, 3, 3).expand(-1, image_channels, -1, -1, -1).flatten(0, 1)
    sums = torch.eye(image_channels).repeat(1, 9).view(image_channels, -1, 1, 1)
    return {"here": here, "places": places.contiguous(), "sums": sums}
