"""Inference copies of the networks with constants folded: the same functions up to rounding.

Spectrally normalised weights are computed once. A depthwise bias is folded into the pointwise bias, a 1 x 1 convolution
into one matrix, a conditional norm into one product, an embedding of few classes into the weights that multiply it. The
weights of pointwise convolutions, and of an encoder's features, are packed as the kernels read them.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raccgan.kernels.depthwise_separable import SAME_SIZE, Resize, packed, pointwise, pooled
from raccgan.models import blocks
from raccgan.models.blocks import Affine, BatchNorm, ConditionalBatchNorm, DepthwiseSeparable, Pointwise
from raccgan.models.encoder import Encoder
from raccgan.models.generator import Generator

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def frozen(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    """A copy of a generator, discriminator, encoder or density, in eval mode, whose weights must not be changed.

    It computes in float32, or in bfloat16 under autocast, for which the weights of convolutions are rounded once.
    """
    copied = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(copied.modules()):
        if parametrize.is_parametrized(module):
            # Not by remove_parametrizations, which deletes a property of the class, and a copy shares that.
            weight = cast(Tensor, module.weight)
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
            module.weight = nn.Parameter(weight, requires_grad=False)
    _know_classes(copied)
    _fix(copied, dtype)
    return copied


def _fix(module: nn.Module, dtype: torch.dtype) -> None:
    """Fold constants in the layers below the module, in place or into a layer that replaces them."""
    for name, child in list(module.named_children()):
        if isinstance(child, ConditionalBatchNorm):
            setattr(module, name, FixedConditionalNorm(child))
        elif isinstance(child, BatchNorm):
            setattr(module, name, FixedNorm(child))
        elif isinstance(child, DepthwiseSeparable):
            setattr(module, name, _fixed_separable(child, dtype))
        elif isinstance(child, Pointwise):
            child.packed = packed(child.weight, dtype, kernels=child.kernels)
        elif isinstance(child, nn.Linear):
            setattr(module, name, _fixed_linear(child, module, dtype))
        elif isinstance(child, nn.Conv2d) and dtype == torch.bfloat16:  # as autocast does anew in every call
            child.to(dtype)
        elif not isinstance(child, blocks.CBAM):  # whose weights its kernels take in float32
            _fix(child, dtype)


def _fixed_separable(separable: DepthwiseSeparable, dtype: torch.dtype) -> nn.Module:
    """The same with one bias; a 1 x 1 convolution as one matrix."""
    weights, last = separable.weights(), separable.pointwise
    skip = separable.depthwise.kernel_size == (1, 1)
    if skip:
        last.weight = nn.Parameter(weights.matrix(), requires_grad=False)
    last.bias = nn.Parameter(cast(Tensor, weights.bias()), requires_grad=False)
    last.packed = packed(last.weight, dtype, kernels=last.kernels)
    separable.depthwise.bias = None
    return FixedSkip(last) if skip else separable


def _fixed_linear(linear: nn.Linear, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, Encoder) and linear is module.linear:
        features = FixedFeatures(linear, module.kernels, dtype)
        if features.packed is not None:
            return features
    # The generator's linear layer makes features; the others make conditions and latents.
    halves = dtype == torch.bfloat16 and isinstance(module, Generator)
    return FixedLinear(linear.weight, linear.bias, dtype if halves else linear.weight.dtype)


def _know_classes(network: nn.Module) -> None:
    """If classes are fewer than an embedding's size, embed them as one-hot and fold the rows into the next weights."""
    if isinstance(network, Generator):
        norms = [module for module in network.modules() if isinstance(module, ConditionalBatchNorm)]
        users = [cast(nn.Linear, linear) for norm in norms for linear in (norm.scale, norm.shift)]
    elif isinstance(network, Encoder) and network.class_term is not None:
        films = [block.film for block in network.blocks if isinstance(block, blocks.ResidualDown)]
        users = [linear for linear in (*films, network.class_term) if isinstance(linear, nn.Linear)]
    else:
        return
    table = network.embedding.weight
    classes, size = table.shape
    if classes >= size:
        return
    for linear in users:  # of the embedding, and of more behind it
        weight = torch.cat([linear.weight[:, :size] @ table.T, linear.weight[:, size:]], dim=1)
        linear.weight, linear.in_features = nn.Parameter(weight, requires_grad=False), weight.shape[1]
    network.embedding = nn.Embedding.from_pretrained(torch.eye(classes, dtype=table.dtype, device=table.device))


class FixedSkip(nn.Module):
    """A 1 x 1 depthwise-separable convolution: one matrix."""

    def __init__(self, pointwise: Pointwise) -> None:
        super().__init__()
        self.pointwise = pointwise

    def forward(self, x: Tensor, resize: Resize = SAME_SIZE) -> Tensor:
        return cast(Tensor, self.pointwise(pooled(x, resize.pool)))


class FixedFeatures(nn.Module):
    """A linear layer of many features, [N, C] to [N, D], as a pointwise convolution of one pixel.

    From 24576 features it takes 0.4 to 0.6 of the time of PyTorch's linear layer, 0.3 in bfloat16 (AMD EPYC).
    """

    weight: Tensor
    packed: Tensor | None

    def __init__(self, linear: nn.Linear, kernels: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach()[:, :, None, None])
        self.register_buffer("packed", packed(self.weight, dtype, kernels=kernels), persistent=False)
        self.bias, self.kernels = linear.bias, kernels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None, None]
        return pointwise(x, self.weight, self.bias, kernels=self.kernels, packed=self.packed).flatten(1)


class FixedLinear(nn.Module):
    """A linear layer that computes in its weight's dtype, whatever autocast says, and returns ``dtype``.

    [N, C] to [N, D], a row an image. PyTorch's product of few rows takes 20 us on a CPU in bfloat16, however small it
    is, and 2 to 10 us in float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(self.dtype)


class FixedNorm(nn.Module):
    """A batch norm, whose scale and shift are constants."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.norm = norm
        for name, constant in zip(("scale", "shift"), norm.scale_and_shift(norm.running_mean[None]), strict=True):
            self.register_buffer(name, constant)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x))

    def scale_and_shift(self, x: Tensor) -> Affine:
        """[N, C] each, whatever x is."""
        return self.scale.expand(len(x), -1), self.shift.expand(len(x), -1)


class FixedConditionalNorm(nn.Module):
    """A conditional batch norm, whose scale and shift together are an affine map of the condition."""

    def __init__(self, norm: ConditionalBatchNorm) -> None:
        super().__init__()
        weight, bias = norm.affine(norm.running_mean)  # of the running moments, whatever is given
        scale, shift = (cast(Tensor, of.weight) for of in (norm.scale, norm.shift))
        both = torch.cat([weight[:, None] * scale, bias[:, None] * scale + shift])
        self.both = FixedLinear(both, torch.cat([weight, bias]), both.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Affine:
        """Scale and shift, [N, C] each, whatever x is, under the condition y [N, condition]."""
        scale, shift = self.both(y).chunk(2, dim=1)
        return scale, shift
