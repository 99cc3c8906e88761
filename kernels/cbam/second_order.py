"""Gradients of CBAM's gradients, for backends whose kernels end at the first: recomputed by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.autograd import differentiate
from raccgan.kernels.cbam import reference
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights


def gradients_of_gradients(
    inputs: Sequence[Tensor | None],
    grad_grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    batch: bool,
    eps: float,
) -> list[Tensor | None]:
    """Differentiate the first gradients again, and so on.

    Args:
        inputs: the gradients of y, mean and var, then the tensors of :class:`.autograd.CbamTensors`: what the first
            gradients were computed from.
        grad_grads: the gradients of these first gradients, one for each of the latter; None where it was not used.
        needed: which of ``inputs`` need a gradient.
        batch, eps: of the norm, as the registered ops have them.

    Returns:
        A gradient for each of ``inputs``, or None.
    """
    used = [g is not None for g in grad_grads]

    def first(*given: Tensor | None) -> Sequence[Tensor | None]:
        return differentiate(partial(_in_float32, batch=batch, eps=eps), given[3:], given[:3], used)

    return differentiate(first, inputs, grad_grads, needed)


def _in_float32(*tensors: Tensor, batch: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs, computed in float32."""
    x, *weights, mean, var = (None if t is None else t.float() for t in tensors)
    kind = "fixed" if mean is not None else "batch" if batch else "instance"
    assert x is not None
    y, mean, var = reference.cbam(x, CbamWeights(*weights), CbamNorm(kind, mean, var, eps), _convolve_by_columns)
    return y.to(tensors[0].dtype), mean, var


def _convolve_by_columns(planes: Tensor, weight: Tensor) -> Tensor:
    """The same as a matrix product: PyTorch cannot trace a convolution's second gradients for sizes not yet known."""
    k = weight.shape[-1]
    columns = F.unfold(planes, k, padding=k // 2)  # [N, 2 * k * k, H * W]
    return (weight.flatten(1) @ columns).view(planes.shape[0], 1, *planes.shape[2:])
