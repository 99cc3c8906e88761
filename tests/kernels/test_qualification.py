"""Qualification on a CPU: planted faults are refused, each for its reason, and nothing happens to this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raccgan.kernels import dispatch
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.kernels.moments import moments
from raccgan.kernels.qualification import cache, run, table
from raccgan.kernels.qualification.record import Like, Recorded, recorded
from raccgan.kernels.qualification.run import Limits, qualify
from raccgan.kernels.qualification.table import Class, Row

CPU = torch.device("cpu")
LIMITS = Limits(all=200, silence=8)  # a busy machine is slow


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(cache, "folders", lambda: [tmp_path / "raccgan", tmp_path / "elsewhere"])
    monkeypatch.delenv("RACCGAN_QUALIFY", raising=False)
    yield tmp_path
    table.use(CPU, {})


def moments_calls(channels: int = 4) -> list[Recorded]:
    x = torch.randn(5, channels, 6, 6, requires_grad=True)
    return recorded(lambda: moments(x), second_order=True)


def test_calls_are_listed_without_data() -> None:
    x = torch.randn(4, 4, 6, 6, requires_grad=True).contiguous(memory_format=torch.channels_last)
    (call,) = recorded(lambda: moments(x.detach().requires_grad_()))
    assert call.kind == Class("moments", "float32", (4, 6, 6), 0)
    assert call.arguments == (Like("x", (4, 4, 6, 6), torch.float32, True, True, True),)
    assert set(dispatch.ops()["moments"]) >= {"reference", "native"}  # as before
    mean, _ = moments(x)
    assert mean.isfinite().all()


def test_planted_faults_are_refused_each_for_its_reason(home: Path) -> None:
    calls = moments_calls()
    told: list[int] = []
    x, x_hat = torch.randn(2, 5, 3, 16, 16).requires_grad_().unbind()
    sound = recorded(lambda: anomaly_score(x, x_hat, want_map=True))
    rows = qualify(
        [*calls, *sound], CPU, limits=LIMITS, imports=("tests.kernels.planted",), begin=lambda total: told.append
    )
    row = rows[calls[0].kind]
    assert row.order == ("reference",)
    reasons = {
        "wrong": "wrong: values of output 1 is off by 1.0e-02",
        "not_a_number": "wrong: values of output 1 is not finite",
        "wrong_second": "wrong: the second derivative of x is off by",
        "changing": "not the same bits twice: ",
        "crash": "crashes: SIGSEGV in moments on 4x6x6 in float32",
        "endless": "hangs: no end after 8 seconds in moments on 4x6x6",
        "slow": "slower: 4",  # two calls of 20 ms
        "raising": "raises: no kernel image is available",
        "refusing": "odd channels alone",
    }
    assert row.refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert row.refused[name].startswith(reason), name
    assert told == [1, 2]
    row = rows[sound[0].kind]
    assert "native" in row.order or row.refused["native"].startswith("slower: ")
    assert row.errors["native"] < 1e-6
    call = dispatch.Call(CPU, torch.float32, (9, 3, 16, 16))
    taken = dispatch.choose("anomaly_score", dispatch.ops()["anomaly_score"], "fused", call)
    assert taken.name == row.order[0] == min(row.order, key=lambda name: row.milliseconds[name])
    (file,) = (home / "raccgan").glob("*.json")
    assert json.loads(file.read_text())["circumstances"]["PyTorch"] == torch.__version__
    table.use(CPU, {})
    assert run.known(CPU) == rows
    assert qualify(calls, CPU, imports=("nowhere",)) == rows  # nothing is left to try


def test_the_dispatcher_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = dispatch.ops()["moments"]
    call = dispatch.Call(CPU, torch.float32, (2, 4, 6, 6))
    before = dispatch.choose("moments", backends, "fused", call)
    refused = {"native": "slower: 2 ms, reference 1 ms"}
    table.use(CPU, {Class("moments", "float32", (4, 6, 6), 0): Row(("reference",), refused)})
    choice = dispatch.choose("moments", backends, "fused", call)
    assert choice.name == "reference"
    assert dispatch.choose("moments", backends, "fused", call._replace(shape=(2, 8, 6, 6))).name == before.name
    gpu = call._replace(device=torch.device("cuda", 0))
    anywhere = {name: dispatch.Backend(dispatch.always, one.run) for name, one in backends.items()}
    assert dispatch.choose("moments", anywhere, "fused", gpu).name == "reference"  # nothing was tried
    table.use(gpu.device, {Class("moments", "float32", (4, 6, 6), 0): Row(("triton", "reference"), refused)})
    choice = dispatch.choose("moments", anywhere, "fused", gpu)
    assert (choice.name, choice.refused) == ("triton", refused)
    anywhere["triton"] = dispatch.Backend(lambda call: "not this call", anywhere["triton"].run)
    choice = dispatch.choose("moments", anywhere, "fused", gpu)
    assert (choice.name, choice.refused) == ("reference", {"triton": "not this call", **refused})
    table.use(gpu.device, {})


def test_a_child_that_does_not_start_leaves_pytorch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "python").write_text("#!/bin/sh\necho 'all CUDA-capable devices are busy' >&2\nexit 1\n")
    (home / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(home / "python"))
    calls = moments_calls()
    row = qualify(calls, CPU, limits=LIMITS)[calls[0].kind]
    assert row.order == ()
    why = "the child that tries kernels does not start: crashes: all CUDA-capable devices are busy"
    assert row.refused == {"native": why, "triton": why}
    call = dispatch.Call(CPU, torch.float32, (5, 4, 6, 6))
    assert dispatch.choose("moments", dispatch.ops()["moments"], "fused", call).name == "reference"


def test_time_is_limited_and_the_next_start_goes_on() -> None:
    calls = moments_calls()
    lines: list[str] = []
    assert qualify(calls, CPU, limits=Limits(all=0.0), say=lines.append) == {}
    assert lines == [
        "1 of 1 classes of calls were not tried in 0 seconds and stay PyTorch's: the next start, or python -m "
        "raccgan.doctor --qualify, goes on"
    ]


def test_switched_off_it_tries_and_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table.use(CPU, {moments_calls()[0].kind: Row(("reference",))})
    cache.save(CPU, table.rows_of(CPU))
    assert run.known(CPU)
    monkeypatch.setenv("RACCGAN_QUALIFY", "0")
    assert qualify(moments_calls(), CPU, imports=("nowhere",)) == {}
    assert run.known(CPU) == {}


def test_a_home_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setattr(cache, "folders", lambda: [home / "file" / "raccgan", home / "elsewhere"])
    rows = {moments_calls()[0].kind: Row(("reference",), {}, {"reference": 1.5})}
    assert cache.save(CPU, rows) is None
    assert cache.load(CPU) == rows
    monkeypatch.setattr(cache, "folders", lambda: [home / "file" / "raccgan"])
    assert "Not a directory" in str(cache.save(CPU, rows))
    assert cache.load(CPU) == {}
    with cache.locked(CPU):
        pass
