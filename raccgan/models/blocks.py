"""The layers and residual blocks of the three networks. The arithmetic of a layer is an op of :mod:`raccgan.kernels`.

No norm computes a normalised tensor: the convolution after it normalises while it loads its input. An instance norm is
an option of that convolution; a conditional batch norm returns the scale and shift that the convolution applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.config import Config
from raccgan.kernels.cbam import CbamNorm, CbamWeights, cbam
from raccgan.kernels.depthwise_separable import (
    NO_PROLOGUE,
    SAME_SIZE,
    Prologue,
    Resize,
    Weights,
    apply_prologue,
    depthwise_separable,
    pointwise,
    pooled,
    upsampled,
)
from raccgan.kernels.moments import moments

EPS = 1e-5  # added to the variance by which a batch norm divides

Affine = tuple[Tensor, Tensor]  # scale and shift of a norm


@dataclass(frozen=True)
class Coupling:
    """How a norm gets the moments of a batch of which this process has one of ``parts`` parts of equal size.

    ``combine`` turns the mean and the biased variance of this part into those of all, differentiable to any order.
    """

    parts: int
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def couple(network: nn.Module, coupling: Coupling) -> None:
    """Have every norm over the batch in a network, when it trains, take the moments of all parts of the batch."""
    for module in network.modules():
        if isinstance(module, NormOverBatch):
            module.coupling = coupling


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution, [N, C, H, W] to [N, D, H, W]."""

    packed: Tensor | None  # the weight as the kernels read it, in networks for inference (raccgan.models.inference)

    def __init__(self, channels: int, out_channels: int, kernels: str) -> None:
        super().__init__(channels, out_channels, 1)
        self.register_buffer("packed", None, persistent=False)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias, kernels=self.kernels, packed=self.packed)


class DepthwiseSeparable(nn.Module):
    """A depthwise convolution k x k with bias, then a pointwise one with bias."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, kernels: str) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.pointwise = Pointwise(channels, out_channels, kernels)
        self.kernels = kernels

    def forward(
        self, x: Tensor, prologue: Prologue = NO_PROLOGUE, resize: Resize = SAME_SIZE, residual: Tensor | None = None
    ) -> Tensor:
        """[N, C, H, W] to [N, D, H', W']; see :func:`raccgan.kernels.depthwise_separable.depthwise_separable`."""
        run = partial(depthwise_separable, packed=self.pointwise.packed, kernels=self.kernels)
        return run(x, self.weights(), prologue, resize, residual=residual)

    def weights(self) -> Weights:
        return Weights(self.depthwise.weight, self.depthwise.bias, self.pointwise.weight, self.pointwise.bias)


class Dense(nn.Module):
    """An ordinary convolution in the place of :class:`DepthwiseSeparable`, for comparison (``convolution="dense"``)."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(
        self, x: Tensor, prologue: Prologue = NO_PROLOGUE, resize: Resize = SAME_SIZE, residual: Tensor | None = None
    ) -> Tensor:
        x = upsampled(apply_prologue(x, prologue), resize.upsample)
        x = pooled(self.convolution(x), resize.pool)
        return x if residual is None else x + residual


def flattened(x: Tensor) -> Tensor:
    """[N, C, H, W] to [N, C * H * W]. Gradients: any order, in channels_last, as the ops before read them fastest."""
    return cast(Tensor, _Flatten.apply(x)) if torch.is_grad_enabled() else x.flatten(1)


class _Flatten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.flatten(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.reshape(ctx.shape).contiguous(memory_format=torch.channels_last)


def convolution(config: Config, channels: int, out_channels: int, kernel_size: int) -> DepthwiseSeparable | Dense:
    """The convolution of a residual block. Dense ones are at most 3 x 3."""
    if config.convolution == "dense":
        return Dense(channels, out_channels, min(kernel_size, 3))
    return DepthwiseSeparable(channels, out_channels, kernel_size, config.kernels)


class NormOverBatch(nn.Module):
    """What batch norms share. Training normalises with the moments of the batch and moves the running moments by them;
    evaluation normalises with the running moments.
    """

    running_mean: Tensor
    running_var: Tensor
    coupling: Coupling | None = None

    def __init__(self, channels: int, kernels: str, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.kernels = kernels
        self.momentum = momentum

    def affine(self, x: Tensor) -> Affine:
        """Scale and shift, [C] each, that normalise x [N, C, H, W] and apply weight and bias."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = moments(x, kernels=self.kernels)
            if self.coupling is not None:
                mean, var = self.coupling.combine(mean, var)
            self.move_running(mean, var, x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + EPS)
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def move_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running moments; ``var`` is biased and of the whole batch, ``count`` numbers are of this part."""
        count *= self.coupling.parts if self.coupling is not None else 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * (count / max(1, count - 1))).to(self.running_var.dtype), self.momentum)


class ConditionalBatchNorm(NormOverBatch):
    """Batch norm of scale 1 + W y and shift V y for a condition y, W and V spectrally normalised (BigGAN)."""

    def __init__(self, channels: int, condition: int, kernels: str) -> None:
        super().__init__(channels, kernels)
        self.scale = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.shift = spectral_norm(nn.Linear(condition, channels, bias=False))

    def forward(self, x: Tensor, y: Tensor) -> Affine:
        """Scale and shift, [N, C] each, for x [N, C, H, W] under the condition y [N, condition]."""
        weight, bias = self.affine(x)
        scale = 1 + self.scale(y)
        return weight * scale, bias * scale + self.shift(y)


class BatchNorm(NormOverBatch):
    """Batch norm of [N, C, H, W] with weights and no condition, which can return its scale and shift."""

    num_batches_tracked: Tensor

    def __init__(self, channels: int, kernels: str) -> None:
        super().__init__(channels, kernels)
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # as nn.BatchNorm2d has in checkpoints

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.coupling is not None:
            scale, shift = self.scale_and_shift(x)
            return (x * scale[0, :, None, None] + shift[0, :, None, None]).to(x.dtype)
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, EPS)

    def scale_and_shift(self, x: Tensor) -> Affine:
        """The scale and shift, [N, C] each, that normalise x [N, C, H, W]."""
        if self.training:
            self.num_batches_tracked.add_(1)
        scale, shift = self.affine(x)
        return scale.expand(len(x), -1), shift.expand(len(x), -1)


class CBAM(NormOverBatch):
    """Convolutional block attention (Woo et al., 2018) of [N, C, H, W]: see :mod:`raccgan.kernels.cbam`.

    ``norm="batch"`` keeps running moments for evaluation. ``norm="instance"`` couples no samples, which a critic under
    a gradient penalty requires.
    """

    def __init__(self, channels: int, kernels: str, norm: str = "batch") -> None:
        super().__init__(1, kernels, momentum=0.01)
        reduced = max(1, channels // 16)
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        mlp = (self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)
        run = partial(cbam, x, CbamWeights(*mlp, self.spatial.weight, self.weight, self.bias), kernels=self.kernels)
        if self.norm == "batch" and not self.training:
            return run(CbamNorm("fixed", self.running_mean, self.running_var)).y
        result = run(CbamNorm(self.norm))
        if self.norm != "batch":
            return result.y
        if self.coupling is not None:
            # The moments are of a tensor inside the op. The first run computes those of this part of the batch, the
            # second normalises with those of all parts; both are differentiated. A step takes 1.04 (32 px) and 1.01
            # (128 px) of the time with one run; one run of PyTorch's own operations takes 1.20 and 1.06.
            result = run(CbamNorm("fixed", *self.coupling.combine(result.mean, result.var)))
        # One score a pixel; as batch norm does, normalise by the biased variance and keep the unbiased one.
        self.move_running(result.mean, result.var, x.numel() // x.shape[1])
        return result.y


class ResidualDown(nn.Module):
    """Residual block of the discriminator and the encoder.

    ReLU (if ``pre_relu``) -> norm -> ReLU -> conv 3x3 -> norm -> ReLU -> conv 3x3 -> average pool 2 (if ``down``),
    beside a 1x1 skip with the same pool; then CBAM (if ``attention``). The norm is an instance norm without weights. In
    a block with ``condition`` > 0, a condition [N, condition] scales and shifts it (FiLM, Perez et al., 2018).
    """

    def __init__(
        self,
        config: Config,
        channels: int,
        out_channels: int,
        *,
        pre_relu: bool,
        down: bool,
        attention: bool,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.first = convolution(config, channels, out_channels, 3)
        self.second = convolution(config, out_channels, out_channels, 3)
        self.skip = convolution(config, channels, out_channels, 1) if down or channels != out_channels else None
        self.film_sizes = [channels, channels, out_channels, out_channels]
        self.film = nn.Linear(condition, sum(self.film_sizes)) if condition else None
        self.attention = CBAM(out_channels, config.kernels, norm="instance") if attention else None
        self.pre_relu = pre_relu
        self.resize = Resize(pool=2 if down else 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """[N, C, H, W], under the condition y [N, condition], to [N, D, H', W']."""
        skip = x if self.skip is None else self.skip(x, resize=self.resize)
        first = Prologue(self.pre_relu, "instance", relu=True)
        second = Prologue(False, "instance", relu=True)
        if self.film is not None and y is not None:
            film = self.film(y).split(self.film_sizes, dim=1)
            first = first._replace(scale=1 + film[0], shift=film[1])
            second = second._replace(scale=1 + film[2], shift=film[3])
        h = self.first(x, first)
        h = self.second(h, second, self.resize, residual=skip)
        return h if self.attention is None else self.attention(h)


def initialise(network: nn.Module) -> None:
    """Orthogonal weights and zero biases for each convolution, linear layer and embedding of a new network (BigGAN)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            # Under spectral norm `weight` is computed from the parameter that is drawn here.
            behind = dict(module.named_parameters())
            nn.init.orthogonal_(behind.get("parametrizations.weight.original", module.weight))
            if "bias" in behind:
                nn.init.zeros_(behind["bias"])
            if parametrize.is_parametrized(module):
                # Spectral norm has the singular vectors of the weights before. Each access in training mode is one step
                # of the power iteration; an orthogonal weight needs one, since all its singular values are equal.
                with torch.no_grad():
                    _ = module.weight
