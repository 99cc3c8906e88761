"""The average pool whose every derivative is made of itself and its transpose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from raccgan.kernels.depthwise_separable import pooled
from tests.kernels.compare import assert_close


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (1, 1, 5, 7), (2, 3, 2, 3), (0, 2, 4, 4)])
def test_it_is_pytorchs_pool_and_so_are_its_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for pool in (pooled, F.avg_pool2d):
        y = pool(x, 2)
        (g,) = torch.autograd.grad(y, x, torch.arange(y.numel(), dtype=y.dtype).view(y.shape))
        results.append((y, g))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(memory_format=torch.channels_last) or ours.numel() == 0
    assert torch.autograd.gradcheck(pooled, (x, 2))
    assert torch.autograd.gradgradcheck(pooled, (x, 2))


def test_the_second_gradient_says_nothing_of_x() -> None:
    """PyTorch's says zeros, which are then added to what other operations say of x."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    g = torch.randn(2, 3, 2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(pooled(x, 2), x, g, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, g), allow_unused=True)
    assert second[0] is None
    assert_close(second[1], 2 * F.avg_pool2d(first, 2), 1e-6)
