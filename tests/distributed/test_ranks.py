"""Several ranks compute what one process does; a rank that is gone ends the others with one line each.

Ranks are processes with torchrun's environment, or torchrun's own where its part is tested; gloo, one thread each.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from raccgan import detect, evaluate, train
from raccgan.cli import options
from raccgan.distributed import ranks
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import NAME
from raccgan.training.places import JOB
from tests.cli.test_commands import run, shapes
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SETTINGS = TINY | {"critic_steps": 2, "gan_steps": 9, "encoder_steps": 9}


def arguments(**settings: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | settings).items()]


def environment(**variables: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {n: str(v) for n, v in variables.items()}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(*command: object, **variables: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process with what follows ``python``, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def two(*command: object) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks of one job to their end."""
    port = free_port()
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    *command,
                    RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2,
                    MASTER_ADDR="localhost", MASTER_PORT=port,
                )
            )
            for rank in range(2)
        ]  # fmt: skip
        return [
            subprocess.CompletedProcess(p.args, p.returncode, out, err)
            for p in processes
            for out, err in [p.communicate(timeout=120)]
        ]


def succeed(*command: object) -> list[subprocess.CompletedProcess[str]]:
    done = two(*command)
    assert [one.returncode for one in done] == [0, 0], "".join(one.stderr for one in done)
    return done


def errors(done: list[subprocess.CompletedProcess[str]]) -> list[list[str]]:
    """The lines of each rank that are errors; nothing else but them may look like one."""
    said = "".join(one.stderr for one in done)
    assert "Traceback" not in said, said
    assert "terminate called" not in said, said
    return [[line for line in one.stderr.splitlines() if line.startswith("error: ")] for one in done]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, to its end."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run(train, "--out", out, *arguments()) == 0
    return out


def assert_same_losses(ours: Path, theirs: Path) -> None:
    """Within a relative 1e-3, and 1e-2 in the second phase: sums are added in another order.

    Weights that were changed by 3e-8 made up to 2e-3 of a difference to a single process in as many steps.
    """
    got, wanted = (checkpoints.load(folder).history for folder in (ours, theirs))
    assert got.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in got[name]] == [step for step, _ in points]
        for (step, value), (_, expected) in zip(got[name], points, strict=True):
            tolerance = 1e-2 if name in ("image", "feature") else 1e-3
            assert value == pytest.approx(expected, rel=tolerance, abs=1e-4), (name, step)


# ---- what is computed -----------------------------------------------------------------------------------------------


def test_norms_gradients_and_messages() -> None:
    """In float64, each layer that couples samples: outputs' gradients on every rank, and a gradient of a gradient."""
    assert all("checked" in one.stderr for one in succeed("-m", "tests.distributed.rank_checks"))


def test_two_ranks_train_as_one_process_does_and_one_of_them_writes(alone: Path, tmp_path: Path) -> None:
    """Two ranks, then one process, then two ranks again to the end of the run."""
    out = tmp_path / "run"
    succeed("-m", "raccgan.train", "--out", out, *arguments(gan_steps=4), "--phase", "gan")
    assert run(train, "--resume", out, *arguments(gan_steps=7), "--phase", "gan") == 0
    first, second = succeed("-m", "raccgan.train", "--resume", out, *arguments())
    assert_same_losses(out, alone)
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert "image AUROC" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")


@pytest.mark.long
def test_evaluate_gives_the_files_of_one_process(alone: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    command = [alone, "--quantile", "0.9", "--report", "--score-batch", "40"]
    succeed("-m", "raccgan.evaluate", *command, "--out", ours)
    assert run(evaluate, *command, "--out", theirs) == 0
    assert_same_files(ours, theirs)


def test_detect_gives_the_files_of_one_process(alone: Path, tmp_path: Path) -> None:
    """A number of batches that does not divide, the last of them short."""
    shapes(tmp_path, ["some"], 23)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    command = [alone, tmp_path / "some", "--maps", "--overlays", "--report"]
    command += ["--score-batch", "40"]  # under each of 5 classes: 8 images
    succeed("-m", "raccgan.detect", *command, "--out", ours)
    assert run(detect, *command, "--out", theirs) == 0
    assert_same_files(ours, theirs)


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file()) == names
    assert names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_what_does_not_divide_is_refused() -> None:
    job = Collectives(rank=1, world=3)
    job.require_divisible(6)
    with pytest.raises(InputError, match=r"--batch-size 8 .* does not divide among 3 ranks: take 6 or 9"):
        job.require_divisible(8)
    with pytest.raises(InputError, match=r"take 3$"):
        job.require_divisible(2)
    assert job.own(list(range(12)), 6) == [2, 3, 8, 9]
    assert job.own_rows(torch.arange(6)).tolist() == [2, 3]


def test_the_place_in_the_environment() -> None:
    assert ranks.place_in({}) == ranks.place_in({"WORLD_SIZE": "1"}) == ranks.Place()
    whole = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert ranks.place_in(whole) == ranks.Place(rank=3, world=4, local_rank=1, local_world=2)
    with pytest.raises(InputError, match="start with torchrun, or unset it"):
        ranks.place_in({"WORLD_SIZE": "4", "RANK": "3"})


# ---- what goes wrong ------------------------------------------------------------------------------------------------

WITH_A_FAULT = """
import os, signal, sys, time, torch
from raccgan import train
from raccgan.cli import options
from raccgan.training.steps import Steps

compute = Steps.gan_step

def faulty(self, step, x, y):
    if step == 3 and self.job.rank == 1:
        FAULT
    return compute(self, step, x, y)

Steps.gan_step = faulty
sys.exit(options.call(train.main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("fault", "statuses", "lines"),
    [
        ("x = torch.full_like(x, torch.nan)", [2, 2], ["", "gan step 4: losses are .*nan.* of gan step 3"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", [2, -9], ["rank 0: rank 1 was lost", ""]),
        # The silent one finds rank 0 waiting for it, or gone.
        pytest.param(
            "time.sleep(60)",
            [2, 2],
            ["rank 0: another rank does not answer", "rank 1: (another rank does not answer|rank 0, or torchrun)"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["not finite", "killed", "silent"],
)
def test_a_fault_of_one_rank_ends_all_with_one_line(
    tmp_path: Path, fault: str, statuses: list[int], lines: list[str]
) -> None:
    code = WITH_A_FAULT.replace("FAULT", fault)
    patience = ["--rank-timeout", 10] if "sleep" in fault else []
    done = two("-c", code, "--out", tmp_path / "run", *arguments(), *patience)
    assert [one.returncode for one in done] == statuses
    said = errors(done)
    if lines[0] == "":
        said.sort()  # all know of it, and whoever is the first to say it does
    for found, wanted in zip(said, lines, strict=True):
        assert len(found) == (wanted != ""), said
        assert re.search(wanted, "".join(found)), said
    assert checkpoints.load(tmp_path / "run").steps["gan"] == 3
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.long
def test_torchrun_starts_a_run_again_which_goes_on(tmp_path: Path) -> None:
    """Killed after the first checkpoint; the second start finds folder and checkpoint, and ends as it would have."""
    settings = [*arguments(critic_steps=1, gan_steps=60, checkpoint_every=10), "--phase", "gan"]
    out = tmp_path / "run"
    assert run(train, "--out", tmp_path / "alone", *settings) == 0
    with started(*TORCHRUN, "--max-restarts", 1, "-m", "raccgan.train", "--out", out, *settings) as job:
        wait_for(lambda: (out / NAME).exists())
        os.kill(pid_of(job, rank=1), signal.SIGKILL)
        said = job.communicate(timeout=120)[1]
    assert job.returncode == 0, said
    assert "error: rank 0: rank 1 was lost" in said
    assert said.count("error: rank") == 1
    assert "started again, and goes on from" in said
    ended = checkpoints.load(out)
    assert ended.steps["gan"] == 60
    for name, points in checkpoints.load(tmp_path / "alone").history.items():
        assert [step for step, _ in ended.history[name]] == [step for step, _ in points], "a step is there twice"
        for (_, value), (_, expected) in zip(ended.history[name][:30], points[:30], strict=True):
            assert value == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert not (out / JOB).exists()


@pytest.mark.long
def test_sigterm_to_torchrun_leaves_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(*TORCHRUN, "-m", "raccgan.train", "--out", out, *arguments(gan_steps=5000)) as job:
        wait_for(lambda: (out / NAME).exists())
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=60)[1]
    found = re.findall(r"^stopped after gan step (\d+); --resume \S+ continues$", said, re.MULTILINE)
    assert len(found) == 1, said
    assert checkpoints.load(out).steps["gan"] == int(found[0])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pid_of(job: subprocess.Popen[str], rank: int) -> int:
    """The process that torchrun started as this rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def test_another_job_does_not_take_a_run_over(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (alone / JOB).write_text("one")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert options.call(train.main, ["--out", str(alone), *arguments()]) == 2
    assert "holds a run already" in capsys.readouterr().err
    (alone / JOB).unlink()


def test_one_process_joins_nothing() -> None:
    assert ranks.join(torch.device("cpu"), 1) is SINGLE
    assert (SINGLE.rank, SINGLE.world, SINGLE.first) == (0, 1, True)
    ranks.leave()
