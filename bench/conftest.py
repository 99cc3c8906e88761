"""Options, the ceilings, and what happens when all cases are measured: the table, and the files when asked."""

from __future__ import annotations

import logging
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, results
from bench.measure import Case, Compare, Contestant, Outputs, compare
from bench.results import Row
from bench.roofline import Ceilings, measure_ceilings
from raccgan.cli.memory import keep_freed

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

_ROWS = pytest.StashKey[list[Row]]()
_CEILINGS = pytest.StashKey[dict[str, Ceilings]]()
_JUDGED = pytest.StashKey[dict[str, list[results.Judged]]]()
_SAVED = pytest.StashKey[list[Path]]()
_LOAD = pytest.StashKey[str]()
_KEPT = pytest.StashKey[bool]()
_BEGUN = pytest.StashKey[float]()
_LEFT_OUT = pytest.StashKey[Counter[str]]()
_THREADS = torch.get_num_threads()  # before the tests' own conftest, run together with this one, lowers it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmarks of raccgan")
    group.addoption("--full", action="store_true", help="every case, not only the representative ones")
    group.addoption("--save-results", action="store_true", help="write bench/results/<device>.csv, .png and .txt")
    group.addoption("--save-as", default="", metavar="NAME", help="the same, of some cases, as <device>-NAME")
    group.addoption(
        "--minutes", type=float, metavar="M", help="begin no case after so many; each file's first ones come first"
    )
    group.addoption(
        "--skip-measured", action="store_true", help="leave out what a saved table of the device has: to go on there"
    )
    group.addoption(
        "--threads", type=int, default=_THREADS,
        help="of PyTorch on the CPU (default: %(default)s); 1 on a machine that is not quiet, it then counts the "
        "processor's time, which other processes hardly disturb",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that runs with --full only")
    config.addinivalue_line("markers", "large: a benchmark sized for a GPU, and run on no other device")
    config.addinivalue_line("markers", "published: the training step and the scorer at the published widths")
    config.stash[_KEPT] = keep_freed()  # as the commands do; for all contestants, which share the process
    config.stash[_ROWS], config.stash[_CEILINGS], config.stash[_LOAD] = [], {}, machine.load()
    config.stash[_JUDGED], config.stash[_SAVED] = {}, []
    config.stash[_BEGUN], config.stash[_LEFT_OUT] = time.monotonic(), Counter()
    # Its table shows rounds of all contestants together, which says nothing; ours is printed instead.
    config.option.benchmark_quiet = True
    # torch.compile's trace is hundreds of lines a case, which pytest would show with every failure.
    logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = config.getoption("full")
    config.hook.pytest_deselected(items=[item for item in items if not _wanted(item, full)])
    items[:] = [item for item in items if _wanted(item, full)]
    if config.getoption("minutes") is not None:
        items.sort(key=_place(items).__getitem__)


def _place(items: Sequence[pytest.Item]) -> dict[pytest.Item, int]:
    """A benchmark's place in its file; what is no benchmark comes before them all."""
    seen: Counter[Path] = Counter()
    place = {}
    for item in items:
        ours = Path(__file__).parent in item.path.parents
        place[item] = seen[item.path] if ours else -1
        seen[item.path] += 1
    return place


def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("minutes")
    if minutes is not None and time.monotonic() - item.config.stash[_BEGUN] > 60 * minutes:
        _leave_out(item.config, f"not begun after {minutes:g} minutes")


def _leave_out(config: pytest.Config, why: str) -> None:
    config.stash[_LEFT_OUT][why] += 1
    pytest.skip(why)


def _wanted(item: pytest.Item, full: bool) -> bool:
    if item.get_closest_marker("large") and not item.get_closest_marker("gpu"):
        return False
    return full or not item.get_closest_marker("full")


@contextmanager
def _as_users_set_it_up(config: pytest.Config) -> Iterator[None]:
    threads, tuned = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(config.getoption("threads"))
    torch.backends.cudnn.benchmark = True
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = tuned


@pytest.fixture(params=[pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in DEVICES])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device there is; its ceilings are measured at its first case."""
    name: str = request.param
    with _as_users_set_it_up(request.config):
        if name not in request.config.stash[_CEILINGS]:
            request.config.stash[_CEILINGS][name] = measure_ceilings(name)
        yield name


@pytest.fixture
def measured(benchmark: Any, request: pytest.FixtureRequest) -> Compare:
    """Check and time the contestants of a case, and keep their rows for the table."""

    def run(case: Case, contestants: Sequence[Contestant], wanted: Outputs) -> list[Row]:
        if request.config.getoption("skip_measured") and case.key in results.saved(case.device):
            _leave_out(request.config, "in a saved table already")
        marks = {mark.name for mark in request.node.iter_markers()}
        representative = "full" not in marks or "published" in marks
        rows = compare(benchmark, case, contestants, wanted, seconds=1.5)
        rows = [replace(row, representative=representative) for row in rows]
        request.config.stash[_ROWS].extend(rows)
        return rows

    return run


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Judge all rows by ceilings measured once more, and write the files: also when a case failed, and it says so."""
    config, stash = session.config, session.config.stash
    run = results.Run(
        command="pytest " + shlex.join(config.invocation_params.args),
        verdict=", ".join(
            [
                f"{session.testscollected} cases, {session.testsfailed} failed",
                *(f"{count} {why}" for why, count in stash[_LEFT_OUT].items()),
                f"exit status {int(exitstatus)}",
            ]
        ),
        load=stash[_LOAD],
        kept=stash[_KEPT],
    )
    for device in {row.device: None for row in stash[_ROWS]}:
        with _as_users_set_it_up(config):
            ceilings = stash[_CEILINGS][device] = stash[_CEILINGS][device].at_best(measure_ceilings(device))
            judged = results.judge((row for row in stash[_ROWS] if row.device == device), ceilings)
            stash[_JUDGED][device] = judged
            name = config.getoption("save_as")
            if name or config.getoption("save_results"):
                stash[_SAVED].append(results.save(name, device, judged, ceilings, run))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    for device, judged in config.stash[_JUDGED].items():
        terminalreporter.section(f"benchmarks on {machine.model(device)}")
        for line in results.table(judged):
            write(line)
        write("")
        write("* what --kernels fused picks; x peer: the best peer's time over this one's")
        for line in results.means(judged):
            write(line)
        for j in results.losing(judged):
            write(f"loses: {' '.join(j.row.key)}: {j.versus:.2f} of the best peer's speed")
    for path in config.stash[_SAVED]:
        write(f"saved {path.with_suffix('')}.csv, .png and .txt")
