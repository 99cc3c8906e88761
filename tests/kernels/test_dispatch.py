"""Who serves which call, why not the others, and what the public functions refuse."""

from __future__ import annotations

import pytest
import torch

from raccgan.kernels import backend, library, triton_runtime
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.kernels.backend import Call, Implementation, KernelError
from raccgan.kernels.cbam import cbam
from raccgan.kernels.depthwise_separable import depthwise_separable, depthwise_separable_with_statistics
from tests.kernels.compare import assert_close

CPU = Call(torch.device("cpu"), torch.float32, (1, 1, 4, 4))

TABLE: backend.Family = {
    "reference": Implementation(lambda: "reference", backend.always),
    "native": Implementation(lambda: "native", lambda call: None if call.device.type == "cpu" else "no GPU part"),
}


def test_fused_takes_the_best_that_can_run_and_says_what_it_passed_over() -> None:
    assert backend.choose("op", TABLE, "fused", CPU).name == "native"
    choice = backend.choose("op", TABLE, "fused", CPU._replace(device=torch.device("cuda")))
    assert choice.name == "reference"
    assert choice.passed_over["native"] == "no GPU part"
    assert "no triton implementation" in choice.passed_over["triton"]


def test_a_name_is_served_or_refused_never_replaced() -> None:
    assert backend.choose("op", TABLE, "reference", CPU).name == "reference"
    with pytest.raises(KernelError, match=r"--kernels native cannot serve op: no GPU part; --kernels fused"):
        backend.choose("op", TABLE, "native", CPU._replace(device=torch.device("cuda")))
    with pytest.raises(KernelError, match="no kernels called 'cuda'; choose from reference, fused, native, triton"):
        backend.choose("op", TABLE, "cuda", CPU)


def test_what_the_compiled_kernels_serve_depends_on_the_device_and_the_build() -> None:
    gpu, half = CPU._replace(device=torch.device("cuda")), CPU._replace(dtype=torch.float16)
    for call, cuda, wanted in [
        (CPU, "", None),
        (half, "13.0", "the compiled x kernels add in float32 and take float32 and bfloat16, not torch.float16"),
        (gpu._replace(dtype=torch.float64), "13.0", "take float32, bfloat16 and float16, not torch.float64"),
        (gpu, "", "the CUDA part is not compiled in"),
        (CPU._replace(device=torch.device("meta")), "13.0", "there are no compiled x kernels for meta"),
    ]:
        reason = backend.not_compiled(call, "x", cuda)
        assert reason is None if wanted is None else wanted in str(reason)


@pytest.mark.skipif(not library.cuda(), reason="the CUDA part is not compiled in")
def test_what_the_cuda_kernels_cannot_count_is_passed_over() -> None:
    gpu = CPU._replace(device=torch.device("cuda"))
    for family, fits, too_large, why in [
        ("depthwise_separable", (1, 2**12, 4, 2**12 - 1), (1, 2**12, 4, 2**12), "fewer than 16777216 values, not"),
        ("cbam", (1, 1, 2**16, 2**15 - 1), (1, 1, 2**16, 2**15), "fewer than 2^31 pixels, not"),
    ]:
        can_run = backend.families()[family]["native"].can_run
        assert can_run(gpu._replace(shape=fits)) is None
        assert why in str(can_run(gpu._replace(shape=too_large)))


def test_a_gpu_older_than_the_kernels_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    call = CPU._replace(device=torch.device("cuda"), dtype=torch.float16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, served in [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = backend.not_compiled(call, "x", "13.0")
        assert served == (reason is None)
        assert served or "compute capability 8.0 and later" in str(reason)


def test_require_fails_before_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert set(backend.require("fused", torch.device("cpu"))) == set(backend.families())
    with pytest.raises(KernelError, match="--kernels triton cannot serve"):
        backend.require("triton", torch.device("cpu"))


def test_anomaly_score_refuses_what_does_not_match() -> None:
    x, f = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\] alike, got \[2, 1, 4, 4\] and \[2, 1, 4, 5\]"):
        anomaly_score(x, torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="both f and f_hat, or neither"):
        anomaly_score(x, x, f)
    with pytest.raises(ValueError, match="with N=2"):
        anomaly_score(x, x, torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="they must match"):
        anomaly_score(x, x.double())
    with pytest.raises(ValueError, match="floating point"):
        anomaly_score(x.long(), x.long())


def test_anomaly_score_is_its_formula() -> None:
    x, x_hat = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    f, f_hat = torch.rand(3, 5), torch.rand(3, 5)
    for kernels in ("reference", "fused"):
        result = anomaly_score(x, x_hat, f, f_hat, kappa=0.5, kernels=kernels)
        residual = (x - x_hat).square().mean(dim=(1, 2, 3))
        assert_close(result.score, residual + 0.5 * (f - f_hat).square().mean(dim=1), 1e-6)
        assert_close(result.map, (x - x_hat).square().mean(dim=1), 1e-6)
        assert anomaly_score(x, x_hat, want_map=False, kernels=kernels).map is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be"),
        ({"depthwise_weight": torch.zeros(3, 1, 4, 4)}, "odd k"),
        ({"depthwise_weight": torch.zeros(2, 1, 3, 3)}, r"\[3, 1, k, k\]"),
        ({"pointwise_weight": torch.zeros(5, 2, 1, 1)}, r"\[D, 3, 1, 1\]"),
        ({"scale": torch.zeros(2, 3)}, "both scale and shift"),
        ({"scale": torch.zeros(2, 1), "shift": torch.zeros(2, 1)}, r"scale must be \[2, 3\]"),
        ({"activation": "gelu"}, "activation"),
        ({"upsample": 3}, "upsample and pool"),
    ],
)
def test_depthwise_separable_refuses_wrong_shapes_and_options(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "x": torch.zeros(2, 3, 4, 4),
        "depthwise_weight": torch.zeros(3, 1, 3, 3),
        "depthwise_bias": None,
        "pointwise_weight": torch.zeros(5, 3, 1, 1),
        "pointwise_bias": None,
    }
    depthwise_separable(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        depthwise_separable(**(given | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 4)}, "x must be"),
        ({"expand_weight": torch.zeros(4, 3)}, "the MLP must be"),
        ({"spatial_weight": torch.zeros(1, 2, 6, 6)}, "odd k"),
        ({"norm": "layer"}, "norm must be one of"),
        ({"norm": "fixed"}, 'belong to norm="fixed"'),
        ({"average": torch.zeros(2, 3)}, r"average must be \[2, 4\]"),
    ],
)
def test_cbam_refuses_wrong_shapes_and_options(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "x": torch.zeros(2, 4, 5, 5),
        "reduce_weight": torch.zeros(1, 4),
        "reduce_bias": torch.zeros(1),
        "expand_weight": torch.zeros(4, 1),
        "expand_bias": torch.zeros(4),
        "spatial_weight": torch.zeros(1, 2, 7, 7),
        "norm_weight": torch.ones(1),
        "norm_bias": torch.zeros(1),
    }
    cbam(**given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        cbam(**(given | change))  # type: ignore[arg-type]


def test_statistics_are_what_the_next_layer_would_compute() -> None:
    x, w, p = torch.randn(2, 4, 5, 7), torch.randn(4, 1, 3, 3), torch.randn(3, 4, 1, 1)
    y, found = depthwise_separable_with_statistics(x, w, None, p, None, activation="relu")
    assert torch.equal(y, depthwise_separable(x, w, None, p, None, activation="relu"))
    assert_close(found.sum / 35, y.mean(dim=(2, 3)), 1e-6)
    assert_close(found.sum_of_squares / 35 - (found.sum / 35) ** 2, y.var(dim=(2, 3), correction=0), 1e-5)
    assert torch.equal(found.max, y.amax(dim=(2, 3)))


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_autocast_and_penalty_together(kernels: str) -> None:
    """bfloat16 autocast around a gradient penalty gives the float32 gradients, roughly, on every path."""
    draw = torch.Generator().manual_seed(0)

    def penalty(dtype: torch.dtype | None) -> torch.Tensor:
        x = torch.randn(2, 4, 8, 8, generator=draw.manual_seed(0)).requires_grad_()
        w, p = torch.randn(4, 1, 3, 3, generator=draw), torch.randn(6, 4, 1, 1, generator=draw)
        w.requires_grad_()
        scale, shift = torch.ones(2, 4), torch.zeros(2, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            y = depthwise_separable(x, w, None, p, None, scale=scale, shift=shift, activation="relu", kernels=kernels)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (gw,) = torch.autograd.grad(g.square().sum(), w)
        return gw

    wanted, got = penalty(None), penalty(torch.bfloat16)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() / wanted.norm() < 0.05
