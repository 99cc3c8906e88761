"""What the shared grid cannot show: a chain of layers, whose inputs depend on one another, up to third order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable
from raccgan.kernels.moments import moments
from tests.kernels.compare import allowed_beside, assert_close
from tests.kernels.grid import OwnOps


def chain(kernels: str, dtype: torch.dtype) -> list[list[Tensor]]:
    """First, second and third gradients of two layers whose norm is made of x itself, as a conditional one may be."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 1, 3, 3), (6, 4, 1, 1), (6, 1, 7, 7), (5, 6, 1, 1), (5,)]
    weights = [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes]
    x = torch.randn(2, 4, 6, 6, generator=draw).to(dtype).requires_grad_()
    average, batch = x.mean(dim=(2, 3)), moments(x, kernels=kernels)
    scale, shift = 1 + average * batch.var, average.square() + batch.mean
    prologue = Prologue(True, "instance", scale=scale, shift=shift, relu=True)
    h = depthwise_separable(x, Weights(weights[0], None, weights[1], None), prologue, kernels=kernels)
    second, prologue = Weights(weights[2], None, weights[3], weights[4]), Prologue(norm="instance", relu=True)
    y = depthwise_separable(h, second, prologue, Resize(upsample=2), kernels=kernels)
    orders = []
    value = y.square().sum()
    for _ in range(3):
        found = torch.autograd.grad(value, [x, *weights], create_graph=True, materialize_grads=True)
        orders.append(list(found))
        value = torch.stack([g.square().sum() for g in found]).sum().sqrt()
    return orders


def test_gradients_of_gradients_follow_no_path_twice() -> None:
    wanted = chain("reference", torch.float64)
    beside = chain("reference", torch.float32)
    for order, (ours, theirs, exact) in enumerate(zip(chain("fused", torch.float32), beside, wanted, strict=True), 1):
        for got, plain, right in zip(ours, theirs, exact, strict=True):
            assert_close(got, right, allowed_beside(plain, right, factor=10, least=1e-6), what=f"order {order}")


@pytest.mark.parametrize("order", ["penalty", "whole"])
def test_only_what_is_asked_for_is_computed(order: str) -> None:
    """A penalty's first backward pass goes to the image: no gradient of a weight is computed on the way."""
    x, w, p = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
    tensors = [t.requires_grad_() for t in (x, w, p)]
    y = depthwise_separable(x * 1, Weights(w * 1, None, p * 1, None), kernels="fused")
    with OwnOps() as own:
        torch.autograd.grad(y.sum(), tensors[:1] if order == "penalty" else tensors)
    backward = [op for op, _ in own.calls if op.name() == "raccgan::depthwise_native_backward"]
    if not backward:
        pytest.skip("the compiled kernels do not serve here")
    (calls,) = [given for op, given in own.calls if op is backward[0]]
    asked = dict(zip((argument.name for argument in backward[0]._schema.arguments), calls, strict=True))
    assert [asked[name] for name in asked if name.startswith("needs")] == [True, order == "whole", False]


@pytest.mark.parametrize("relu", [False, True])
def test_third_order_through_the_gradient_of_the_image_alone(relu: bool) -> None:
    """A gradient penalty's own gradients, differentiated once more: the second order is one kernel of its own."""

    def third(kernels: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(0)
        shapes = [(2, 4, 6, 6), (4, 1, 3, 3), (2, 4), (2, 4)]
        x, w, scale, shift = (torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes)
        prologue = Prologue(relu, "instance", scale=scale, shift=shift, relu=relu)
        one = torch.eye(4, dtype=dtype)[:, :, None, None]
        y = depthwise_separable(x, Weights(w, None, one, None), prologue, kernels=kernels)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, w, scale], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), [x, w, scale, shift], materialize_grads=True)

    wanted, beside = third("reference", torch.float64), third("reference", torch.float32)
    for got, plain, right in zip(third("fused", torch.float32), beside, wanted, strict=True):
        assert_close(got, right, allowed_beside(plain, right, factor=10, least=1e-6))
