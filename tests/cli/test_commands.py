"""The commands as a person types them: the whole road, and one clear line for every kind of bad input."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from raccgan import detect, doctor, evaluate, train
from raccgan.cli import options
from raccgan.evaluation.beside import CONTROLS
from raccgan.models.checkpoint import NAME, load
from tests.conftest import TINY_OPTIONS

TABLE = dict[str, list[str]]


def run(command: Any, *arguments: object) -> int:
    return options.call(command.main, [str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], command: Any, *arguments: object) -> str:
    """The one line of an error with exit status 2."""
    capsys.readouterr()
    try:
        status = run(command, *arguments)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    said = capsys.readouterr().err
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said.rstrip().endswith(lines[0]), said
    assert "Traceback" not in said
    return lines[0]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shapes(folder: Path, names: Sequence[str], count: int, size: tuple[int, int] = (9, 7)) -> None:
    """Small grey images, one sub-folder a class; each class has its own brightness."""
    draw = np.random.default_rng(0)
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = draw.integers(60 * place, 60 * place + 60, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    pictures = {"samples.png", "reconstructions.png", "losses.png", "roc.png"}
    assert {path.name for path in finished.iterdir()} >= {
        "config.json", "metrics.json", "scores.csv", NAME, *pictures
    }  # fmt: skip
    for name in pictures:
        assert min(Image.open(finished / name).size) > 100
    metrics = json.loads((finished / "metrics.json").read_text())
    assert 0 <= metrics["image"]["auroc"] <= 1
    assert {"auroc", "auprc", "f1_max"} <= set(metrics["image"])
    assert metrics["pixel"] == dict.fromkeys(("auroc", "aupro", "f1", "iou", "threshold"))
    assert set(metrics["controls"]) == set(CONTROLS)
    assert {"threshold", "seed", "seconds", "kernels", "device"} <= set(metrics)
    rows = table(finished / "scores.csv")
    assert len(rows) == metrics["images"]["test_normal"] + metrics["images"]["test_anomalous"]
    for row in rows:
        assert (row["label"] == "anomalous") == (row["class"] in "56789")
        assert (row["predicted"] == "anomalous") == (float(row["score"]) > metrics["threshold"])
    assert json.loads((finished / "config.json").read_text())["normal"] == "0,1,2,3,4"


def test_evaluate_gives_the_numbers_of_training_again(finished: Path, tmp_path: Path) -> None:
    assert run(evaluate, finished, "--out", tmp_path) == 0
    assert (tmp_path / "scores.csv").read_text() == (finished / "scores.csv").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((finished / "metrics.json").read_text())


def test_evaluate_with_another_quantile_and_on_the_other_path(finished: Path, tmp_path: Path) -> None:
    assert run(evaluate, finished, "--out", tmp_path, "--quantile", 0.5, "--kernels", "reference") == 0
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, finished))
    assert ours["threshold"] < theirs["threshold"]
    assert ours["image"]["auroc"] == pytest.approx(theirs["image"]["auroc"], abs=1e-3)
    assert ours["kernels"] == "reference"


def test_phases_one_by_one_end_where_all_at_once_do(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(train, "--out", out, *TINY_OPTIONS, "--phase", "gan") == 0
    assert not (out / "metrics.json").exists()
    assert run(train, "--resume", out, "--phase", "encoder") == 0
    assert run(train, "--resume", out, "--phase", "evaluate") == 0
    assert (out / "scores.csv").read_text() == (finished / "scores.csv").read_text()


def test_resume_of_a_stopped_run(finished: Path, tmp_path: Path) -> None:
    """Three of six steps, then the rest: the scores of a run that was never stopped."""
    out = tmp_path / "run"
    assert run(train, "--out", out, *TINY_OPTIONS, "--gan-steps", 3, "--phase", "gan") == 0
    assert run(train, "--resume", "--out", out, "--gan-steps", 6) == 0
    assert (out / "scores.csv").read_text() == (finished / "scores.csv").read_text()


def test_a_run_is_never_overwritten(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds a run already" in refused(capsys, train, "--out", finished, *TINY_OPTIONS)
    monkeypatch.chdir(tmp_path)
    for wanted in ("runs/digits", "runs/digits-2"):
        assert run(train, *TINY_OPTIONS, "--phase", "gan") == 0
        assert (tmp_path / wanted / NAME).exists()


def test_detect_scores_files_and_folders_and_skips_what_it_cannot_read(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes(tmp_path, ["some"], 3)
    (tmp_path / "some" / "broken.png").write_bytes((tmp_path / "some" / "0.png").read_bytes()[:40])
    (tmp_path / "some" / "text.png").write_text("no image")
    Image.new("RGB", (31, 17), (200, 10, 10)).save(tmp_path / "colour.jpg")
    status = run(detect, finished, tmp_path / "some", tmp_path / "colour.jpg", "--out", tmp_path / "found")
    said = capsys.readouterr()
    assert status == 1
    assert "2 skipped" in said.out
    assert len(re.findall(r"skipped: .*(broken|text)\.png", said.err)) == 2
    rows = table(tmp_path / "found" / "scores.csv")
    assert [Path(row["path"]).name for row in rows] == ["0.png", "1.png", "2.png", "colour.jpg"]
    assert all((row["predicted"] == "anomalous") == (float(row["score"]) > float(row["threshold"])) for row in rows)
    low = run(detect, finished, tmp_path / "colour.jpg", "--out", tmp_path / "low", "--threshold", "-1")
    assert low == 0
    assert table(tmp_path / "low" / "scores.csv")[0]["predicted"] == "anomalous"
    text = tmp_path / "some" / "text.png"
    assert "none of the 1 files" in refused(capsys, detect, finished, text, "--out", tmp_path / "none")


def test_the_class_folders_of_a_user(tmp_path: Path) -> None:
    """Two normal classes, mixed sizes, one file of colour among grey ones."""
    shapes(tmp_path / "data", ["dark", "middle", "bright"], 14)
    Image.new("RGB", (40, 12), (30, 30, 30)).save(tmp_path / "data" / "dark" / "colour.png")
    out = tmp_path / "run"
    arguments = ["--dataset", tmp_path / "data", "--protocol", "one-vs-rest", "--normal", "dark,middle"]
    assert (
        run(train, *arguments, "--out", out, *TINY_OPTIONS, "--image-size", 16, "--multipliers", "1,1,1", "--latent", 9)
        == 0
    )
    classes = {row["class"] for row in table(out / "scores.csv")}
    assert classes == {"bright", "dark", "middle"}


def test_real_screws_with_masks(data_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "screw"
    arguments = ["--dataset", "mvtec", "--category", "screw", "--data-root", data_root, "--image-size", 32]
    assert run(train, *arguments, "--out", out, *TINY_OPTIONS) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pixel"]["auroc"] is not None
    assert metrics["pixel"]["aupro"] is not None
    assert metrics["pixel"]["threshold"] == load(out).pixel_threshold
    assert 0 <= metrics["pixel"]["iou"] <= metrics["pixel"]["f1"] <= 1
    assert len(table(out / "scores.csv")) == 160


def test_real_chest_x_rays(data_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "chest"
    arguments = ["--dataset", "chest-xray", "--data-root", data_root, "--image-size", 32]
    assert run(train, *arguments, "--out", out, *TINY_OPTIONS) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["normal_classes"] == ["NORMAL"]
    assert len(table(out / "scores.csv")) == 231 + 387


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "/no/such/folder"], "no dataset, folder or .csv file '/no/such/folder'"),
        (["--dataset", "digts"], "did you mean 'digits'"),
        (["--normal", "11"], "no class '11'"),
        (["--normal", "0,1,2,3,4,5,6,7,8,9"], "nothing is anomalous"),
        (["--protocol", "one-vs-one"], "no protocol called 'one-vs-one'"),
        (["--batch-size", "-1"], "must be at least 1"),
        (["--batch-size", "two"], "invalid int value"),
        (["--gan-steps", "-5"], "out of range"),
        (["--image-size", "30"], "not 4 times a power of two"),
        (["--kernels", "triton"], "--kernels triton cannot serve"),
        (["--kernels", "fast"], "not one of reference, fused, native, triton"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "abacus"], "no device called 'abacus'"),
        (["--preset", "mnits"], "no preset called 'mnits'"),
        (["--phase", "encoder"], "needs a trained generator"),
        (["--phase", "half"], "not one of all, gan, encoder, evaluate"),
        (["--resume"], "--resume needs a folder"),
        (["--resume", "/no/such/run"], "no checkpoint at /no/such/run"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, train, *arguments)
    assert not (tmp_path / "runs").exists(), "a refused run left a folder behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda: " in refused(capsys, train, "--device", "cuda")
    assert "use --device cpu" in refused(capsys, train, "--device", "cuda")


def test_bad_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = [*TINY_OPTIONS, "--image-size", "8"]
    shapes(tmp_path / "one", ["normal", "abnormal"], 1)
    assert "only one training image" in refused(capsys, train, "--dataset", tmp_path / "one", *small)
    shapes(tmp_path / "hole", ["normal", "abnormal"], 9)
    (tmp_path / "hole" / "empty").mkdir()
    assert "no image in" in refused(capsys, train, "--dataset", tmp_path / "hole", *small)
    shapes(tmp_path / "cut", ["normal", "abnormal"], 30)
    for path in sorted((tmp_path / "cut" / "normal").iterdir()):
        path.write_bytes(path.read_bytes()[:50])
    line = refused(capsys, train, "--dataset", tmp_path / "cut", *small, "--out", tmp_path / "run")  # training refuses
    assert re.search(r"normal/\d+\.png", line)


def test_checkpoints_that_do_not_fit(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, train, "--resume", finished, "--base-width", 8)
    assert "another configuration: base_width is 4 there and 8 here" in line
    assert "normal classes are 0,1,2,3,4 there and 0,1 here" in refused(
        capsys, train, "--resume", finished, "--normal", "0,1"
    )
    cut = tmp_path / "cut.safetensors"
    whole = (finished / NAME).read_bytes()
    for part in range(10):
        cut.write_bytes(whole[: len(whole) * part // 10])
        assert str(cut) in refused(capsys, evaluate, cut)
    cut.write_bytes(safetensors.torch.save({"weights": torch.zeros(3)}))
    assert "truncated or no checkpoint: its header is not one of raccgan's" in refused(capsys, evaluate, cut)
    assert "label policy '9' cannot apply" in refused(capsys, evaluate, finished, "--label-policy", "9")


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_with_code_is_refused_and_does_not_run(
    how: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    witness, path = tmp_path / "ran", tmp_path / "hostile.pt"
    if how == "torch":
        torch.save({"format": 1, "config": Hostile(witness)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(witness)))
    assert "could run code" in refused(capsys, evaluate, path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Hostile(witness)))
    assert witness.exists(), "the test's payload does nothing"


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused(capsys, train, *TINY_OPTIONS, "--out", tmp_path / "file" / "run")


def test_doctor_says_what_runs_where_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(doctor) == 0
    said = capsys.readouterr().out
    for family in ("depthwise_separable", "cbam", "anomaly_score"):
        assert family in said
    assert "not triton: " in said


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("| true", 141, ""),
        ("> /dev/full", 2, "error: No space left on device\n"),
        (">&-", 0, ""),
    ],
)
def test_an_output_that_nobody_takes(redirection: str, status: int, said: str) -> None:
    """A pipe whose reader has gone, a full disk behind standard output, and none at all."""
    script = f"{sys.executable} -c 'import time; time.sleep(0.5); from raccgan import doctor; "
    script += "from raccgan.cli import options; import sys; "
    script += f"sys.exit(options.call(doctor.main, []))' {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("command", ["train", "evaluate", "detect", "calibrate", "generate", "doctor"])
def test_help_teaches_by_example_without_importing_torch(command: str) -> None:
    code = (
        f"import sys; from raccgan import {command}\n"
        f"try: {command}.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'help imports torch'\n"
        "import os; print(sum(os.times()[:2]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 1, "seconds of the processor, the start of Python included"
    assert f"python -m raccgan.{command}" in done.stdout.split("examples:")[1]
