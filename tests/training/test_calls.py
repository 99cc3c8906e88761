"""What qualification tries is what training calls, and a GPU computes float32 as float32 meanwhile."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from raccgan import doctor
from raccgan.config import make_config
from raccgan.kernels import dispatch
from raccgan.kernels.qualification.record import Like
from raccgan.kernels.qualification.table import Class, Row
from raccgan.models.devices import exact
from raccgan.training.calls import calls
from tests.conftest import CPU, TINY


def test_the_calls_of_all_phases_are_listed() -> None:
    before = {op: dict(backends) for op, backends in dispatch.tables().items()}
    found = list(calls(make_config("digits", TINY), 2, 1, CPU))
    assert {call.kind.op for call in found} == {"depthwise_separable", "pointwise", "moments", "cbam"}
    assert {call.kind.dtype for call in found} == {"float32"}
    images = [call.arguments[0] for call in found]
    assert all(isinstance(x, Like) and x.channels_last and x.batched for x in images)
    penalised = [call for call in found if call.second_order]
    assert any(call.arguments[0].requires_grad for call in penalised)
    assert len(penalised) < len(found)
    assert {op: dict(backends) for op, backends in dispatch.tables().items()} == before


def test_float32_is_float32_on_a_gpu_inside_alone() -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.deterministic
    with exact(torch.device("cuda")):
        assert (conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.deterministic) == (
            "ieee",
            "ieee",
            True,
        )
    assert (conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.deterministic) == before


def test_a_report_has_a_line_for_each_backend(tmp_path: Path) -> None:
    refused = {"native": "slower: 2 ms, reference 1 ms", "triton": "crashes: SIGSEGV"}
    row = Row(("reference",), refused, {"reference": 1.0, "native": 2.0}, {"native": 1e-7})
    doctor._report(tmp_path / "gpu.csv", {Class("moments", "float32", (4, 6, 6), 0): row}, CPU)
    with (tmp_path / "gpu.csv").open(newline="") as file:
        lines = {line["implementation"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["reference", "native", "triton"]
    assert [line["taken"] for line in lines.values()] == ["yes", "no", "no"]
    assert lines["native"]["versus_best_peer"] == "0.5"
    assert lines["triton"]["reason"] == "crashes: SIGSEGV"
    assert lines["triton"]["PyTorch"] == torch.__version__
