"""What only a GPU can show of the kernels' launches: graphs, streams, devices. Their numbers are the shared grid's to
check, there too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raccgan.config import make_config
from raccgan.kernels import dispatch
from raccgan.models.blocks import NormOverBatch
from raccgan.models.density import TEXTURE, Vectors
from raccgan.models.networks import Networks, build
from raccgan.scoring.scorer import Scorer
from tests.conftest import TINY
from tests.kernels.compare import assert_each_close
from tests.kernels.grid import FAMILIES, leaves, skip_unless_served, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]

CASES = [("depthwise_separable", "discriminator, second"), ("moments", "prime"), ("cbam", "batch")]
KERNELS = pytest.mark.parametrize("kernels", ["native", "triton"])


def made(family: str, case: str, kernels: str = "native") -> tuple[dict[str, Tensor], Callable[[], list[Tensor]]]:
    """The tensors of a case on the GPU, and what computes its outputs and all gradients from them."""
    inputs = leaves(FAMILIES[family].inputs(case, torch.float32, "cuda"))
    skip_unless_served(FAMILIES[family], kernels, inputs)

    def run() -> list[Tensor]:
        outputs = FAMILIES[family].run(kernels, inputs)
        value = sum((output.square().sum() for output in outputs), torch.zeros((), device="cuda"))
        return [*outputs, *torch.autograd.grad(value, list(tensors(inputs).values()))]

    return tensors(inputs), run


def recorded(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of a call, and what its replays write; the first call, which may compile or measure, is not in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@KERNELS
@pytest.mark.parametrize(("family", "case"), [*CASES, ("anomaly_score", "colour")])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_graph_records_the_ops(family: str, case: str, gradients: bool, kernels: str) -> None:
    """Nothing waits or asks the device: a captured call computes anew from what its inputs hold when it is replayed."""
    given, run = made(family, case, kernels)
    if not gradients:
        inputs = FAMILIES[family].inputs(case, torch.float32, "cuda")
        given, run = tensors(inputs), lambda: list(FAMILIES[family].run(kernels, inputs))
    graph, outputs = recorded(run)
    with torch.no_grad():
        for t in given.values():
            t.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(), strict=True))


@KERNELS
def test_a_graph_records_a_scoring_pass(kernels: str) -> None:
    """Encoder, generator, features and score of a batch whose images change before the replay; beside the reference."""
    try:
        dispatch.require(kernels, torch.device("cuda"))
    except dispatch.KernelError as error:
        pytest.skip(str(error))
    x, y = torch.rand(4, 1, 8, 8, device="cuda") * 2 - 1, torch.arange(4, device="cuda") % 3
    run, reference = (scoring_pass(name, x, y) for name in (kernels, "reference"))
    with torch.inference_mode():
        graph, outputs = recorded(run)
        before = outputs[0].clone()
        x.mul_(0.75)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outputs, run(), strict=True))
        assert not torch.equal(outputs[0], before)
        for got, wanted in zip(outputs, reference(), strict=True):
            assert_each_close(got, wanted, rtol=1e-3, atol=1e-5)


def scoring_pass(kernels: str, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
    """Scores, descriptors and errors of x under the conditions y, by new networks whose norms have met x."""
    config = make_config("digits", TINY | {"kernels": kernels})
    networks: Networks = build(config, channels=1, classes=3, device=x.device)
    for module in networks.average.modules():
        if isinstance(module, NormOverBatch):
            module.momentum = 1.0  # else every pixel that a new generator makes is 1 or -1
    with torch.no_grad():
        networks.average.train()(networks.encoder(x, y), y)
        textures, defects = torch.rand(2, len(x), TEXTURE, device=x.device)
        vectors = Vectors(networks.encoder.describe(x, y)[1], textures, defects)
        for k in range(3):
            networks.density.fit(vectors, networks.pathology.observe(x), k)
    scorer = Scorer(config, networks, ["a", "b", "c"])

    def run() -> list[Tensor]:
        found = scorer._compare(x, scorer._features(x), y)
        return [found.terms, *found.vectors, found.map]

    return run


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
