"""Images as they arrive: in a folder that is followed, and by paths on standard input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import detect, train
from raccgan.errors import InputError
from raccgan.outputs.files import stamp
from raccgan.scoring import arriving
from tests.cli.test_commands import refused, run, table
from tests.conftest import TINY_OPTIONS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return path


@contextmanager
def detecting(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "raccgan.detect", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[bytes]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n").split("\t")


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_a_path_is_written_and_its_line_read(trained: Path, tmp_path: Path, end: bytes) -> None:
    first = picture(tmp_path / ("a\nb.png" if end == b"\0" else "a b.png"))
    second, broken = picture(tmp_path / "c.png", 1), tmp_path / "broken.png"
    broken.write_bytes(b"none")
    null = ["--null"] if end == b"\0" else []
    with detecting(trained, "-", *null, "--out", tmp_path / "out") as process:
        assert process.stdin is not None
        process.stdin.write(os.fsencode(first) + end)
        process.stdin.flush()
        path, score, decided = line_of(process)
        assert path.endswith(".png")
        assert float(score) > 0
        assert decided in ("anomalous", "normal")
        process.stdin.write(os.fsencode(broken) + end + end + os.fsencode(second))  # the last without an end
        out, err = process.communicate(timeout=60)
    assert out.decode().startswith(f"{second}\t")
    assert process.returncode == 1, err
    assert err.decode().count("skipped: ") == 1
    assert len(table(tmp_path / "out" / "scores.csv")) == 2
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"] == 1


def test_a_folder_is_followed_until_stopped_and_again(trained: Path, tmp_path: Path) -> None:
    """A file that is half there is waited for; results in the folder are none of its images."""
    folder = tmp_path / "in"
    whole = picture(tmp_path / "whole.png", 5).read_bytes()
    picture(folder / "a.png")
    command = [trained, "--follow", folder, "--out", folder / "results", "--overlays"]
    with detecting(*command) as process:
        assert line_of(process)[0] == str(folder / "a.png")
        (folder / "b.png").write_bytes(whole[:30])
        (folder / "b.png").write_bytes(whole)
        assert line_of(process)[0] == str(folder / "b.png")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.decode().startswith(("0 of 2", "1 of 2", "2 of 2"))
    assert len(table(folder / "results" / "scores.csv")) == 2
    assert len(list((folder / "results" / "overlays").iterdir())) == 2
    picture(folder / "below" / "c.png", 3)
    with detecting(*command) as process:
        assert line_of(process)[0] == str(folder / "below" / "c.png")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert b"2 images are scored already" in err
    assert len(table(folder / "results" / "scores.csv")) == 3


def test_what_still_changes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "POLL", 0.0)
    looks = iter(range(6))
    one, two = picture(tmp_path / "1.png"), tmp_path / "2.png"
    known = [{"path": str(one), "stamp": list((stamp(one) or ())[1:])}]
    picture(tmp_path / "3.png")

    def stopped() -> bool:
        """Asked once a look: a file grows at the first ones, and is then left alone."""
        look = next(looks)
        if look < 3:
            two.write_bytes(b"x" * (look + 1))
        return look == 5

    found = list(arriving.in_folder(tmp_path, tmp_path / "out", known, stopped))
    assert found == [[tmp_path / "3.png"], [two]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--follow", "in", "a.png"], "exclude each other"),
        ([], "no image to score: name files or folders"),
        (["-", "a.png"], "name no others beside it"),
        (["a.png", "--null"], "--null says how paths"),
        (["--follow", "nowhere"], "no folder nowhere to follow"),
    ],
)
def test_what_excludes_itself_is_refused(
    trained: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, detect, trained, *arguments)


def test_no_folder_is_an_error_of_the_library_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        next(arriving.in_folder(tmp_path / "none", tmp_path, [], lambda: False))
