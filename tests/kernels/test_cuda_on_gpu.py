"""What only a GPU can show of the CUDA kernels' bindings; their numbers are the shared grid's to check, there too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.grid import FAMILIES, leaves, skip_unless_served, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

CASES = [("depthwise_separable", "discriminator, second"), ("moments", "prime"), ("cbam", "batch")]


def made(family: str, case: str) -> tuple[dict[str, Tensor], Callable[[], list[Tensor]]]:
    """The tensors of a case on the GPU, and what computes its outputs and all gradients from them."""
    inputs = leaves(FAMILIES[family].inputs(case, torch.float32, "cuda"))
    skip_unless_served(FAMILIES[family], "native", inputs)

    def run() -> list[Tensor]:
        outputs = FAMILIES[family].run("native", inputs)
        value = sum((output.square().sum() for output in outputs), torch.zeros((), device="cuda"))
        return [*outputs, *torch.autograd.grad(value, list(tensors(inputs).values()))]

    return tensors(inputs), run


@pytest.mark.parametrize(("family", "case"), CASES)
def test_a_graph_records_the_ops(family: str, case: str) -> None:
    """Nothing waits or asks the device: a captured call computes anew from what its inputs hold when it is replayed."""
    given, run = made(family, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for t in given.values():
            t.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_current_stream_is_used(family: str, case: str) -> None:
    given, run = made(family, case)
    wanted = run()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        held = [t.clone() for t in given.values()]
        for t in given.values():
            t.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, behind which a call on another stream would see zeros
        with torch.no_grad():
            for t, value in zip(given.values(), held, strict=True):
                t.copy_(value)
        got = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here at most")
@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_tensors_device_is_used(family: str, case: str) -> None:
    inputs = FAMILIES[family].inputs(case, torch.float32, "cuda:1")
    skip_unless_served(FAMILIES[family], "native", inputs)
    beside = FAMILIES[family].inputs(case, torch.float32, "cuda:0")
    got, wanted = (FAMILIES[family].run("native", given) for given in (inputs, beside))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="must be on one device"):
        torch.ops.raccgan.depthwise_native(
            torch.zeros(1, 3, 4, 4), torch.zeros(3, 1, 3, 3, device="cuda"), None, None, 1, 1, False, False, False, 1e-5
        )
