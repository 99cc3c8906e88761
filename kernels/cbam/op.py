"""CBAM: convolutional block attention module (Woo, Park, Lee, Kweon; ECCV 2018).

channel gate  g_c = sigmoid(MLP(average over h, w of x) + MLP(max over h, w of x))
spatial gate  g_s = sigmoid(norm(conv_kxk([max over c, mean over c] of x * g_c)))
y = x * g_c * g_s
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import dispatch, triton_runtime
from raccgan.kernels.cbam import native, reference, triton
from raccgan.kernels.cbam.options import INSTANCE, NORMS, CbamNorm, CbamWeights

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(dispatch.always, reference.cbam),
    "native": dispatch.Backend(native.supports, native.cbam),
    "triton": dispatch.Backend(triton_runtime.supports, triton.cbam),
}


class CbamResult(NamedTuple):
    """The gated features, and the moments that the spatial gate was normalised with."""

    y: Tensor  # [N, C, H, W]
    mean: Tensor  # [1] for "batch" and "fixed", [N] for "instance"
    var: Tensor  # likewise, biased


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm = INSTANCE, *, kernels: str = "fused") -> CbamResult:
    """Gate the features by channel, then by place.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        weights: of both gates, in any floating dtype.
        norm: which mean and variance the spatial gate's norm takes.
        kernels: which backend, see :mod:`raccgan.kernels.dispatch`.

    Returns:
        y in x's dtype and memory format (channels_last by the native backend), and the moments used. The variance is
        the biased one: the mean of the squared deviations.

    Gradients: any order, for every tensor. A tie in a max shares the gradient evenly. What the compiled kernels do not
        compute are the reference's operations in float32. By ``torch.func`` and in forward mode where ``kernels`` is
        "reference" or "fused".

    Raises:
        ValueError: shapes or options outside the above.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names a backend that cannot serve this call.
    """
    if fault := _fault(x, weights, norm):
        raise ValueError(f"cbam: {fault}")
    run = dispatch.choose("cbam", BACKENDS, kernels, dispatch.Call.of(x)).run
    return CbamResult(*run(x, weights, norm))


def _fault(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> str | None:
    if x.dim() != 4:
        return f"x must be [N, C, H, W], got {list(x.shape)}"
    c, r, k = x.shape[1], weights.reduce_weight.shape[0], weights.spatial_weight.shape[-1]
    reduce, expand = weights.reduce_weight.shape, weights.expand_weight.shape
    if reduce != (r, c) or expand != (c, r):
        return f"the MLP must be [R, {c}] then [{c}, R], got {list(reduce)} and {list(expand)}"
    if weights.spatial_weight.shape != (1, 2, k, k) or k % 2 == 0:
        return f"spatial_weight must be [1, 2, k, k] with odd k, got {list(weights.spatial_weight.shape)}"
    if norm.kind not in NORMS:
        return f"norm must be one of {', '.join(NORMS)}, got {norm.kind!r}"
    if (norm.kind == "fixed", norm.kind == "fixed") != (norm.mean is not None, norm.var is not None):
        return 'mean and var belong to norm="fixed", and to it alone'
    return None
