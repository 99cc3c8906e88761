"""The command: rows run once, a stopped one goes on, and what is there is shown."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raccgan.cli import options
from raccgan.experiment import __main__ as experiment

SETTINGS = [
    "--base-width=4",
    "--gan-steps=4",
    "--encoder-steps=4",
    "--pathology-steps=4",
    "--pathology-width=2",
    "--batch-size=8",
    "--control-steps=3",
]


def run(out: Path, *arguments: str) -> int:
    return options.call(experiment.main, ["digits", f"--out={out}", "--seeds=0", "--threads=1", *SETTINGS, *arguments])


def lines(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_run_once_and_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--normal=3,5", "--limit=1") == 0
    (first,) = lines(tmp_path)
    assert first["normal"] == "3"
    assert 0 <= float(first["auroc"]) <= 1
    assert float(first["score_seconds_per_1000"]) > 0
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "the row's folder is gone"
    assert run(tmp_path, "--normal=3,5", "--keep") == 0
    assert [line["normal"] for line in lines(tmp_path)] == ["3", "5"]
    assert lines(tmp_path)[0] == first
    assert [(path / "checkpoint.safetensors").exists() for path in tmp_path.iterdir() if path.is_dir()] == [True]
    capsys.readouterr()
    assert run(tmp_path, "--normal=3,5", "--list") == 0
    assert "2 of 2 rows are done" in capsys.readouterr().out
    assert run(tmp_path, "--summary") == 0
    said = capsys.readouterr().out
    assert "2 of 10 classes, 1 seed" in said
    assert "| texture " in said
    assert (tmp_path / "summary.png").stat().st_size > 1000


@pytest.mark.long
def test_the_same_row_gives_the_same_figures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(tmp_path / name, "--normal=3") == 0
    a, b = (lines(tmp_path / name)[0] for name in ("a", "b"))
    same = [name for name in a if "auroc" in name or name in ("autoencoder", "nearest_neighbour", "digest")]
    assert {name: a[name] for name in same} == {name: b[name] for name in same}


@pytest.mark.long
def test_ranks_deal_out_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, normal in (("1", ["5"]), ("0", ["5", "3"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run(tmp_path, "--normal=3,5") == 0
        assert [line["normal"] for line in lines(tmp_path)] == normal


def test_a_row_that_was_stopped_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "raccgan.experiment", "digits", f"--out={tmp_path}", "--seeds=0", "--normal=3",
        "--base-width=4", "--gan-steps=100000", "--checkpoint-every=1", "--threads=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/checkpoint.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.rstrip().endswith("stopped in row 1 of 1; the same command goes on there")
    assert list(tmp_path.glob("*/checkpoint.safetensors"))
    assert not (tmp_path / "results.csv").exists()
