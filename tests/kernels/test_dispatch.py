"""Which backend serves which call, why not the others, what is logged, and what the public functions refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.kernels.cbam import CbamNorm, CbamWeights, cbam
from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable, pointwise
from raccgan.kernels.dispatch import Backend, Call, KernelError
from raccgan.kernels.moments import moments
from tests.kernels.grid import OwnOps

CPU = Call(torch.device("cpu"), torch.float32, (1, 1, 4, 4))

TABLE: dispatch.Backends = {
    "reference": Backend(dispatch.always, lambda: "reference"),
    "native": Backend(lambda call: None if call.device.type == "cpu" else "no GPU part", lambda: "native"),
}


def test_fused_takes_the_first_that_serves_and_says_why_not_the_others() -> None:
    assert dispatch.choose("op", TABLE, "fused", CPU).name == "native"
    choice = dispatch.choose("op", TABLE, "fused", CPU._replace(device=torch.device("cuda")))
    assert choice.name == "reference"
    assert choice.refused == {"native": "no GPU part"}


def test_a_name_is_served_or_refused_never_replaced() -> None:
    assert dispatch.choose("op", TABLE, "reference", CPU).name == "reference"
    with pytest.raises(KernelError, match=r"--kernels native cannot serve op: no GPU part; --kernels fused"):
        dispatch.choose("op", TABLE, "native", CPU._replace(device=torch.device("cuda")))
    with pytest.raises(KernelError, match="--kernels pytorch cannot serve op: op has no pytorch backend"):
        dispatch.choose("op", TABLE, "pytorch", CPU)
    with pytest.raises(KernelError, match="no kernels called 'cuda'; choose from reference, fused, native, triton"):
        dispatch.choose("op", TABLE, "cuda", CPU)


def test_a_fallback_is_logged_once_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "raccgan.kernels")
    gpu = CPU._replace(device=torch.device("cuda"))
    for op in ("logged", "logged", "also logged"):
        dispatch.choose(op, TABLE, "fused", gpu)
    with pytest.raises(KernelError):
        dispatch.choose("not logged", TABLE, "native", gpu)
    said = [record.getMessage() for record in caplog.records if "logged: " in record.getMessage()]
    assert said == ["logged: not native: no GPU part", "also logged: not native: no GPU part"]


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
def test_a_kernel_size_that_is_not_compiled_is_refused_by_name_and_falls_back() -> None:
    x, weights = torch.randn(2, 3, 8, 8), Weights(torch.randn(3, 1, 9, 9), None, torch.randn(5, 3, 1, 1), None)
    with pytest.raises(KernelError, match=r"the compiled depthwise kernels are 1x1, 3x3, 5x5, 7x7, not 9x9"):
        depthwise_separable(x, weights, kernels="native")
    with OwnOps() as own:
        y = depthwise_separable(x, weights)
    assert own.names == []
    torch.testing.assert_close(y, depthwise_separable(x, weights, kernels="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
@pytest.mark.parametrize("op", ["depthwise_separable", "pointwise"])
def test_a_1x1_convolution_of_one_channel_is_pytorchs(op: str) -> None:
    for channels, ours in ((1, False), (2, True)):
        x, pointwise_weight = torch.randn(2, channels, 4, 4), torch.randn(5, channels, 1, 1)
        weights = Weights(torch.randn(channels, 1, 1, 1), None, pointwise_weight, None)
        with OwnOps() as own:
            if op == "pointwise":
                pointwise(x, pointwise_weight, None)
            else:
                depthwise_separable(x, weights, resize=Resize(pool=2))
        assert bool(own.names) == (ours and torch.float32 in _compiled_products())
        for kernels in ("native", "pytorch"):  # by name they serve it
            depthwise_separable(x, weights, kernels=kernels)


def _compiled_products() -> tuple[torch.dtype, ...]:
    from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES

    return DTYPES


@pytest.mark.parametrize(
    ("call", "cuda", "wanted"),
    [
        (CPU, "", None),
        (
            CPU._replace(dtype=torch.float16),
            "13.0",
            "the compiled x kernels add in float32 and take float32 and bfloat16, not torch.float16",
        ),
        (
            CPU._replace(device=torch.device("cuda"), dtype=torch.float64),
            "13.0",
            "take float32, bfloat16 and float16, not torch.float64",
        ),
        (CPU._replace(device=torch.device("cuda")), "", "the CUDA part is not compiled in"),
        (CPU._replace(device=torch.device("meta")), "13.0", "there are no compiled x kernels for meta"),
    ],
)
def test_what_the_compiled_kernels_serve_depends_on_the_device_and_the_build(
    call: Call, cuda: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_MISSING", None)
    monkeypatch.setattr(dispatch, "_CUDA", cuda)
    reason = dispatch.compiled(call, "x")
    assert reason is None if wanted is None else wanted in str(reason)


def test_a_missing_library_is_the_first_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MISSING", "the compiled library is not built")
    assert dispatch.compiled(CPU, "x") == "the compiled library is not built"
    x, weights = torch.randn(1, 2, 4, 4), Weights(torch.randn(2, 1, 3, 3), None, torch.randn(3, 2, 1, 1), None)
    with OwnOps() as own:
        depthwise_separable(x, weights)
    assert own.names == []


@pytest.mark.skipif(not library.cuda(), reason="the CUDA part is not compiled in")
def test_what_the_cuda_kernels_cannot_count_is_refused() -> None:
    gpu = CPU._replace(device=torch.device("cuda"))
    for op, fits, too_large, why in [
        ("depthwise_separable", (1, 2**12, 4, 2**12 - 1), (1, 2**12, 4, 2**12), "fewer than 16777216 values, not"),
        ("cbam", (1, 1, 2**16, 2**15 - 1), (1, 1, 2**16, 2**15), "fewer than 2^31 pixels, not"),
    ]:
        supports = dispatch.ops()[op]["native"].supports
        assert supports(gpu._replace(shape=fits)) is None
        assert why in str(supports(gpu._replace(shape=too_large)))


def test_require_fails_before_a_run_starts() -> None:
    assert set(dispatch.require("fused", torch.device("cpu"))) == set(dispatch.ops())
    with pytest.raises(KernelError, match="--kernels triton cannot serve"):
        dispatch.require("triton", torch.device("cpu"))


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
        torch.testing.assert_close(result.score, residual + 0.5 * (f - f_hat).square().mean(dim=1))
        torch.testing.assert_close(result.map, (x - x_hat).square().mean(dim=1))
        assert anomaly_score(x, x_hat, want_map=False, kernels=kernels).map is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be"),
        ({"x": torch.zeros(2, 3, 0, 4)}, "of 0 x 4 pixels nothing is left"),
        ({"x": torch.zeros(2, 3, 4, 1), "pool": 2}, "of 4 x 1 pixels nothing is left after the pool of 2"),
        ({"depthwise": torch.zeros(3, 1, 4, 4)}, "odd k"),
        ({"depthwise": torch.zeros(2, 1, 3, 3)}, r"\[3, 1, k, k\]"),
        ({"depthwise_bias": torch.zeros(2)}, r"depthwise_bias must be \[3\]"),
        ({"pointwise": torch.zeros(5, 2, 1, 1)}, r"\[D, 3, 1, 1\]"),
        ({"pointwise_bias": torch.zeros(3)}, r"pointwise_bias must be \[5\]"),
        ({"scale": torch.zeros(2, 3)}, "both scale and shift"),
        ({"scale": torch.zeros(2, 1), "shift": torch.zeros(2, 1)}, r"scale must be \[2, 3\]"),
        ({"norm": "layer"}, "norm must be one of none, instance"),
        ({"upsample": 3}, "upsample and pool"),
        ({"residual": torch.zeros(2, 5, 4, 3)}, r"residual must be \[2, 5, 4, 4\]"),
        ({"x": torch.zeros(2, 3, 4, 4).bfloat16()}, r"computed in torch.bfloat16, weights.depthwise is torch.float32"),
        ({"pointwise": torch.zeros(5, 3, 1, 1).bfloat16()}, r"in torch.float32, weights.pointwise is torch.bfloat16"),
        (
            {"scale": torch.zeros(2, 3).double(), "shift": torch.zeros(2, 3).double()},
            r"computed in torch.float32, scale is torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_depthwise_separable_refuses_wrong_shapes_dtypes_and_options(
    change: dict[str, object], message: str, kernels: str
) -> None:
    given: dict[str, object] = {
        "x": torch.zeros(2, 3, 4, 4),
        "depthwise": torch.zeros(3, 1, 3, 3),
        "depthwise_bias": None,
        "pointwise": torch.zeros(5, 3, 1, 1),
        "pointwise_bias": None,
        "residual": None,
    }

    def call(given: dict[str, object]) -> Tensor:
        def some(kind: type) -> dict[str, object]:
            return {name: given[name] for name in kind._fields if name in given}  # type: ignore[attr-defined]

        return depthwise_separable(
            given["x"],  # type: ignore[arg-type]
            Weights(**some(Weights)),  # type: ignore[arg-type]
            Prologue(**some(Prologue)),  # type: ignore[arg-type]
            Resize(**some(Resize)),  # type: ignore[arg-type]
            residual=given["residual"],  # type: ignore[arg-type]
            kernels=kernels,
        )

    call(given)
    with pytest.raises(ValueError, match=message):
        call(given | change)


def test_pointwise_and_moments_refuse_what_does_not_match() -> None:
    x, w = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 1, 1)
    with pytest.raises(ValueError, match=r"bias must be \[5\], got \[3\]"):
        pointwise(x, w, torch.zeros(3))
    with pytest.raises(ValueError, match=r"computed in torch.float32, weight is torch.bfloat16"):
        pointwise(x, w.bfloat16(), None)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\] and floating point"):
        moments(x.long())
    with pytest.raises(ValueError, match="x has no values"):
        moments(x[:0])


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["reference", "fused", "pytorch", "native"])
def test_under_autocast_dtypes_may_differ(of_x: torch.dtype, of_weights: torch.dtype, kernels: str) -> None:
    if kernels == "native" and library.why_not():
        pytest.skip(str(library.why_not()))
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 1, 3, 3), (3,), (5, 3, 1, 1), (5,))
    weights = Weights(*(torch.randn(s, generator=draw).to(of_weights) for s in shapes))
    x = torch.randn(2, 3, 6, 6, generator=draw).to(of_x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_separable(x, weights, kernels=kernels)
    wanted = depthwise_separable(x.double(), Weights(*(w.double() for w in weights)), kernels="reference")
    assert y.dtype == torch.bfloat16
    assert (y - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 4)}, "x must be"),
        ({"expand_weight": torch.zeros(4, 3)}, "the MLP must be"),
        ({"spatial_weight": torch.zeros(1, 2, 6, 6)}, "odd k"),
        ({"norm": CbamNorm("layer")}, "must be one of batch, instance, fixed"),
        ({"norm": CbamNorm("fixed")}, "mean and var"),
    ],
)
def test_cbam_refuses_wrong_shapes_and_options(change: dict[str, object], message: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 4, 5, 5),
        "reduce_weight": torch.zeros(1, 4),
        "reduce_bias": torch.zeros(1),
        "expand_weight": torch.zeros(4, 1),
        "expand_bias": torch.zeros(4),
        "spatial_weight": torch.zeros(1, 2, 7, 7),
        "norm_weight": torch.ones(1),
        "norm_bias": torch.zeros(1),
        "norm": CbamNorm(),
    }

    def call(x: Tensor, norm: CbamNorm, **weights: Tensor) -> None:
        cbam(x, CbamWeights(**weights), norm, kernels="reference")

    call(**given)
    with pytest.raises(ValueError, match=message):
        call(**(given | change))


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
            weights, prologue = Weights(w, None, p, None), Prologue(scale=scale, shift=shift, relu=True)
            y = depthwise_separable(x, weights, prologue, kernels=kernels)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (gw,) = torch.autograd.grad(g.square().sum(), w)
        return gw

    wanted, got = penalty(None), penalty(torch.bfloat16)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() / wanted.norm() < 0.05
