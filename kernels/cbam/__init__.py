"""CBAM: convolutional block attention module (Woo, Park, Lee, Kweon; ECCV 2018).

y = x * channel_gate(x) * spatial_gate(x * channel_gate(x))
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from raccgan.kernels import dispatch
from raccgan.kernels.cbam import native, reference, triton

NORMS = ("batch", "instance", "fixed")

BACKENDS: dispatch.Backends = {
    "reference": dispatch.Backend(reference.cbam, dispatch.always),
    "native": dispatch.Backend(native.cbam, native.supports),
    "triton": dispatch.Backend(triton.cbam, triton.supports),
}


class CBAMResult(NamedTuple):
    """The gated features, and the moments that the spatial gate was normalised with."""

    y: Tensor  # [N, C, H, W]
    mean: Tensor  # [1] for "batch" and "fixed", [N] for "instance"
    var: Tensor  # likewise, biased


def cbam(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    norm: str = "instance",
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
    average: Tensor | None = None,
    maximum: Tensor | None = None,
    kernels: str = "fused",
) -> CBAMResult:
    """Gate the features by channel, then by place.

    Args:
        x: [N, C, H, W], NCHW or channels_last; float32, bfloat16, float16 or float64.
        reduce_weight, reduce_bias: [R, C] and [R], first layer of the MLP that average and max share.
        expand_weight, expand_bias: [C, R] and [C], its second layer.
        spatial_weight: [1, 2, k, k], k odd, over the planes [max over C, mean over C]; no bias.
        norm_weight, norm_bias: [1] each, affine of the norm of the spatial gate.
        norm: moments of that norm: "batch" over N,H,W; "instance" over H,W of each sample (couples no samples, so
            it may stand in a critic under a gradient penalty); "fixed" takes ``mean`` and ``var`` (inference).
        mean, var: [1] each, for "fixed" only.
        eps: added to the variance.
        average, maximum: [N, C] each, over H,W of x, where whoever made x has them already (see
            ``depthwise_separable_with_statistics``); computed otherwise.
        kernels: which implementation, see :mod:`raccgan.kernels.dispatch`.

    Returns:
        y in x's dtype and memory format, and the moments used (biased variance).

    Gradients: any order with the reference, for every tensor. A tie in a max shares the gradient evenly.

    Raises:
        ValueError: shapes or options outside the above.
        raccgan.kernels.dispatch.KernelError: ``kernels`` names what cannot serve this call.
    """
    _check(x, reduce_weight, expand_weight, spatial_weight, norm, mean, var)
    for name, t in (("average", average), ("maximum", maximum)):
        if t is not None and t.shape != x.shape[:2]:
            raise ValueError(f"cbam: {name} must be {list(x.shape[:2])}, got {list(t.shape)}")
    call = dispatch.Call.of(x)
    run = dispatch.choose("cbam", BACKENDS, kernels, call).run
    return CBAMResult(
        *run(
            x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
            norm_weight, norm_bias, norm, mean, var, eps,
        )
    )  # fmt: skip


def _check(
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    spatial_weight: Tensor,
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"cbam: {what}")

    if x.dim() != 4:
        refuse(f"x must be [N, C, H, W], got {list(x.shape)}")
    c, r = x.shape[1], reduce_weight.shape[0]
    if reduce_weight.shape != (r, c) or expand_weight.shape != (c, r):
        refuse(
            f"the MLP must be [R, {c}] then [{c}, R], got {list(reduce_weight.shape)} and {list(expand_weight.shape)}"
        )
    k = spatial_weight.shape[-1]
    if spatial_weight.shape != (1, 2, k, k) or k % 2 == 0:
        refuse(f"spatial_weight must be [1, 2, k, k] with odd k, got {list(spatial_weight.shape)}")
    if norm not in NORMS:
        refuse(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if (norm == "fixed") != (mean is not None and var is not None):
        refuse('mean and var belong to norm="fixed", and to it alone')
