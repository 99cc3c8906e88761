"""CBAM in Triton, beyond what the shared grid holds it to: several pieces and tiles a sample, and none at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import triton_runtime
from raccgan.kernels.cbam import NORMS, triton
from raccgan.kernels.dispatch import Call
from tests.kernels.compare import assert_close
from tests.kernels.grid import DEVICES, Inputs, cbam_arguments, leaves, tensors
from tests.kernels.test_cbam_native import as_dtype, cotangent, made, outputs_and_gradients, run_reference

DEVICE = DEVICES[-1]
REASON = triton_runtime.supports(Call(torch.device(DEVICE), torch.float32, ()))
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), *([pytest.mark.gpu] * (DEVICE == "cuda"))]

# Each cuts a sample into several pieces, tiles of scores, and turns over the channels; the last is far from square.
SHAPES = ((1, 40, 19, 17), (2, 3, 33, 16), (1, 130, 5, 70))


def run_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return triton.cbam(*cbam_arguments(*inputs))


def placed(inputs: Inputs, last: bool = False) -> Inputs:
    there = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    return there | {"x": there["x"].contiguous(memory_format=torch.channels_last)} if last else there


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("i", range(len(SHAPES)))
def test_several_pieces(i: int, last: bool) -> None:
    inputs = made(SHAPES[i], NORMS[i], k=(3, 7, 1)[i])
    g = cotangent(inputs["x"])
    got = outputs_and_gradients(run_triton, placed(as_dtype(inputs, torch.float32), last), g.to(DEVICE))
    for name, wanted in outputs_and_gradients(run_reference, inputs, g).items():
        assert_close(got[name].cpu(), wanted, 1e-4, what=name)


@pytest.mark.parametrize("norm", ["instance", "fixed"])
def test_a_sample_has_the_same_bits_alone(norm: str) -> None:
    inputs = placed(as_dtype(made((3, 5, 9, 40), norm, k=3), torch.float32))
    together = run_triton(*inputs.values())[0]
    alone = run_triton(*(inputs | {"x": inputs["x"][1:2]}).values())[0]
    assert torch.equal(together[1:2], alone)


def test_gradients_are_the_same_bits_every_time() -> None:
    inputs = placed(as_dtype(made((2, 6, 20, 20), "batch", k=3), torch.float32))

    def gradients() -> tuple[Tensor, ...]:
        at = leaves(inputs)
        return torch.autograd.grad(run_triton(*at.values())[0].sin().sum(), list(tensors(at).values()))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_no_samples(norm: str) -> None:
    inputs = placed(as_dtype(made((0, 4, 3, 3), norm), torch.float32))
    at = leaves(inputs)
    y, mean, _ = run_triton(*at.values())
    assert y.shape == (0, 4, 3, 3)
    assert mean.shape == run_reference(*inputs.values())[1].shape
    gradients = torch.autograd.grad(y.sum(), list(tensors(at).values()))
    assert [g.shape for g in gradients] == [t.shape for t in tensors(at).values()]
    assert not any(g.any() for g in gradients[1:5]), "of the MLP"


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
def test_autocast(of_x: torch.dtype) -> None:
    inputs = placed(as_dtype(made((2, 8, 6, 6), "batch", k=3), torch.float32))
    at = leaves(inputs | {"x": inputs["x"].to(of_x)})
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, beside = run_triton(*at.values())[0], run_reference(*at.values())[0]
        gradients = torch.autograd.grad(y.float().square().sum(), list(tensors(at).values()))
    assert beside.dtype == of_x
    assert_close(y, beside, 0.03, dtype=of_x)
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors(at).values()]
