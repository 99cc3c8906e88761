"""torch.func and forward-mode AD through CBAM and the anomaly score: right numbers, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.kernels.cbam import CbamNorm, CbamWeights, cbam
from raccgan.kernels.dispatch import KernelError
from tests.kernels.compare import assert_each_close


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_cbam(x: Tensor, kernels: str) -> Tensor:
    c, r, k = x.shape[1], 2, 3
    shapes = ((r, c), (r,), (c, r), (c,), (1, 2, k, k), (1,), (1,))
    weights = CbamWeights(*(drawn(*shape, seed=i).to(x.dtype) for i, shape in enumerate(shapes)))
    return cbam(x, weights, CbamNorm("instance"), kernels=kernels).y.square().sum()


def of_score(x: Tensor, kernels: str) -> Tensor:
    x_hat, f_hat = drawn(*x.shape, seed=3).to(x.dtype), drawn(len(x), 7, seed=4).to(x.dtype)
    return anomaly_score(x, x_hat, x.flatten(1)[:, :7], f_hat, kernels=kernels).score.square().sum()


OPS: dict[str, Callable[[Tensor, str], Tensor]] = {"cbam": of_cbam, "anomaly_score": of_score}
X, TANGENT = drawn(2, 4, 5, 6), drawn(2, 4, 5, 6, seed=2)


def jvp(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(run, (x,), (tangent,))[1]


def forward_mode(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent


def grad(run: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    return (torch.func.grad(run)(x) * tangent).sum()


TRANSFORMS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "torch.func.jvp": jvp,
    "torch.func.grad": grad,
    "forward-mode AD": forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_fused_gives_the_derivative_of_the_definition(op: Any, transform: Any) -> None:
    """The derivative in one direction, by finite differences of the definition in float64."""
    step = 1e-6
    moved = [op(X.double() + sign * step * TANGENT.double(), "reference") for sign in (1, -1)]
    wanted = (moved[0] - moved[1]) / (2 * step)
    got = transform(lambda x: op(x, "fused"), X, TANGENT)
    assert_each_close(got.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_backend_asked_for_by_name_refuses_and_says_what_serves(op: Any, transform: Any) -> None:
    for kernels in ("native", "triton"):
        with pytest.raises(KernelError, match=f"--kernels {kernels} cannot serve .*--kernels reference"):
            transform(lambda x, kernels=kernels: op(x, kernels), X, TANGENT)
