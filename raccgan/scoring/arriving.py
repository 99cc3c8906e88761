"""Images as they arrive: files that appear in a folder, and paths that another program writes, scored until stopped."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from raccgan.data.listing import list_files
from raccgan.data.samples import printable
from raccgan.errors import InputError
from raccgan.outputs.files import stamp
from raccgan.outputs.journal import Journal, Row
from raccgan.outputs.terminal import say
from raccgan.scoring.detector import Detector
from raccgan.scoring.score_files import Wanted, score_files

POLL = 0.5  # seconds between two looks into a folder: a file is taken when it has not changed from one to the next
WAIT = 0.1  # seconds after which a pipe that is silent is asked whether to stop

Stopped = Callable[[], bool]


def in_folder(folder: Path, out: Path, known: Iterable[Row], stopped: Stopped) -> Iterator[list[Path]]:
    """The images below ``folder`` as they arrive or change, those of each look together, until ``stopped``.

    A file that is still being written is waited for. Results of ours, masks and the folder ``out`` are left out. What
    has not changed since ``known``, rows of a journal, is not given again.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {printable(folder)} to follow: name the one that images arrive in")
    given = {row["path"]: row["stamp"] for row in known}
    before: dict[Path, list[int]] = {}
    said: set[str] = set()
    while not stopped():
        problems: list[str] = []
        now = {path: list(found[1:]) for path in list_files(folder, problems, but=out).images if (found := stamp(path))}
        for problem in (problem for problem in problems if problem not in said):
            say(f"skipped: {problem}")
        said |= set(problems)
        settled = [p for p, its in now.items() if before.get(p) == its and given.get(printable(p)) != its]
        before = now
        given |= {printable(path): now[path] for path in settled}
        if settled:
            yield settled
        end = time.monotonic() + POLL
        while time.monotonic() < end and not stopped():
            time.sleep(WAIT / 2)


def from_pipe(pipe: IO[bytes], separator: bytes, stopped: Stopped) -> Iterator[list[Path]]:
    """The paths that come through a pipe, those that are there at a time together, until its end or ``stopped``.

    ``separator`` ends a path: a line's end, or NUL. Empty ones are passed over.
    """
    rest, open_ = b"", True
    while open_ and not stopped():
        if not select.select([pipe], [], [], WAIT)[0]:
            continue
        read = os.read(pipe.fileno(), 1 << 16)
        open_ = bool(read)
        *whole, rest = (rest + read).split(separator) if open_ else (rest, b"")
        if paths := [Path(os.fsdecode(each)) for each in whole if each.strip()]:
            yield list(dict.fromkeys(paths))


def score_arriving(
    detector: Detector,
    arrivals: Iterable[list[Path]],
    journal: Journal,
    wanted: Wanted,
    told: Callable[[list[Row]], None],
) -> list[Row]:
    """A row for each file that arrived, the last where one came again; ``told`` gets the rows as they come."""
    for files in arrivals:
        told(score_files(detector, files, journal, wanted, shown=False))
    return list({row["path"]: row for row in journal.rows}.values())
