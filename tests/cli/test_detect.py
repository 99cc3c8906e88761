"""Detection as a person types it: what is scored, what is written, what a stopped run leaves, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raccgan import calibrate, detect, train
from raccgan.models import checkpoint
from raccgan.models.checkpoint import NAME
from raccgan.outputs.journal import Journal
from raccgan.scoring import score_files
from raccgan.scoring.detector import Detector
from tests.cli.test_commands import refused, run, table
from tests.conftest import TINY_OPTIONS
from tests.kernels.compare import assert_each_close


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty-three small images in two folders, wider than high."""
    draw = np.random.default_rng(0)
    for i in range(23):
        folder = tmp_path / "images" / ("a" if i < 11 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def scores(out: Path) -> dict[str, float]:
    return {row["path"]: float(row["score"]) for row in table(out / "scores.csv")}


def test_the_tables_agree_with_each_other_and_with_the_library(trained: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(detect, trained, images, "--out", out) == 0
    rows, records = table(out / "scores.csv"), json.loads((out / "scores.json").read_text())
    results = Detector.load(trained).score(sorted(images.rglob("*.png"), key=lambda path: int(path.stem)))
    assert len(rows) == len(records) == len(results) == 23
    for row, record, result in zip(rows, records, results, strict=True):
        assert {name: type(record[name])(value) for name, value in row.items()} == record
        assert record["path"] == str(result.path)
        assert np.float32(record["score"]) == np.float32(result.score)
        assert record["threshold"] == pytest.approx(result.threshold, rel=1e-8)
        assert record["predicted"] == ("anomalous" if result.anomalous else "normal")
        assert record["nearest_class"] == result.nearest_class
        assert (record["map_x"], record["map_y"]) == (result.peak.x, result.peak.y)
        assert result.map is not None
        assert np.float32(record["map_max"]) == result.map.max()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["scored"], summary["skipped"]) == (23, 0)
    assert summary["anomalous"] == sum(record["predicted"] == "anomalous" for record in records)


def test_pandas_reads_the_tables(trained: Path, images: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert run(detect, trained, images, "--out", tmp_path / "out") == 0
    from_csv, from_json = pandas.read_csv(tmp_path / "out/scores.csv"), pandas.read_json(tmp_path / "out/scores.json")
    pandas.testing.assert_frame_equal(from_csv, from_json, check_dtype=False)
    assert from_csv["score"].dtype == float
    assert len(from_csv) == 23


def test_files_folders_and_patterns_are_found_once_each(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = run(
        detect, trained, images / "b" / "15.png", f"{images}/**/1*.png", images / "a", f"{images}/*.tif", "--out", out
    )
    said = capsys.readouterr()
    assert status == 1
    assert "no image matches" in said.err
    names = [Path(path).name for path in scores(out)]
    assert names[0] == "15.png"
    assert sorted(names) == sorted({f"{i}.png" for i in (*range(11), *range(11, 20))})
    assert said.out.startswith(f"{sum(row['predicted'] == 'anomalous' for row in table(out / 'scores.csv'))} of 20 ")


def test_a_file_is_meant_by_its_name_even_if_that_is_a_pattern(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "[1].png").write_bytes(b"")
    Image.new("L", (8, 8)).save(tmp_path / "[1].png")
    assert score_files.find([str(tmp_path / "[1].png")]).files == (tmp_path / "[1].png",)


def test_the_test_part_of_mvtec_and_the_whole_category_without_its_masks(tmp_path: Path) -> None:
    category = tmp_path / "screw"
    for name in ("train/good", "test/good", "test/scratch", "ground_truth/scratch"):
        (category / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(category / name / "0.png")
    assert len(score_files.find([str(category / "test")]).files) == 2
    for wanted in (category, f"{category}/**/*.png"):
        found = score_files.find([str(wanted)])
        assert len(found.files) == 3
        assert sum(found.left_out["masks"].values()) == 1
    for named in (category / "ground_truth", category / "ground_truth" / "scratch" / "0.png"):
        assert len(score_files.find([str(named)]).files) == 1, "named on purpose"


@pytest.mark.parametrize("named", [".", "*/*.png", "**/*.png"])
def test_what_is_not_an_image_to_score_is_left_out_and_counted(
    images: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks, results of ours, the folder of the results, other kinds of files, links, and names in other case."""
    monkeypatch.chdir(images)
    mask = Image.fromarray(np.eye(12, 20, dtype=np.uint8) * 255)
    for name in ("mask/0.png", "a/0_GT.png", "before/overlays/0-1.png", "now/0.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        mask.save(name)
    for name in ("before/scores.csv", "before/summary.json", "a/x.heic", "a/none"):
        Path(name).write_text("x")
    Path("a/linked").symlink_to(images / "b")
    found = score_files.find([named], Path("now"))
    assert [path.as_posix() for path in found.files] == [f"{'a' if i < 11 else 'b'}/{i}.png" for i in range(23)]
    counted = {reason: sum(counts.values()) for reason, counts in found.left_out.items()}
    below = {"linked folders, which are not followed": 1, "files of other kinds": 2} if named == "." else {}
    ours = {".": 2, "*/*.png": 1, "**/*.png": 2}[named]  # whole folders, or the pictures in them
    assert counted == {"masks": 2, "results of raccgan": ours} | below


def test_results_in_the_folder_of_the_images_are_left_out(trained: Path, images: Path) -> None:
    for _ in range(2):
        assert run(detect, trained, images, "--out", images, "--overlays") == 0
        assert len(table(images / "scores.csv")) == 23


def test_an_argument_is_told_of_its_own_left_out_files(tmp_path: Path) -> None:
    for name in ("a/x.heic", "b/y.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = score_files.find([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [".heic" in problem for problem in found.problems] == [True, False]
    assert found.left_out == {"files of other kinds": {".heic": 1, ".txt": 1}}


def test_names_in_other_case_are_counted(images: Path) -> None:
    (images / "a" / "0.png").rename(images / "a" / "0.PNG")
    found = score_files.find([f"{images}/a/*.png"])
    assert len(found.files) == 10
    assert found.left_out == {"files whose names match the pattern in other case alone": {"0.PNG": 1}}


def test_exit_status_and_last_line_are_for_scripts(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    for arguments, status, words in (
        ((images / "a", "--threshold", 1e9), 0, "0 of 11 images anomalous, 0 skipped, threshold 1e+09"),
        ((images / "a", "--threshold", 1e9, "--fail-on-anomaly"), 0, "0 of 11"),
        ((images / "a", "--threshold", -1, "--fail-on-anomaly"), 3, "11 of 11 images anomalous"),
        ((images / "a", bad, "--threshold", -1), 1, "11 of 11 images anomalous, 1 skipped"),
        ((images / "a", bad, "--threshold", -1, "--fail-on-anomaly"), 3, "1 skipped"),
    ):
        assert run(detect, trained, *arguments, "--out", tmp_path / "out") == status
        assert words in capsys.readouterr().out.splitlines()[-1]
    assert run(detect, trained, images / "a", tmp_path / "none.png", "--out", tmp_path / "out") == 1
    assert "none.png: No such file" in capsys.readouterr().err
    assert "none of the 1 files could be read" in refused(capsys, detect, trained, bad, "--out", tmp_path / "none")
    assert "no image to score" in refused(capsys, detect, trained, f"{tmp_path}/*.gif", "--out", tmp_path / "none")


def test_what_was_found_and_the_last_line_where_there_is_no_terminal(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detect, trained, images, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert said.err == "23 images: 8-bit grey, 20 x 12 pixels\n"
    assert len(said.out.splitlines()) == 1


def test_maps_and_overlays(trained: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(detect, trained, images / "a", "--out", out, "--maps", "--overlays") == 0
    for record in json.loads((out / "scores.json").read_text()):
        map = np.load(out / record["map"])
        assert map.shape == (8, 8)
        assert map.dtype == np.float32
        assert map.max() == np.float32(record["map_max"])
        row, column = np.unravel_index(map.argmax(), map.shape)
        # 8 columns lie over 20 pixels, 8 rows over 12.
        assert abs((column + 0.5) * 20 / 8 - (record["map_x"] + 0.5)) <= 0.5
        assert abs((row + 0.5) * 12 / 8 - (record["map_y"] + 0.5)) <= 0.5
        assert Image.open(out / record["overlay"]).size == (20, 12)


def test_the_three_ways_to_another_threshold(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = checkpoint.load(trained).held_out["score"].numpy()
    assert len(held_out) > 50

    def threshold(*arguments: object) -> float:
        assert run(detect, trained, images / "a", "--out", tmp_path / "out", *arguments) == 0
        return float(json.loads((tmp_path / "out" / "summary.json").read_text())["threshold"])

    assert threshold() == pytest.approx(float(np.quantile(held_out, 0.95)), rel=1e-6)
    assert threshold("--quantile", 0.5) == pytest.approx(float(np.quantile(held_out, 0.5)), rel=1e-6)
    assert threshold("--threshold", 0.25) == 0.25
    for share in (0.0, 0.02, 0.1, 0.5):
        chosen = np.float32(threshold("--sensitivity", share))
        assert (held_out > chosen).mean() <= share
        lower = held_out[held_out < chosen].max()
        assert (held_out > lower).mean() > share, "a lower threshold would do"
    for bad in (("--quantile", 1.5), ("--sensitivity", 1), ("--threshold", "nan"), ("--quantile", "nan")):
        refused(capsys, detect, trained, images, "--out", tmp_path / "out", *bad)
    assert "not allowed with" in refused(capsys, detect, trained, images, "--quantile", 0.9, "--threshold", 1)


def test_a_checkpoint_without_held_out_scores_gets_them(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.safetensors"
    checkpoint.save(bare, dataclasses.replace(checkpoint.load(trained), held_out={}))
    assert run(detect, bare, images / "a", "--out", tmp_path / "bare", "--overlays") == 0
    assert run(detect, trained, images / "a", "--out", tmp_path / "new") == 0
    assert scores(tmp_path / "bare") == scores(tmp_path / "new")
    assert "python -m raccgan.calibrate" in refused(capsys, detect, bare, images, "--quantile", 0.9)
    assert run(calibrate, bare, images / "a") == 0
    assert run(detect, bare, images / "a", "--out", tmp_path / "bare", "--quantile", 0.9) == 0


def test_calibrate_changes_the_threshold_and_no_weight(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / NAME
    path.parent.mkdir()
    path.write_bytes((trained / NAME).read_bytes())
    before = checkpoint.load(path)
    (images / "b" / "cut.png").write_bytes(b"\x89PNG")
    assert run(calibrate, path.parent, images, "--quantile", 0.5) == 1
    assert "1 skipped" in capsys.readouterr().out
    after = checkpoint.load(path)
    assert [file.name for file in path.parent.iterdir()] == [NAME]
    assert after.threshold != before.threshold
    assert run(detect, path, images / "a", images / "b", "--out", tmp_path / "out") == 1
    # Half of the very images it was calibrated on are above their median.
    assert sum(row["predicted"] == "anomalous" for row in table(tmp_path / "out" / "scores.csv")) == 11
    assert checkpoint.digest(after) == checkpoint.digest(before)
    for part in ("networks", "optimisers"):
        for name, there in getattr(before, part).items():
            same_bits(there, getattr(after, part)[name])
    assert after.history == before.history
    assert after.steps == before.steps
    assert run(calibrate, path, "--threshold", 0.5) == 0
    assert checkpoint.load(path).threshold == 0.5
    assert run(calibrate, path, "--quantile", 0.5) == 0
    assert checkpoint.load(path).threshold == after.threshold
    assert "the threshold stays" in refused(capsys, calibrate, path, images / "b" / "cut.png")


def same_bits(there: object, here: object) -> None:
    if isinstance(there, torch.Tensor):
        assert isinstance(here, torch.Tensor)
        assert there.dtype == here.dtype
        assert there.numpy().tobytes() == here.numpy().tobytes()
    elif isinstance(there, dict):
        assert isinstance(here, dict)
        assert there.keys() == here.keys()
        for name in there:
            same_bits(there[name], here[name])
    else:
        assert there == here


def test_the_digest_sees_every_weight_and_not_the_threshold(trained: Path) -> None:
    stored = checkpoint.load(trained)
    before = checkpoint.digest(stored)
    stored.threshold = 7.0
    assert checkpoint.digest(stored) == before
    for name in stored.networks:
        weight = next(iter(stored.networks[name].values()))
        weight.view(-1)[-1] += 1
        assert checkpoint.digest(stored) != before
        weight.view(-1)[-1] -= 1


def arguments_of(trained: Path, images: Path, out: Path) -> list[object]:
    return [trained, images, "--out", out, "--score-batch", 20, "--overlays"]  # 4 images under 5 classes


def test_ctrl_c_and_the_same_command_again_give_the_table_of_one_run(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detect, *arguments_of(trained, images, tmp_path / "whole")) == 0
    out = tmp_path / "stopped"
    add, batches = Journal.add, 0

    def stop_at_the_third(self: Journal, rows: list[dict[str, object]]) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(Journal, "add", stop_at_the_third)
    assert run(detect, *arguments_of(trained, images, out)) == 130
    assert "stopped after 8 of 23 images; the same command goes on" in capsys.readouterr().err
    assert not (out / "scores.csv").exists()
    monkeypatch.setattr(Journal, "add", add)
    with (out / "scores.part").open("a") as journal:
        journal.write('[{"path": "cut in the midd')
    assert run(detect, *arguments_of(trained, images, out)) == 0
    assert "8 of 23 images are scored already" in capsys.readouterr().err
    assert (out / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()
    assert not (out / "scores.part").exists()


def test_a_killed_run_goes_on(trained: Path, images: Path, tmp_path: Path) -> None:
    """A real process, killed as soon as it has scored something."""
    out = tmp_path / "out"
    slow = (
        "import sys, time; from raccgan import detect; from raccgan.cli import options\n"
        "from raccgan.outputs.journal import Journal\n"
        "add = Journal.add\n"
        "def slowly(self, rows):\n    add(self, rows)\n    time.sleep(0.5)\n"
        "Journal.add = slowly; sys.exit(options.call(detect.main, sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, *map(str, arguments_of(trained, images, out))]
    # One thread as here: another number of them may round PyTorch's convolutions differently.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
    deadline = time.monotonic() + 60
    while not ((out / "scores.part").exists() and (out / "scores.part").read_text().count("\n") > 1):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run(detect, *arguments_of(trained, images, out)) == 0
    assert run(detect, *arguments_of(trained, images, tmp_path / "whole")) == 0
    assert (out / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_two_checkpoints_never_share_a_folder(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = checkpoint.load(trained)
    for name, value in stored.networks["encoder"].items():
        if name.endswith("bias"):  # every feature moves: one weight alone may be one that no image comes to
            value += 0.5
    other, out = tmp_path / "other.safetensors", tmp_path / "out"
    checkpoint.save(other, stored)
    with monkeypatch.context() as patch:
        patch.setattr(score_files, "_say_skipped", lambda rows, progress: stop() if list(rows) else None)
        assert run(detect, *arguments_of(trained, images, out)) == 130
    assert "holds part of another run (checkpoint is" in refused(capsys, detect, *arguments_of(other, images, out))
    line = refused(capsys, detect, *arguments_of(trained, images, out), "--maps")
    assert "maps is False there and True here" in line
    assert run(detect, *arguments_of(trained, images, out), "--quantile", 0.5) == 0, "the threshold may change"
    kept = scores(out)
    assert "holds results of another run" in refused(capsys, detect, *arguments_of(other, images, out))
    assert scores(out) == kept
    overlays = set((out / "overlays").iterdir())
    (out / "overlays" / "mine.png").write_bytes(b"a file of the user")
    assert run(detect, other, images / "a", "--out", out, "--overlays", "--restart") == 0
    assert scores(out).keys() < kept.keys()
    assert all(kept[path] != value for path, value in scores(out).items())
    assert {file.name for file in (out / "overlays").iterdir()} < {file.name for file in overlays} | {"mine.png"}
    assert (out / "overlays" / "mine.png").exists()


def stop() -> None:
    raise KeyboardInterrupt


def test_a_changed_file_is_scored_again_and_a_new_one_too(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(score_files, "_say_skipped", lambda rows, progress: stop() if list(rows) else None)
        assert run(detect, *arguments_of(trained, images, out)) == 130
    Image.new("L", (20, 12), 255).save(images / "a" / "0.png")
    Image.new("L", (20, 12), 255).save(images / "a" / "100.png")
    assert run(detect, *arguments_of(trained, images, out)) == 0
    assert run(detect, *arguments_of(trained, images, tmp_path / "whole")) == 0
    ours, whole = scores(out), scores(tmp_path / "whole")
    assert list(ours) == list(whole)
    assert len(ours) == 24
    assert_each_close(list(ours.values()), list(whole.values()), rtol=1e-4)


def test_a_damaged_journal_is_named(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.part").write_text("{}\nnot json\n")
    assert "is damaged: add --restart" in refused(capsys, detect, trained, images, "--out", tmp_path / "out")
    assert run(detect, trained, images, "--out", tmp_path / "out", "--restart") == 0


def test_a_known_class_is_noted_where_the_threshold_is_of_another_policy(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detect, trained, images / "a", "--out", tmp_path / "out", "--label-policy", "3") == 0
    assert "note: the threshold is of scores under 'minimum', not '3'" in capsys.readouterr().err
    assert {row["nearest_class"] for row in table(tmp_path / "out" / "scores.csv")} == {"3"}


def test_from_the_command_to_the_first_score_without_drawing_libraries(trained: Path, images: Path) -> None:
    """What takes long to import is imported where it is needed: matplotlib, SciPy and scikit-learn are not here."""
    code = (
        "import sys; from raccgan import Detector\n"
        f"Detector.load({str(trained)!r}).score({str(images / 'a' / '0.png')!r})\n"
        "import raccgan.scoring.score_files\n"
        "heavy = {'matplotlib', 'scipy', 'sklearn', 'pandas', 'torchvision'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_images_are_found_below_a_link_and_hidden_files_are_not(images: Path, tmp_path: Path) -> None:
    (images / ".hidden.png").write_bytes(b"")
    os.symlink(images, tmp_path / "link")
    assert len(score_files.find([str(tmp_path / "link")]).files) == 23
