"""Detectors in other people's processes: pickled, copied, forked, in containers with a quota, and on other systems."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import raccgan
from raccgan import Detector, InputError, train
from raccgan.data import cpus
from raccgan.data.images import opening
from raccgan.models import devices
from tests.cli.test_commands import run
from tests.conftest import CPU, TINY_OPTIONS

PIXELS = np.random.default_rng(3).integers(0, 256, (40, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return Detector.load(trained, score_batch=40, quantile=0.5)


def scores(detector: Detector) -> list[tuple[float, float, tuple[object, ...] | None]]:
    return [(r.score, r.threshold, r.boxes) for r in detector.score(PIXELS)]


def test_a_pickled_or_copied_detector_scores_alike_without_its_run(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    detector = Detector.load(moved, score_batch=40, quantile=0.5, pixel_threshold=0.2, label_policy="3")
    expected = scores(detector)
    (moved / "checkpoint.safetensors").unlink()
    for other in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector), copy.copy(detector)):
        assert scores(other) == expected
        assert (other.threshold, other.pixel_threshold) == (detector.threshold, 0.2)
        assert other.scorer.label_policy == "3"
        assert other.config == detector.config


def in_a_child(method: str, detector: Detector, most: float = 60) -> list[object]:
    """The scores that a child of this process comes to; a failure where it takes too long."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=answer, args=(queue, detector), daemon=True)
    child.start()
    try:
        return queue.get(timeout=most)
    finally:
        child.kill()
        child.join()


def answer(queue: multiprocessing.Queue[object], detector: Detector) -> None:
    queue.put(scores(detector))


def test_a_spawned_process_gets_a_detector(detector: Detector) -> None:
    assert in_a_child("spawn", detector) == scores(detector)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_scores_after_its_parent_has_with_two_threads(detector: Detector) -> None:
    """Without the one thread of the child this hangs: its parent's two are not there."""
    torch.set_num_threads(2)
    try:
        large = torch.rand(64, 64, 64, 64)
        torch.nn.functional.conv2d(large, torch.rand(64, 64, 3, 3))  # both threads have worked
        expected = scores(detector)
        assert in_a_child("fork", detector) == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_a_forked_child_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_forked", True)
    with pytest.raises(
        InputError, match="a GPU does not work in a forked process: start processes by the method spawn"
    ):
        devices.settle(torch.device("cuda"))
    with pytest.raises(InputError, match=r"torch\.compile does not work in a forked process"):
        devices.settle(CPU, compiled=True)
    devices.settle(CPU)
    assert not devices._forked


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_pixels_that_the_parent_decodes_take_no_room_in_a_forked_child() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with opening.room(opening.MOST_PIXELS):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        with opening.room(1):
            os._exit(7)
    end = time.monotonic() + 30
    try:
        done, status = 0, 0
        while done == 0 and time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        assert done == child, "the child waits for a thread of its parent"
        assert os.waitstatus_to_exitcode(status) == 7
    finally:
        leave.set()
        thread.join()
        if done == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "400000 100000"}, 2),
        ("0::/gone\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("4:cpu,cpuacct:/docker/x\n0::/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "250000"}, 3),
        ("4:cpuacct,cpu:/docker/x\n", {"cpu/docker/x/cpu.cfs_quota_us": "100000"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1"}, 1 << 20),
        ("nonsense\n", {}, 1 << 20),
        ("0::/\n", {"cpu.max": "much"}, 1 << 20),
    ],
)
def test_the_quota_of_a_container_is_seen(tmp_path: Path, membership: str, files: dict[str, str], wanted: int) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if name.endswith("quota_us"):
            path.with_name("cpu.cfs_period_us").write_text("100000")
    assert cpus.quota_cpus(tmp_path / "groups", tmp_path / "cgroup") == wanted


def test_commands_use_no_more_threads_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    from raccgan.cli import options

    monkeypatch.setattr(cpus, "quota_cpus", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(3)
    try:
        options.settle_libraries()
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        options.settle_libraries()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("lacks", ["sys.modules['fcntl'] = None", "del os.sched_getaffinity"])
def test_another_system_is_refused_in_one_line(lacks: str) -> None:
    code = f"import os, sys\n{lacks}\ntry: import raccgan\nexcept ImportError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("raccgan runs on Linux alone"), done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("settled", [True, False])
def test_a_user_without_a_name_and_a_home_gets_no_note_of_matplotlibs(settled: bool) -> None:
    """As a container's ``--user 12345``: nothing knows the user, and no home can be written."""
    code = (
        "import os, pwd\n"
        "def nobody(*_): raise KeyError('uid not found')\n"
        "pwd.getpwuid = nobody\n"
        f"from raccgan.cli import options\nif {settled}: options.settle_libraries()\n"
        "from raccgan.outputs import figures, pictures\nprint(pictures.plain('drawn'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME", "MPLCONFIGDIR")}
    environment |= {"XDG_CACHE_HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "/proc/nowhere", "PYTHONPATH": os.getcwd()}
    arguments = [sys.executable, "-c", code]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.stdout == "drawn\n", done.stderr
    assert ("atplotlib" in done.stderr) == (not settled)


def test_the_way_out_of_a_name_that_leads_nowhere_is_said() -> None:
    from raccgan.distributed import ranks

    for said in (
        "[enforce fail] unable to resolve hostname to a (local) address",
        "getaddrinfo: Name does not resolve",
    ):
        assert "GLOO_SOCKET_IFNAME" in ranks._mend(RuntimeError(said))
    assert ranks._mend(RuntimeError("rank 1 has not come")) == ""
    assert raccgan.__version__
