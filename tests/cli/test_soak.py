"""What runs for long stays as it was: resident memory, open files and threads, over steps, over images, over calls.

The ordinary run takes a few hundred steps; ``--long`` many thousand, and scores 100,000 images.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raccgan import train
from raccgan.scoring.detector import Detector
from raccgan.training.loop import Training
from raccgan.training.run import Run
from tests.cli.test_commands import run
from tests.conftest import DETECTED, SOAK_STEPS, TINY_OPTIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")

LEAK = 64
"""Bytes a step that memory may grow by in a long run: less than any object or tensor that a step could leave behind."""

SLACK = 2**20
"""Bytes by which memory comes and goes, whatever the steps: what a short run cannot tell from a leak."""

A_ROW = 2500
"""Bytes an image that ``detect`` may keep: its path and its row of numbers, and no image, which has 4 KiB here."""


def resident() -> int:
    """Bytes of this process in memory, less what C's allocator holds back: a leak would fill that first."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    """Open files, threads of Python and of libraries, and living tensors."""
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python's threads": threading.active_count(),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
    }


@dataclass
class Watch:
    """Memory at a hundred steps, and what is held after the warm-up and at the last step."""

    steps: int
    done: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)  # steps done, and bytes
    held: list[dict[str, int]] = field(default_factory=list)

    def step(self) -> None:
        if self.done in (self.steps // 3, self.steps - 1):
            self.held.append(held())
        if self.done >= self.steps // 3 and self.done % max(1, self.steps // 150) == 0:
            self.memory.append((self.done, resident()))
        self.done += 1

    def finish(self, what: str) -> None:
        """The slope of a line through the later two thirds, which the warm-up of allocators and caches is not in."""
        before, now = self.held
        assert now == before, f"{what}: {', '.join(n for n in now if now[n] != before[n])} are left behind"
        at, bytes_then = np.array(self.memory, float).T
        slope = float(np.polyfit(at, bytes_then, 1)[0])
        later = int(at[-1] - at[0])
        grown = slope * later
        print(
            f"{what}: {self.steps} steps, {slope:.1f} bytes a step after the first third, "
            f"{grown / 2**20:.2f} MiB in all, of {bytes_then[-1] / 2**20:.0f}"
        )
        assert grown < SLACK + LEAK * later, f"{what}: memory grows by {slope:.0f} bytes a step"


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> int:
    return SOAK_STEPS["long" if request.config.getoption("--long") else "short"]


@pytest.mark.parametrize("phase", ["gan", "encoder"])
def test_training_steps_leave_nothing_behind(tiny: Callable[..., tuple[Run, Training]], steps: int, phase: str) -> None:
    """With the penalty, the loss curves and the checkpoints of a real run."""
    _, training = tiny(gan_steps=steps, encoder_steps=steps, checkpoint_every=steps // 10)
    watch = Watch(steps)
    name = f"{phase}_step"
    compute = getattr(training, name)

    def watched(*arguments: object) -> object:
        watch.step()
        return compute(*arguments)

    setattr(training, name, watched)
    training.run(phase)
    watch.finish(f"training, {phase}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on images of 32 px, so that an image that is kept shows beside a row of numbers."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--image-size=32", "--multipliers=1,1,1,1", "--normal=3"]
    assert run(train, "--out", out, *TINY_OPTIONS, *options) == 0
    return out


def written(folder: Path, count: int) -> Path:
    """So many images of 8 x 8 pixels in folders of a thousand."""
    draw = np.random.default_rng(0)
    for start in range(0, count, 1000):
        inside = folder / f"{start // 1000:03}"
        inside.mkdir(parents=True)
        for i in range(start, min(count, start + 1000)):
            Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(inside / f"{i:06}.png")
    return folder


def test_scoring_again_and_again_leaves_nothing_behind(trained: Path, tmp_path: Path, steps: int) -> None:
    """Files decoded in threads and scored in passes, one file of which is none."""
    images = written(tmp_path / "images", 10)
    (images / "000" / "broken.png").write_bytes(b"\x89PNG")
    files = sorted(images.rglob("*.png"))
    detector = Detector.load(trained)
    watch = Watch(steps // 3)
    for _ in range(watch.steps):
        watch.step()
        assert len(list(detector.scan(files))) == 11
    watch.finish("scoring 11 files")


def test_what_detect_keeps_of_an_image(trained: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Peak memory of the command for a few images and for many: they are streamed, a row of numbers of each remains."""
    few, many = DETECTED["long" if request.config.getoption("--long") else "short"]
    peaks = {}
    for count in (few, many):
        images = written(tmp_path / f"images-{count}", count)
        out = tmp_path / f"detected-{count}"
        peaks[count], seconds = _peak([trained, images, "--out", out])
        assert (out / "scores.csv").read_text().count("\n") == count + 1
        print(f"detect: {count} images, peak {peaks[count] / 2**20:.0f} MiB, {count / seconds:.0f} images a second")
    grown = peaks[many] - peaks[few]
    print(f"detect: {grown / (many - few):.0f} bytes an image")
    assert grown < 4 * SLACK + A_ROW * (many - few), f"{grown / (many - few):.0f} bytes an image"


def _peak(arguments: list[object]) -> tuple[int, float]:
    """Bytes at most in memory, and seconds of the processor, of ``detect`` in a process of its own."""
    code = (
        "import sys, time; from raccgan import detect; assert detect.main(sys.argv[1:]) == 0\n"
        # Unlike getrusage's, this peak does not begin with that of the process that started this one.
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(peak, time.process_time())"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said = subprocess.check_output(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    peak, seconds = said.splitlines()[-1].split()
    return int(peak) * 1024, float(seconds)


LEAKS: dict[str, Callable[[threading.Event], object]] = {
    "memory": lambda end: bytearray(b"x" * 16384),
    "files": lambda end: socket.socket(),
    "tensors": lambda end: torch.zeros(()),
    "Python's threads": lambda end: _waiting(end),
}


def _waiting(end: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=end.wait)
    thread.start()
    return thread


@pytest.mark.parametrize("leak", LEAKS)
def test_the_watch_notices(leak: str) -> None:
    """What these tests rest on: a step that leaves one thing behind, or 16 KiB."""
    watch, end, kept = Watch(300), threading.Event(), []
    for step in range(watch.steps):
        watch.step()
        if leak == "memory" or step == 200:
            kept.append(LEAKS[leak](end))
    try:
        with pytest.raises(AssertionError, match="memory grows" if leak == "memory" else leak):
            watch.finish(leak)
    finally:
        end.set()
