"""The choice of a configuration: by the model, by what was measured, measured anew. Clock and GPU are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import tune as command
from raccgan.kernels import triton_runtime, tuning
from raccgan.kernels.triton_runtime import Config

GPU = torch.device("cuda", 0)
SMALL, LARGE = Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 4096}, 8)
CANDIDATES = [SMALL, LARGE]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As if there were one, with nothing chosen and nothing kept yet."""
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "VERSION", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setenv("RACCGAN_TUNING", str(tmp_path / "cache" / "kept.json"))
    monkeypatch.delenv("RACCGAN_TUNE", raising=False)
    tuning._chosen.clear()
    tuning._where.cache_clear()
    yield
    tuning._chosen.clear()
    tuning._where.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "kernel.py"
    file.write_text("a kernel")
    return file


def choose(source: Path, shape: tuple[object, ...] = (3, "float32"), run: Callable[[Config], object] | None = print):
    return tuning.choose("sums", [str(source)], shape, CANDIDATES, GPU, run)


def a_new_process() -> None:
    tuning._chosen.clear()
    tuning._where.cache_clear()


def tune(monkeypatch: pytest.MonkeyPatch, times: dict[int, float]) -> list[Config]:
    """Ask for measurements by a clock that says ``times``, by number of warps; returns who will have been measured."""
    measured: list[Config] = []

    def measure(call: Callable[[], object]) -> float:
        call()
        return times[measured[-1].num_warps]

    monkeypatch.setenv("RACCGAN_TUNE", "1")
    monkeypatch.setattr(tuning, "measure", measure)
    return measured


def test_the_model_decides_where_nothing_was_measured_and_nothing_is_written(source: Path) -> None:
    def refuse(config: Config) -> None:
        raise AssertionError("measured without being asked to")

    assert choose(source, run=refuse) == SMALL
    assert not tuning.path().exists()


def test_small_work_gets_small_programs_and_large_work_large_ones() -> None:
    def work(elements: int) -> Callable[[Config], tuple[int, int]]:
        return lambda config: (-(-elements // config.tile["ELEMENTS"]), config.tile["ELEMENTS"])

    assert tuning.ranked([LARGE, SMALL], work(2048))[0] == SMALL
    assert tuning.ranked([SMALL, LARGE], work(2**24))[0] == LARGE


def test_the_fastest_is_kept_for_later_processes(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    assert choose(source, run=measured.append) == LARGE
    assert choose(source, run=measured.append) == LARGE
    assert measured == CANDIDATES, "each once: the second call waits for nothing"
    monkeypatch.delenv("RACCGAN_TUNE")
    a_new_process()
    assert choose(source) == LARGE
    assert choose(source, shape=(4, "float32")) == SMALL, "another shape was not measured"
    (where,) = json.loads(tuning.path().read_text())
    assert "Imaginary GPU" in where
    assert "Triton 3.6.0" in where
    assert [file.name for file in tuning.path().parent.iterdir()] == ["kept.json"], "nothing is left beside it"


@pytest.mark.parametrize("change", ["device", "triton", "source"])
def test_a_measurement_holds_for_its_device_versions_and_source(
    monkeypatch: pytest.MonkeyPatch, source: Path, change: str
) -> None:
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    choose(source, run=measured.append)
    monkeypatch.delenv("RACCGAN_TUNE")
    a_new_process()
    if change == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    elif change == "triton":
        monkeypatch.setattr(triton_runtime, "VERSION", "3.6.1")
    else:
        source.write_text("a kernel that was changed")
    assert choose(source) == SMALL


def test_tuning_anew_replaces_what_was_kept(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    for times, best in (({4: 2.0, 8: 1.0}, LARGE), ({4: 1.0, 8: 2.0}, SMALL)):
        a_new_process()
        measured = tune(monkeypatch, times)
        assert choose(source, run=measured.append) == best
    monkeypatch.delenv("RACCGAN_TUNE")
    a_new_process()
    assert choose(source) == SMALL


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(source, run=measured.append) == SMALL
    assert not measured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(source, run=measured.append) == LARGE


def test_the_table_of_the_package_serves_where_the_user_measured_nothing(
    monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    choose(source, run=measured.append)
    tuning.path().rename(tuning.SHIPPED)
    monkeypatch.delenv("RACCGAN_TUNE")
    a_new_process()
    assert choose(source) == LARGE


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": 1}', '{"a": {"sums 3 float32": {"tile": 1}}}', "\x00"])
def test_a_broken_file_is_no_measurement_and_is_replaced(
    monkeypatch: pytest.MonkeyPatch, source: Path, content: str
) -> None:
    tuning.path().parent.mkdir()
    tuning.path().write_text(content)
    assert choose(source) == SMALL
    a_new_process()
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    assert choose(source, run=measured.append) == LARGE
    a_new_process()
    monkeypatch.delenv("RACCGAN_TUNE")
    assert choose(source) == LARGE


def test_a_configuration_that_is_no_candidate_any_more_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    measured = tune(monkeypatch, {4: 2.0, 8: 1.0})
    choose(source, run=measured.append)
    monkeypatch.delenv("RACCGAN_TUNE")
    a_new_process()
    fewer = tuning.choose("sums", [str(source)], (3, "float32"), [SMALL], GPU)
    assert fewer == SMALL


def test_the_command_tunes_every_op_at_every_layer_once() -> None:
    cases = list(command.all_cases("cpu"))
    assert {case.op for case, _ in cases} == {"anomaly_score", "cbam", "depthwise_separable", "moments"}
    layers = [(case.op, case.dtype, case.pass_, str({**arguments, "shape": arguments["shape"][1:]}))
              for case, arguments in cases]  # fmt: skip
    assert len(set(layers)) == len(layers) > 300
    assert all(arguments["shape"][0] <= 16 for _, arguments in cases)


def test_the_command_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert capsys.readouterr().err.startswith("error: there is no GPU here to measure on")
