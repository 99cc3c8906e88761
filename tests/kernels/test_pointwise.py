"""The pointwise family, compiled, as matrices, and as convolutions whose pixels it lays out anew for one thread.

Values and both orders of gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.depthwise_separable import Weights, convolutions, depthwise_separable, pointwise
from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES as NATIVE_DTYPES
from raccgan.kernels.dispatch import KernelError
from tests.kernels.compare import assert_all_close, assert_close
from tests.kernels.variations import threads


@pytest.mark.parametrize(
    "shape", [(4, 5, 16, 16), (1, 3, 48, 16), (15, 2, 8, 16), (3, 5, 7, 9), (16, 4, 8, 8)], ids=str
)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("out", [1, 6])
@pytest.mark.parametrize("layouts", ["both channels_last", "x alone", "neither"])
@pytest.mark.parametrize("by", ["convolutions", "matrices", "compiled"])
def test_pointwise_in_any_layout_with_any_threads(
    count: int, shape: tuple[int, int, int, int], out: int, layouts: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "FEW", convolutions.FEW if by == "matrices" else 0)
    if by == "compiled" and torch.float32 not in NATIVE_DTYPES:
        pytest.skip("no compiled kernels here that are worth it")
    kernels = "native" if by == "compiled" else "pytorch"
    draw = torch.Generator().manual_seed(0)
    n, c, h, v = shape
    x, t = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    w, b = torch.randn(out, c, 1, 1, generator=draw, dtype=torch.float64), torch.randn(out, generator=draw).double()
    g = torch.randn(n, out, h, v, generator=draw, dtype=torch.float64)
    wanted = _both_orders(F.conv2d, x, w, b, g, t)
    x, w, b, g, t = (tensor.float() for tensor in (x, w, b, g, t))
    if layouts != "neither":
        x = x.contiguous(memory_format=torch.channels_last)
    if layouts == "both channels_last":
        g, t = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (g, t))
    with threads(count):
        found = _both_orders(partial(pointwise, kernels=kernels), x, w, b, g, t)
    assert_all_close(found, wanted, 1e-5)


@pytest.mark.parametrize("kernels", ["pytorch", "native"])
def test_no_image_gives_none(kernels: str) -> None:
    """A rank may have none to score."""
    w, b = torch.randn(6, 3, 1, 1), torch.randn(6)
    x = torch.empty(0, 3, 4, 4, memory_format=torch.channels_last)
    with torch.no_grad():
        assert pointwise(x, w, b, kernels=kernels).shape == (0, 6, 4, 4)
    x.requires_grad_()
    y = pointwise(x, w.requires_grad_(), b, kernels=kernels)
    assert y.shape == (0, 6, 4, 4)
    grad_x, grad_w = torch.autograd.grad(y.sum(), [x, w])
    assert grad_x.shape == x.shape
    assert torch.equal(grad_w, torch.zeros_like(w))


def _both_orders(run: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor, g: Tensor, t: Tensor) -> list[Tensor]:
    """y, its gradients for the cotangent g, and the gradients of <t, dx> and <w, dw>."""
    x, w, b, g = (tensor.clone().requires_grad_() for tensor in (x, w, b, g))
    y = run(x, w, b)
    first = torch.autograd.grad(y, [x, w, b], g, create_graph=True)
    second = torch.autograd.grad((first[0] * t).sum() + (first[1] * w.detach()).sum(), [x, w, g])
    return [y, *first, *second]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["reference", "fused", "pytorch", "native"])
def test_the_half_alone_by_name(kernels: str, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(2, 5, 4, 4).to(dtype), torch.randn(6, 5, 1, 1).to(dtype), torch.randn(6).to(dtype)
    wanted = F.conv2d(x.double(), w.double(), b.double())
    if kernels == "native" and (dtype == torch.float64 or library.why_not()):
        with pytest.raises(KernelError, match="--kernels native cannot serve pointwise"):
            pointwise(x, w, b, kernels=kernels)
        return
    assert_close(pointwise(x, w, b, kernels=kernels), wanted, 4 * torch.finfo(dtype).eps, dtype=dtype)


def test_the_half_alone_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight \[D, C, 1, 1\], got \[2, 5, 4, 4\] and \[6, 4, 1, 1\]"):
        pointwise(torch.ones(2, 5, 4, 4), torch.ones(6, 4, 1, 1), None)


@pytest.mark.parametrize("pixels", [1, 4], ids=["few pixels", "many pixels"])
def test_a_depthwise_bias_is_added_where_it_costs_less(pixels: int) -> None:
    """To the image of few pixels, or through the weights: values and gradients are the same."""
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw).double() for shape in ((1, 8, pixels, pixels), (40, 8, 1, 1)))
    depthwise, b = torch.randn(8, 1, 3, 3, generator=draw).double(), torch.randn(8, generator=draw).double()

    def gradients(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = run(*leaves)
        return [y, *torch.autograd.grad(y.sin().sum(), leaves)]

    wanted = gradients(lambda x, w, b: F.conv2d(F.conv2d(x, depthwise, b, padding=1, groups=8), w))
    found = gradients(lambda x, w, b: depthwise_separable(x, Weights(depthwise, b, w, None), kernels="pytorch"))
    assert_all_close(found, wanted, 1e-12)
