"""Gradients of CBAM's gradients, for implementations whose kernels end at the first: recomputed by the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels.autograd import differentiate
from raccgan.kernels.cbam import reference

TENSORS = 12  # x to var: the reference's tensors, in its order


def gradients_of_gradients(
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    mask: int,
    needed: Sequence[bool],
    *,
    batch: bool,
    eps: float,
) -> list[Tensor | None]:
    """Differentiate the first gradients again, and so on.

    Args:
        inputs: what comes back to y, mean and var, then the 12 tensors: what the first gradients were computed from.
        cotangents: what comes back to the 12 first gradients.
        mask: the bits of the first gradients that were wanted.
        needed: which of ``inputs`` need a gradient.
        batch, eps: of the norm, as the op has them.

    Returns:
        A gradient for each of ``inputs``, or None.
    """
    # Of what was wanted, what came to be used: in a gradient penalty, the gradient of x alone.
    used = [bool(mask >> i & 1) and v is not None for i, v in enumerate(cotangents)]

    def first(*given: Tensor | None) -> Sequence[Tensor | None]:
        return differentiate(partial(_in_float32, batch=batch, eps=eps), given[3:], given[:3], used)

    return differentiate(first, inputs, cotangents, needed)


def _in_float32(*tensors: Tensor | None, batch: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs, computed in float32."""
    *wide, mean, var = (None if t is None else t.float() for t in tensors)
    norm = "fixed" if mean is not None else "batch" if batch else "instance"
    y, mean, var = reference.cbam(*wide, norm, mean, var, eps, _convolve_by_columns)  # type: ignore[arg-type, call-arg]
    x = tensors[0]
    assert x is not None
    return y.to(x.dtype), mean, var


def _convolve_by_columns(planes: Tensor, weight: Tensor) -> Tensor:
    """The same as a matrix product: PyTorch cannot trace a convolution's second gradients for sizes not yet known."""
    k = weight.shape[-1]
    columns = F.unfold(planes, k, padding=k // 2)  # [N, 2 * k * k, H * W]
    return (weight.flatten(1) @ columns).view(planes.shape[0], 1, *planes.shape[2:])
