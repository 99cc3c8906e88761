"""What the three networks are built from. Each layer's arithmetic is an op of :mod:`raccgan.kernels`.

A norm here computes no normalised tensor: it returns the scale and shift, [N, C] each, that the convolution after
it applies while loading its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from raccgan.kernels.cbam import cbam
from raccgan.kernels.depthwise_separable import depthwise_separable

CONVOLUTIONS = ("depthwise-separable", "dense")


class DepthwiseSeparable(nn.Module):
    """Depthwise k x k with bias, then pointwise 1 x 1 with bias; norm, activation, pool and residual ride along."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, kernels: str) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1)
        self.kernels = kernels

    def forward(
        self,
        x: Tensor,
        affine: tuple[Tensor, Tensor] | None = None,
        *,
        activation: str = "none",
        upsample: int = 1,
        pool: int = 1,
        residual: Tensor | None = None,
    ) -> Tensor:
        scale, shift = affine if affine is not None else (None, None)
        return depthwise_separable(
            x,
            self.depthwise.weight,
            self.depthwise.bias,
            self.pointwise.weight,
            self.pointwise.bias,
            scale=scale,
            shift=shift,
            activation=activation,
            upsample=upsample,
            pool=pool,
            residual=residual,
            kernels=self.kernels,
        )


class Dense(nn.Module):
    """The ordinary convolution in DepthwiseSeparable's place, for comparison (``convolution="dense"``)."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(
        self,
        x: Tensor,
        affine: tuple[Tensor, Tensor] | None = None,
        *,
        activation: str = "none",
        upsample: int = 1,
        pool: int = 1,
        residual: Tensor | None = None,
    ) -> Tensor:
        if affine is not None:
            scale, shift = affine
            x = x * scale[:, :, None, None] + shift[:, :, None, None]
        if activation == "relu":
            x = F.relu(x)
        if upsample > 1:
            x = F.interpolate(x, scale_factor=upsample, mode="nearest")
        x = self.convolution(x)
        if pool > 1:
            x = F.avg_pool2d(x, pool)
        return x if residual is None else x + residual


def convolution(
    kind: str, channels: int, out_channels: int, kernel_size: int, kernels: str
) -> DepthwiseSeparable | Dense:
    """The convolution of a residual block, by name. Dense ones are 3 x 3 at most: a dense 7 x 7 is no one's choice."""
    if kind == "dense":
        return Dense(channels, out_channels, min(kernel_size, 3))
    return DepthwiseSeparable(channels, out_channels, kernel_size, kernels)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale 1 + W y and shift V y come from the condition y (BigGAN); W, V spectrally normalised.

    Training updates the running moments and normalises with the batch's; evaluation with the running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, condition: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.scale = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.shift = spectral_norm(nn.Linear(condition, channels, bias=False))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum = momentum
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, [N, C] each, for x [N, C, H, W] under the condition y [N, condition]."""
        mean, var = _moments(self, x)
        weight = self.weight * torch.rsqrt(var + self.eps)
        bias = self.bias - mean * weight
        scale = 1 + self.scale(y)
        return weight * scale, bias * scale + self.shift(y)


def _moments(norm: ConditionalBatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch's mean and variance in training, which move the running ones; the running ones in evaluation."""
    if not norm.training:
        return norm.running_mean, norm.running_var
    mean, var = _mean_and_variance(x, (0, 2, 3))
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * (count / max(1, count - 1))).to(norm.running_var.dtype), norm.momentum)
    return mean, var


def _mean_and_variance(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over ``dims``, in float32 at least, in two passes.

    ``torch.var_mean`` is one pass and one value at a time on a CPU: 4 to 20 times slower at the shapes of the models.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dim=dims, keepdim=True)
    var = (x - mean).square().mean(dim=dims)
    return mean.view(var.shape), var


def instance_norm(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Scale and shift, [N, C] each, that normalise every channel of every sample of x [N, C, H, W] by itself."""
    mean, var = _mean_and_variance(x, (2, 3))
    scale = torch.rsqrt(var + eps)
    return scale, -mean * scale


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., 2018): see :mod:`raccgan.kernels.cbam`.

    ``norm="batch"`` keeps running moments for evaluation; ``norm="instance"`` couples no samples and is what a
    critic under a gradient penalty needs.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int, kernels: str, norm: str = "batch", reduction: int = 16, momentum: float = 0.01
    ) -> None:
        super().__init__()
        reduced = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))
        self.norm = norm
        self.momentum = momentum
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        fixed = self.norm == "batch" and not self.training
        result = cbam(
            x,
            self.reduce.weight,
            self.reduce.bias,
            self.expand.weight,
            self.expand.bias,
            self.spatial.weight,
            self.weight,
            self.bias,
            norm="fixed" if fixed else self.norm,
            mean=self.running_mean if fixed else None,
            var=self.running_var if fixed else None,
            kernels=self.kernels,
        )
        if self.norm == "batch" and self.training:
            with torch.no_grad():
                self.running_mean.lerp_(result.mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(result.var.to(self.running_var.dtype), self.momentum)
        return result.y


class ResidualDown(nn.Module):
    """Residual block of the discriminator and the encoder.

    (ReLU, but in a first block) -> norm -> ReLU -> conv 3x3 -> norm -> ReLU -> conv 3x3 -> average pool 2, beside
    a 1x1 skip with the same pool. The norm is an instance norm without affine; a condition [N, condition], where the
    block is built with one, scales and shifts it (FiLM).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        preactivation: bool,
        down: bool,
        kind: str,
        kernels: str,
        attention: bool = False,
        condition: int = 0,
    ) -> None:
        super().__init__()
        self.first = convolution(kind, channels, out_channels, 3, kernels)
        self.second = convolution(kind, out_channels, out_channels, 3, kernels)
        self.skip = convolution(kind, channels, out_channels, 1, kernels) if down or channels != out_channels else None
        self.film_sizes = [channels, channels, out_channels, out_channels]
        self.film = nn.Linear(condition, sum(self.film_sizes)) if condition else None
        self.attention = CBAM(out_channels, kernels, norm="instance") if attention else None
        self.preactivation = preactivation
        self.pool = 2 if down else 1

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = F.relu(x) if self.preactivation else x
        film = self.film(y).split(self.film_sizes, dim=1) if self.film is not None and y is not None else None
        skip = x if self.skip is None else self.skip(x, pool=self.pool)
        h = self.first(h, _modulate(instance_norm(h), film and film[:2]), activation="relu")
        h = self.second(
            h, _modulate(instance_norm(h), film and film[2:]), activation="relu", pool=self.pool, residual=skip
        )
        return h if self.attention is None else self.attention(h)


def _modulate(affine: tuple[Tensor, Tensor], film: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
    """(x * scale + shift) * (1 + a) + b, as one scale and shift."""
    if not film:
        return affine
    scale, shift = affine
    a, b = film
    return scale * (1 + a), shift * (1 + a) + b


def initialise(network: nn.Module) -> None:
    """Orthogonal weights and zero biases for every convolution, linear layer and embedding (BigGAN)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            # Under spectral norm `weight` is computed; what is drawn is the parameter behind it.
            behind = dict(module.named_parameters())
            nn.init.orthogonal_(behind.get("parametrizations.weight.original", module.weight))
            if "bias" in behind:
                nn.init.zeros_(behind["bias"])
