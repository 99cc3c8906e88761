"""What a machine does to a run: disks that fill, folders that take nothing, files cut short, a second run beside it.

Every time one clear line, and what was there before is there after. The full disk and the read-only folder are real
ones, mounted where no one else sees them.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import calibrate, detect, evaluate, generate, train
from raccgan.__main__ import module_of
from raccgan.errors import InputError
from raccgan.export import __main__ as export
from raccgan.models import checkpoint
from raccgan.models.checkpoint import NAME
from raccgan.outputs.files import LOCK, own_folder, write_text
from tests.cli.test_commands import refused, run
from tests.cli.test_crash import ROOT
from tests.conftest import TINY_OPTIONS

# Runs commands one after the other, [name, arguments] each, and prints status and errors of each as a line of JSON.
DRIVER = """
import contextlib, io, json, sys
from raccgan.__main__ import module_of
from raccgan.cli import options

for name, arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = options.call(module_of(name).main, arguments)
    print(json.dumps([name, status, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A folder with ``run``, a copy of the trained one, and forty ``images``."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 256, (9, 9), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def every_command(place: Path, out: Path) -> list[tuple[str, list[str]]]:
    """Each command that writes, into a folder below ``out``; train and calibrate into ``out/run`` itself."""
    run, images = str(place / "run"), str(place / "images")
    return [
        ("train", ["--resume", str(out / "run"), "--gan-steps", "9"]),
        ("calibrate", [str(out / "run"), images]),
        ("evaluate", [run, "--out", str(out / "judged")]),
        ("detect", [run, images, "--out", str(out / "found"), "--maps", "--overlays"]),
        ("generate", [run, "--count", "60", "--out", str(out / "made")]),
        ("export", [run, "--format", "torch", "--out", str(out / "exported")]),
    ]


def below_a_mount(mount: str, commands: list[tuple[str, list[str]]], after: str = "") -> list[tuple[str, int, str]]:
    """Run commands where something is mounted that only they see; name, exit status and errors of each."""
    private = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*private, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no mount of one's own here: unshare --mount is refused")
    done = subprocess.run(
        [
            *private,
            "bash",
            "-euc",
            f'{mount}\n"$0" -c "$1" "$2"\n{after}',
            sys.executable,
            DRIVER,
            json.dumps(commands),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def one_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert said.rstrip().endswith(lines[0]), said
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_full_disk_costs_one_line_and_nothing_that_was_there(place: Path) -> None:
    """Room for some small files and not for what each command writes; with more room, the same commands go on."""
    room, saved = place / "room", place / "saved"
    room.mkdir()
    fill = f"mount -t tmpfs -o size=4m none {room}\ncp -r {place}/run {room}/run\n"
    fill += f"head -c 10m /dev/zero > {room}/filler 2> /dev/null || true\ntruncate -s -24K {room}/filler\n"
    found = below_a_mount(fill, every_command(place, room), f"rm {room}/filler\ncp -r {room} {saved}")
    assert len(found) == 6
    for name, status, said in found:
        assert status == 2, (name, said)
        assert "No space left on device; free some space" in one_line(said), name
    after = contents(saved)
    for name in (NAME, "scores.csv", "metrics.json"):
        assert after[f"run/{name}"] == (place / "run" / name).read_bytes()
    assert not [name for name in after if name.endswith(".part") and Path(name).name != "scores.part"]
    assert not [name for name in after if Path(name).name == LOCK]
    for name in ("judged", "made", "exported"):
        shutil.rmtree(saved / name, ignore_errors=True)
    kept = json.loads((saved / "found" / "scores.part").read_text().splitlines()[0])
    assert kept["checkpoint"], "the journal of what was scored before the disk was full"
    for name, arguments in every_command(place, saved):
        assert run(module_of(name), *arguments) == 0, name


def test_a_read_only_folder_is_refused_before_any_work(place: Path) -> None:
    fixed = place / "fixed"
    shutil.copytree(place / "run", fixed / "run")
    before = contents(fixed)
    mount = f"mount --bind {fixed} {fixed}\nmount -o remount,bind,ro {fixed}"
    for name, status, said in below_a_mount(mount, every_command(place, fixed)):
        assert status == 2, (name, said)
        assert "Read-only file system" in one_line(said), name
        assert "name a place that can be written" in one_line(said), name
    assert contents(fixed) == before


def test_a_limit_on_file_sizes_is_one_line_too(tmp_path: Path) -> None:
    """The kernel's other way of saying no; a checkpoint is larger than 20 kB, the settings are smaller."""
    command = f"ulimit -f 20; exec {sys.executable} -m raccgan.train {' '.join(TINY_OPTIONS)} --out {tmp_path / 'run'}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path / 'run' / NAME}: File too large" in one_line(done.stderr)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_checkpoint_cut_at_every_tenth_stops_every_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (place / "run" / NAME).read_bytes()
    for tenth in range(10):
        (place / "run" / NAME).write_bytes(whole[: len(whole) * tenth // 10])
        before = contents(place)
        for name, arguments in every_command(place, place):
            line = refused(capsys, module_of(name), *arguments)
            assert f"{place / 'run' / NAME} is truncated or no checkpoint" in line, name
        assert contents(place) == before, "a refused command wrote something"


def test_one_bit_turned_over_is_seen(place: Path) -> None:
    """A disk that lies: whatever is read all the same is what was written."""
    path = place / "run" / NAME
    whole, wanted = path.read_bytes(), checkpoint.digest(checkpoint.load(path))
    refusals = 0
    for position in np.random.default_rng(0).integers(0, len(whole), 60).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = checkpoint.load(path)
        except InputError:
            refusals += 1
        else:
            assert checkpoint.digest(found) == wanted
    assert refusals > 30


def test_two_runs_into_one_folder_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that trains, every command beside it, and the folder free again when that process is killed."""
    out, finished = place / "run", place / "finished"
    out.rename(finished)
    command = [sys.executable, "-m", "raccgan.train", *TINY_OPTIONS, "--gan-steps=100000", "--out", str(out)]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / NAME).exists():
            assert training.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        images = place / "images"
        for module, arguments in (
            (train, ["--resume", out]),
            (evaluate, [out]),
            (calibrate, [out, images, "--threshold", "1"]),
            (detect, [finished, images, "--out", out]),
            (generate, [out, "--out", out, "--against", "digits"]),
            (export, [finished, "--format", "torch", "--out", out]),
        ):
            line = refused(capsys, module, *arguments)
            assert f"another run is writing into {out}: wait for it, or name another" in line, module
        assert training.poll() is None
    finally:
        training.send_signal(signal.SIGKILL)
        training.wait()
    assert (out / LOCK).exists(), "the killed process had no time to remove it"
    steps = checkpoint.load(out).steps["gan"]
    assert run(train, "--resume", out, "--gan-steps", steps + 1) == 0, "a killed run holds nobody up"
    assert not (out / LOCK).exists()


def test_what_another_run_wrote_in_between_is_not_overwritten(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the reading of the checkpoint and the lock, a run ends in the same folder."""
    prepare = importlib.import_module("raccgan.training.run").prepare

    def slowly(*arguments: object) -> object:
        content = (place / "run" / NAME).read_bytes()
        (place / "run" / "newer").write_bytes(content)
        os.replace(place / "run" / "newer", place / "run" / NAME)
        return prepare(*arguments)

    monkeypatch.setattr("raccgan.training.run.prepare", slowly)
    line = refused(capsys, train, "--resume", place / "run", "--gan-steps", 9)
    assert "another run has written into" in line
    assert "give the command again" in line


def test_the_lock_of_a_folder(tmp_path: Path) -> None:
    """Free again afterwards, free of what a killed run left, and no folder stays that was made for nothing."""
    folder = tmp_path / "a" / "b"
    with own_folder(folder, ["maps"]):
        (folder / "maps").mkdir()
    assert not (tmp_path / "a").exists()
    (folder / "maps").mkdir(parents=True)
    for name in (f".{'0' * 16}.part", f"maps/.{'a' * 16}.part", LOCK):
        (folder / name).write_text("left by a killed run")
    for name in ("scores.part", ".mine.part", f".{'0' * 16}.part.txt"):
        (folder / name).write_text("of somebody else")
    with (
        own_folder(folder, ["maps"]),
        pytest.raises(InputError, match="another run is writing into"),
        own_folder(folder),
    ):
        raise AssertionError("two runs have it")
    assert sorted(contents(folder)) == [f".{'0' * 16}.part.txt", ".mine.part", "scores.part"]
    with own_folder(folder) as held:
        write_text(held / "result.json", "{}")
    assert (folder / "result.json").exists()


def test_a_lock_whose_file_has_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before ends, and removes the file, between our opening and our locking of it; twice."""
    flock, calls = fcntl.flock, 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / LOCK).unlink()
        elif calls == 2:
            (tmp_path / LOCK).unlink()
            (tmp_path / LOCK).touch()  # a third run is quicker
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with own_folder(tmp_path), pytest.raises(InputError, match="another run is writing into"), own_folder(tmp_path):
        raise AssertionError("two runs have it")
    assert calls == 4


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_somebody_laid_is_not_followed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").write_text("kept")
    if kind == "link":
        (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(tmp_path / LOCK)
    else:
        (tmp_path / LOCK).mkdir()
    with pytest.raises(InputError, match=f"cannot write .*{LOCK}: .*; name a place"), own_folder(tmp_path):
        raise AssertionError("it was taken")
    assert (tmp_path / "precious").read_text() == "kept"
