"""The table of measurements: how it is made, whom `fused` takes by it, and what is said of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measured as command
from bench.results import COLUMNS
from raccgan import doctor
from raccgan.kernels import backend, cbam, measured
from raccgan.kernels.backend import Call, Implementation, KernelError
from raccgan.kernels.depthwise_separable import kind
from raccgan.kernels.measured import Class, Row

GPU, CPU = torch.device("cuda"), torch.device("cpu")
NAME = "NVIDIA Example"

TABLE: backend.Family = {
    "reference": Implementation(lambda x: x + 1, backend.always),
    "native": Implementation(lambda x: x * 2, backend.always),
    "triton": Implementation(lambda x: x * 3, backend.always),
    "rewritten": Implementation(lambda x: x * 4, backend.always),
}

# In two classes, the first of two cases, the kernels are faster; in the third they are not.
RESULTS = [
    ("cbam", "G32.3 64 @32 b16", "float32", "channels_last", "backward", "triton", "1"),
    ("cbam", "G32.3 64 @32 b16", "float32", "channels_last", "backward", "reference", "2"),
    ("cbam", "G32.3 64 @32 b16", "float32", "channels_last", "backward", "torch.compile", "0.5"),
    ("cbam", "G32.3 64 @32 b16", "float32", "NCHW", "backward", "reference", "0.5"),
    ("cbam", "G32.3 64 @32 b64", "float32", "channels_last", "backward", "triton", "4"),
    ("cbam", "G32.3 64 @32 b64", "float32", "channels_last", "backward", "reference", "8"),
    ("cbam", "D32.2 128 @8 b16", "float32", "channels_last", "penalty", "reference", "2"),
    ("cbam", "D32.2 128 @8 b16", "float32", "channels_last", "penalty", "triton", "3"),
    ("cbam", "D32.2 128 @8 b16", "float32", "channels_last", "penalty", "torch.compile", "raises"),
    ("depthwise_separable", "D32.2s 64-128 @16 b16", "bfloat16", "channels_last", "penalty", "native (no kernel)", "2"),
    ("depthwise_separable", "D32.2s 64-128 @16 b16", "bfloat16", "channels_last", "penalty", "reference", "9"),
    ("training_step", "32px b16", "float32", "channels_last", "step", "fused", "100"),
]  # fmt: skip
SAID = {
    "command": "pytest bench -m gpu",
    "date": "2026-01-02 03:04 UTC",
    "device": f"{NAME}, Linux x86_64; load 0.1 on 4 cores before",
    "versions": "Python 3.12.0, PyTorch 2.11.0",
    "GPU": "CUDA 13.0, cuDNN 91000, Triton 3.6.0",
}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table is, for this test; there is none yet."""
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "measured.json")
    _forget()
    yield measured.SHIPPED
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    measured.table_for.cache_clear()
    backend._remembered.cache_clear()


def results(folder: Path, rows: list[tuple[str, ...]] = RESULTS, said: dict[str, str] = SAID) -> Path:
    """What --save-results leaves, as far as the command reads it."""
    path = folder / "example.csv"
    named = ("op", "case", "dtype", "layout", "pass", "implementation", "median_ms")
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(dict(zip(named, row, strict=True)) for row in rows)
    path.with_suffix(".txt").write_text("".join(f"{name:<12}{value}\n" for name, value in said.items()))
    return path


def on_a_cpu(table: measured.Table) -> measured.Table:
    """The same measurements as if a CPU's compiled kernels had been in the place of Triton's."""
    rows = [row._replace(milliseconds={n.replace("triton", "native"): t for n, t in row.milliseconds.items()})
            for row in table.rows]  # fmt: skip
    return table._replace(device="cpu", rows=tuple(rows))


def call(shape: tuple[int, ...], pass_: str, dtype: torch.dtype = torch.float32, device: torch.device = GPU) -> Call:
    return Call(device, dtype, shape, "", pass_)


def test_the_command_turns_results_into_the_table(shipped: Path, tmp_path: Path) -> None:
    assert command.main([str(results(tmp_path))]) == 0
    (table,) = measured.read(shipped)
    assert (table.device, table.name, table.date) == ("cuda", NAME, SAID["date"])
    assert (table.versions, table.command) == (SAID["versions"], SAID["command"])
    assert table.rows == (
        Row(
            Class("cbam", "backward", "", "float32", 64, 32),
            ("G32.3 64 @32 b16", "G32.3 64 @32 b64"),
            {"triton": 5.0, "reference": 10.0},
        ),
        Row(Class("cbam", "penalty", "", "float32", 128, 8), ("D32.2 128 @8 b16",), {"reference": 2.0, "triton": 3.0}),
        Row(
            Class("depthwise_separable", "penalty", "1x1 pool", "bfloat16", 64, 16),
            ("D32.2s 64-128 @16 b16",),
            {"native": 2.0, "reference": 9.0},
        ),
    )


def test_the_files_of_a_device_are_one_table_and_a_case_counts_as_measured_last(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    anew = [(*RESULTS[0][:-1], "10"), (*RESULTS[1][:-1], "20"), ("cbam", "G128.5 96 @128 b4", *RESULTS[1][2:-1], "7")]
    more = results(tmp_path / "more", anew, {**SAID, "command": "and more", "date": "2026-01-03 00:00 UTC"})
    (table,) = command.tables_of([more, results(tmp_path)])
    assert (table.date, table.command) == ("2026-01-03 00:00 UTC", f"{SAID['command']}; and more")
    assert table.rows[0].milliseconds == {"triton": 10.0 + 4.0, "reference": 20.0 + 8.0}
    assert table.rows[-1] == Row(
        Class("cbam", "backward", "", "float32", 128, 128), ("G128.5 96 @128 b4",), {"reference": 7.0}
    )
    assert len(table.rows) == 4


def test_the_table_that_is_shipped_is_what_the_command_makes() -> None:
    tables = command.tables_of(sorted(command.FOLDER.glob("*.csv")))
    assert measured.SHIPPED.read_text("utf-8") == command.written(tables)
    assert measured.read(measured.SHIPPED) == tables


@pytest.mark.parametrize(
    ("rows", "said", "message"),
    [
        ([("cbam", "G32.3 65 @32 b16", *RESULTS[0][2:])], SAID, "no case 'G32.3 65 @32 b16' of cbam"),
        ([(*RESULTS[0][:-1], "fast")], SAID, "could not convert string to float: 'fast'"),
        ([("moments", "a", "float32", "channels_last", "step", "native", "1")], SAID, "no case 'a' of moments, step"),
        (RESULTS, {**SAID, "date": ""}, "does not say date"),
    ],
)
def test_the_command_says_what_is_wrong_with_results(
    rows: list[tuple[str, ...]],
    said: dict[str, str],
    message: str,
    shipped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main([str(results(tmp_path, rows, said))]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not shipped.exists()


def test_without_a_table_preference_decides_and_on_a_gpu_no_kernel_is_taken(shipped: Path) -> None:
    choice = backend.choose("cbam", TABLE, "fused", call((1, 64, 32, 32), "backward"))
    assert choice.name == "rewritten"
    for name in ("native", "triton"):
        assert choice.passed_over[name] == f"not measured on a GPU yet: --kernels {name} takes it"
    assert backend.choose("cbam", TABLE, "fused", call((1, 64, 32, 32), "backward", device=CPU)).name == "native"
    without = {name: one for name, one in TABLE.items() if name != "native"}
    choice = backend.choose("cbam", without, "fused", call((1, 64, 32, 32), "backward", device=CPU))
    assert choice.name == "rewritten"
    assert choice.passed_over["triton"].startswith("interpreted")


def test_whoever_was_fastest_serves_and_who_was_not_measured_does_not(shipped: Path, tmp_path: Path) -> None:
    command.main([str(results(tmp_path))])
    for shape, pass_, wanted in [
        ((16, 64, 32, 32), "backward", "triton"),
        ((3, 50, 31, 17), "backward", "triton"),
        ((16, 128, 8, 8), "penalty", "reference"),
        ((16, 1024, 256, 256), "penalty", "reference"),
        ((16, 64, 32, 32), "forward", "triton"),
        ((), "forward", "triton"),  # 5 and 3 against 10 and 2 milliseconds
    ]:
        choice = backend.choose("cbam", TABLE, "fused", call(shape, pass_))
        assert choice.name == wanted
        assert choice.passed_over == {"native": "not measured on a GPU yet: --kernels native takes it"}
    # Of an op that was not measured, no kernel is taken; nor is one that cannot run, however fast it was.
    assert backend.choose("moments", TABLE, "fused", call((16, 64, 32, 32), "backward")).name == "rewritten"
    broken = {**TABLE, "triton": Implementation(TABLE["triton"].run, lambda call: "no Triton")}
    choice = backend.choose("cbam", broken, "fused", call((16, 64, 32, 32), "backward"))
    assert (choice.name, choice.passed_over["triton"]) == ("reference", "no Triton")
    # Nothing was measured on a CPU.
    assert backend.choose("cbam", TABLE, "fused", call((16, 128, 8, 8), "penalty", device=CPU)).name == "native"


def test_a_name_is_served_whatever_was_measured(shipped: Path, tmp_path: Path) -> None:
    command.main([str(results(tmp_path))])
    for name in ("reference", "native", "triton"):
        assert backend.choose("cbam", TABLE, name, call((16, 128, 8, 8), "penalty")).name == name


def test_the_nearest_row_is_of_the_same_pass_then_kind_then_dtype_then_size() -> None:
    def row(name: str, pass_: str, kind: str, dtype: str, channels: int, side: int) -> Row:
        return Row(Class("op", pass_, kind, dtype, channels, side), (), {name: 1.0})

    rows = (
        row("forward", "forward", "3x3", "float32", 64, 8),
        row("backward", "backward", "3x3", "float32", 64, 8),
        row("wide", "backward", "3x3", "float32", 256, 8),
        row("large", "backward", "3x3", "float32", 64, 32),
        row("half", "backward", "3x3", "bfloat16", 1024, 64),
        row("up", "backward", "7x7 up", "float32", 64, 8),
    )
    for of, wanted in [
        (("forward", "7x7 up", "bfloat16", 512, 64), "forward"),
        (("penalty", "3x3", "float32", 64, 8), "backward"),
        (("backward", "3x3", "float32", 1024, 8), "wide"),
        (("backward", "3x3", "float32", 128, 8), "backward"),  # as near to "wide", which comes later
        (("backward", "3x3", "float32", 64, 16), "backward"),
        (("backward", "3x3", "float32", 32, 64), "large"),
        (("backward", "3x3", "float16", 1, 1), "half"),
        (("backward", "7x7 up", "float16", 1024, 64), "up"),
    ]:
        assert list(measured.nearest(Class("op", *of), rows).milliseconds) == [wanted]


def test_another_device_of_the_type_stands_in_and_the_latest_of_several(shipped: Path, tmp_path: Path) -> None:
    def table(name: str, date: str) -> measured.Table:
        return command.tables_of([results(tmp_path)])[0]._replace(device="cpu", name=name, date=date)

    old, new = table("Old", "2026-01-01"), table("New", "2026-02-01")
    shipped.write_text(command.written([new, old]))
    assert measured.table_for(CPU) == new
    _forget()
    here = table(measured.name_of(CPU), "2025-01-01")
    shipped.write_text(command.written([new, old, here]))
    assert measured.table_for(CPU) == here


def _changed(change: Callable[[Any], object]) -> Callable[[str], str]:
    """A change of the table's first row."""

    def changed(text: str) -> str:
        whole = json.loads(text)
        change(whole["tables"][0]["rows"][0])
        return json.dumps(whole)

    return changed


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "[]", "is no table of measurements"),
        (lambda text: '{"tables": 1}', "tables is 1"),
        (lambda text: text.replace('"versions"', '"version"'), "'versions' is missing"),
        (_changed(lambda row: row.update({"pass": "sideways"})), "pass is 'sideways'"),
        (_changed(lambda row: row.update(channels=63)), "channels and side are 63 and 32"),
        (_changed(lambda row: row.update(side="32")), "side is '32'"),
        (_changed(lambda row: row.update(milliseconds={"triton": -1})), "milliseconds are"),
        (_changed(lambda row: row.pop("kind")), "'kind' is missing"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(
    spoil: Callable[[str], str], said: str, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([str(results(tmp_path))])
    shipped.write_text(spoil(shipped.read_text()))
    with pytest.raises(KernelError) as error:
        backend.choose("cbam", TABLE, "fused", call((16, 64, 32, 32), "backward"))
    message = str(error.value)
    assert str(shipped) in message
    assert said in message
    assert "python -m bench.measured makes it anew" in message
    assert "\n" not in message
    assert backend.choose("cbam", TABLE, "native", call((16, 64, 32, 32), "backward")).name == "native"
    capsys.readouterr()
    assert doctor.main([]) == 0
    assert f"nothing: {message}" in capsys.readouterr().out


def test_doctor_prints_the_table_and_who_is_chosen(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.main([])
    assert "measured on cpu: nothing, so --kernels fused takes the first in order of preference" in (
        capsys.readouterr().out
    )
    shipped.write_text(command.written([on_a_cpu(command.tables_of([results(tmp_path)])[0])]))
    _forget()
    doctor.main([])
    said = " ".join(capsys.readouterr().out.split())
    assert f"measured on {NAME}, as nothing was on this" in said
    assert f"{SAID['date']}, {SAID['versions']}, by {SAID['command']}" in said
    assert "cbam penalty float32 128 @8 reference reference 2, native 3" in said
    assert "moments not measured" in said


def test_the_class_of_a_call_is_what_its_tensors_and_the_op_say() -> None:
    x, weight = torch.zeros(2, 5, 9, 3), torch.zeros(5)
    assert Call.of(x, weight) == Call(CPU, torch.float32, (2, 5, 9, 3), "", "forward")
    assert backend._class_of("op", torch.float32, (5, 9, 3), "", "forward") == Class(
        "op", "forward", "", "float32", 8, 16
    )
    weight.requires_grad_()
    assert Call.of(x, weight).pass_ == "backward"
    assert Call.of(x, weight, twice=True).pass_ == "penalty"
    with torch.no_grad():
        assert Call.of(x, weight, twice=True).pass_ == "forward"
    assert [kind(7, 2, 1), kind(1, 1, 2), kind(3, 1, 1)] == ["7x7 up", "1x1 pool", "3x3"]


def test_cbam_in_a_critic_is_served_as_its_losing_row_says(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped.write_text(command.written([on_a_cpu(command.tables_of([results(tmp_path)])[0])]))
    chosen = []
    choose = backend.choose

    def noted(*arguments: Any) -> backend.Choice:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(backend, "choose", noted)
    able = cbam.IMPLEMENTATIONS["native"].can_run(call((1, 4, 8, 8), "forward", device=CPU)) is None
    kernel = "native" if able else "reference"
    for norm, grows, wanted in [("instance", True, "reference"), ("instance", False, kernel), ("batch", True, kernel)]:
        x = torch.randn(2, 4, 8, 8).requires_grad_(grows)
        weights = [torch.randn(2, 4), torch.zeros(2), torch.randn(4, 2), torch.zeros(4), torch.randn(1, 2, 3, 3)]
        with torch.set_grad_enabled(grows):
            cbam.cbam(x, *weights, torch.ones(1), torch.zeros(1), norm=norm)
        assert chosen[-1].name == wanted


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_choose_like_eager_ones_without_a_break(shipped: Path, tmp_path: Path, dynamic: bool) -> None:
    """The choice is made while the graph is traced, and anew only for shapes of another class."""
    shipped.write_text(command.written([on_a_cpu(command.tables_of([results(tmp_path)])[0])]))
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(x: Tensor) -> Tensor:
        result: Tensor = backend.choose("depthwise_separable", TABLE, "fused", Call.of(x)).run(x)
        return result * backend.choose("cbam", TABLE, "fused", Call.of(x, twice=True)).run(x)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counted)
    for shape in [(2, 60, 30, 30), (5, 50, 17, 17), (2, 128, 8, 8)]:
        for grows in (False, True):
            x = torch.randn(shape).requires_grad_(grows)
            assert torch.equal(compiled(x), run(x))
    assert len(graphs) == (4 if dynamic else 6)
