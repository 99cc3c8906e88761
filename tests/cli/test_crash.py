"""Training killed without warning, at random moments and in the middle of a write, ends where an undisturbed run does.

The ordinary run kills a few times; ``pytest tests/cli/test_crash.py --kills 50 -rP`` is the long one, and prints its
table.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import train
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import NAME, Checkpoint
from raccgan.outputs.files import LOCK, stamp
from raccgan.training.places import SETTINGS
from tests.cli.test_commands import run
from tests.cli.test_detect import same_bits
from tests.conftest import TINY_OPTIONS

ROOT = Path(__file__).parents[2]
STEPS = 60
OPTIONS = [*TINY_OPTIONS, f"--gan-steps={STEPS}", f"--encoder-steps={STEPS}", "--checkpoint-every=5"]
AIMS = ("writing", "training", "writing", "training", "anything")
"""What the kills are aimed at, in turn: the writing of a file, the second after training has begun, any time from the
start of Python to the last picture."""


def start(out: Path) -> subprocess.Popen[bytes]:
    """Train into a folder, or go on where a killed run left off; nothing is known but what lies there."""
    goes_on = (out / NAME).exists() or (out / SETTINGS).exists()
    return command("train", *(["--resume", out] if goes_on else [*OPTIONS, "--out", out]))


def command(name: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", f"raccgan.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill when that time is over; False where the process ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -signal.SIGKILL


def kill_in_training(process: subprocess.Popen[bytes], out: Path, seconds: float) -> bool:
    """Kill that long after the process has written its settings, which it does right before it trains."""
    before = stamp(out / SETTINGS)
    while process.poll() is None and stamp(out / SETTINGS) == before:
        time.sleep(0.001)
    return kill_after(process, seconds)


def kill_in_a_write(process: subprocess.Popen[bytes], out: Path, skip: int, size: int) -> bool:
    """Kill while a file is being written: not before a number of files was, and when it has that many bytes.

    The process is held still first, so that the file is half-written for certain when it is killed.
    """
    seen: set[str] = set()
    while process.poll() is None:
        parts = list(out.glob(".*.part"))
        seen |= {part.name for part in parts}
        if len(seen) <= skip or not any(has_bytes(part, size) for part in parts):
            continue
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if any(part.exists() for part in parts):
            process.kill()
            break
        process.send_signal(signal.SIGCONT)
    return process.wait() == -signal.SIGKILL


def has_bytes(path: Path, size: int) -> bool:
    found = stamp(path)
    return found is not None and found[1] >= size


def stored(out: Path) -> Checkpoint | None:
    """The folder's checkpoint, whole or not there."""
    return checkpoints.load(out) if (out / NAME).exists() else None


def moment(found: Checkpoint | None, out: Path) -> str:
    """Where the process was when it was killed, as far as its folder shows."""
    if parts := list(out.glob(".*.part")):
        written = parts[0].read_bytes()
        if written[8:].startswith(b'{"__metadata__"'):
            return "writing a checkpoint"
        return "writing another file" if written else "writing a file, none of it on the disk yet"
    if found is None:
        return "before the first checkpoint"
    if found.threshold is not None:
        return "scoring and drawing"
    return "training the encoder" if found.steps["encoder"] else "training generator and discriminator"


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_it_ends_with_the_same_weights(
    tmp_path: Path, pytestconfig: pytest.Config, seed: int
) -> None:
    kills: int = pytestconfig.getoption("kills")
    draw, moments, runs = random.Random(seed), Counter[str](), 0
    begun = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stdout.read() if whole.stdout else ""
    seconds = time.monotonic() - begun
    wanted, length = checkpoints.load(tmp_path / "whole"), (tmp_path / "whole" / NAME).stat().st_size
    while moments.total() < kills:
        out, before = tmp_path / f"killed-{runs}", -1
        runs += 1
        ended = False
        while not ended:
            process = start(out)
            aim = AIMS[moments.total() % len(AIMS)] if moments.total() < kills else "nothing"
            if aim == "writing":
                killed = kill_in_a_write(process, out, draw.randrange(1, 6), draw.randrange(length))
            elif aim == "training":
                killed = kill_in_training(process, out, draw.uniform(0, 1))
            else:
                killed = aim == "anything" and kill_after(process, draw.uniform(0.3, seconds))
            said, _ = process.communicate()
            ended = process.returncode == 0
            assert ended or killed, said.decode()
            found = stored(out)
            done = sum(found.steps.values()) if found else 0
            assert done >= before, "steps were lost that had been saved"
            before = done
            if killed:
                moments[moment(found, out)] += 1
        same_as(wanted, out, tmp_path / "whole")
    assert any(name.startswith("writing") for name in moments), moments
    print(f"{moments.total()} kills in {runs} runs, each ended with the weights of the undisturbed run; killed while")
    for name, count in moments.most_common():
        print(f"{count:4} {name}")


def same_as(wanted: Checkpoint, out: Path, whole: Path) -> None:
    """Bit for bit the checkpoint, the table and the metrics of the undisturbed run, and nothing else left behind."""
    found = checkpoints.load(out)
    for name in ("networks", "optimisers", "steps", "history", "held_out"):
        same_bits(getattr(wanted, name), getattr(found, name))
    assert found.threshold == wanted.threshold
    assert (out / "scores.csv").read_bytes() == (whole / "scores.csv").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert not (out / LOCK).exists()


@pytest.mark.long
def test_detection_killed_again_and_again_ends_with_the_same_files(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Two hundred images with maps, overlays and a page; killed while scores, maps and tables are written."""
    kills, killed = max(1, pytestconfig.getoption("kills") // 5), 0
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(200):
        Image.fromarray(draw.integers(0, 256, (9, 9), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    assert run(train, "--out", tmp_path / "run", *TINY_OPTIONS) == 0
    arguments = [tmp_path / "run", tmp_path / "images", "--score-batch", 20, "--maps", "--overlays", "--report"]
    begun = time.monotonic()
    assert command("detect", *arguments, "--out", tmp_path / "whole").wait() == 0
    seconds, wanted = time.monotonic() - begun, files_of(tmp_path / "whole")
    while killed < kills:
        out = tmp_path / f"killed-{killed}"
        while kill_in_detection(command("detect", *arguments, "--out", out), out, draw.uniform(0, seconds / 3)):
            killed += 1
            if killed == kills:
                break
        process = command("detect", *arguments, "--out", out)
        said, _ = process.communicate()
        assert process.returncode == 0, said.decode()
        assert files_of(out) == wanted


def kill_in_detection(process: subprocess.Popen[bytes], out: Path, seconds: float) -> bool:
    """Kill that long after this process has begun its rows."""
    before = stamp(out / "scores.part")
    while process.poll() is None and stamp(out / "scores.part") == before:
        time.sleep(0.001)
    return kill_after(process, seconds)


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
