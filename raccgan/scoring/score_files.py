"""Images named on a command line to tables of scores: which files are meant, the rows, and what is written of them."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raccgan.data.listing import IMAGE_SUFFIXES, list_images, matching
from raccgan.data.samples import printable
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.models.checkpoint import Checkpoint
from raccgan.outputs.files import write_atomically, write_csv, write_json
from raccgan.outputs.journal import Journal, Row, differences
from raccgan.outputs.overlays import MapScale, overlay_of_file
from raccgan.outputs.progress import Progress
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.detector import Detector, Result, Skipped
from raccgan.scoring.scorer import TERMS, decision

COLUMNS = ("path", "score", "threshold", "predicted", "nearest_class", *TERMS, "map_max", "map_x", "map_y")
"""Of scores.csv; records of scores.json have these names too, and ``map`` and ``overlay`` where they were wanted."""

RESULTS = ("scores.csv", "scores.json", "summary.json", "report.html")
FOLDERS = ("maps", "overlays")

_OWN_NAME = re.compile(r"-[0-9a-f]{12}\.(npy|png)$")

WRITERS = 8
"""Threads that write maps and overlays: a file is on the disk before its row counts, and the disk takes its time."""


@dataclass(frozen=True)
class Found:
    """The files that the arguments mean, each once, and a line for every argument that means none."""

    files: tuple[Path, ...]
    problems: tuple[str, ...]
    masks_left_out: int


def find(arguments: Sequence[str]) -> Found:
    """Files, folders (with all below them) and patterns such as ``scans/**/*.png``, in the order given.

    ``ground_truth`` beside ``test``, where MVTec's layout has its masks, is left out unless it is named.
    """
    files: dict[Path, None] = {}
    problems: list[str] = []
    masks = 0
    for argument in arguments:
        try:
            for path in _meant(argument, problems):
                if "ground_truth" not in Path(argument).parts and _is_mask(path):
                    masks += 1
                else:
                    files[path] = None
        except InputError as error:
            problems.append(str(error))
    return Found(tuple(files), tuple(problems), masks)


def _meant(argument: str, problems: list[str]) -> Iterator[Path]:
    path = Path(argument)
    if path.is_dir():
        yield from list_images(path, problems).images
    elif os.path.lexists(path) or not glob.has_magic(argument):
        yield path  # a file that is not there is named when it is read
    else:
        inside = [match for match in matching(argument, problems) if match.suffix.lower() in IMAGE_SUFFIXES]
        if not inside:
            raise InputError(f"no image matches {printable(argument)}")
        yield from (match for match in inside if not match.is_dir())


def _is_mask(path: Path) -> bool:
    return any(parent.name == "ground_truth" and (parent.parent / "test").is_dir() for parent in path.parents)


@dataclass(frozen=True)
class Wanted:
    """What is kept of every image beside its row."""

    out: Path
    maps: bool = False
    overlays: bool = False
    report: bool = False
    scale: MapScale = field(default_factory=MapScale)


def take_folder(out: Path, run: Mapping[str, Any], *, restart: bool) -> None:
    """Make sure that whatever lies in ``out`` is of this very run's kind: a folder's results are of one checkpoint.

    Args:
        out: the folder.
        run: what the scores depend on, as :meth:`Table.write` stores it.
        restart: remove what an earlier run left, and nothing else.

    Raises:
        InputError: another checkpoint's results are there, or those of other settings.
    """
    if restart:
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        for path in (path for name in FOLDERS for path in (out / name).glob("*")):
            if _OWN_NAME.search(path.name):
                path.unlink()
    elif (out / "summary.json").exists():
        try:
            there = json.loads((out / "summary.json").read_text())["made_with"]
        except (ValueError, KeyError, TypeError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise InputError(f"{out / 'summary.json'} is not of this command: name another --out")
        if differ := differences(there, run):
            raise InputError(
                f"{out} holds results of another run ({differ}): name another --out, or add --restart to replace them"
            )


def score_files(detector: Detector, files: Sequence[Path], journal: Journal, wanted: Wanted) -> list[Row]:
    """A row for each file, in order; those that the journal holds, of unchanged files, are not scored again."""
    done = {row["path"]: row for row in journal.rows}
    stamps = {path: _stamp(path) for path in files}
    known = {path for path in files if (row := done.get(printable(path))) and row["stamp"] == stamps[path]}
    todo = [path for path in files if path not in known]
    for name in [name for name, needed in zip(FOLDERS, (wanted.maps, wanted.overlays), strict=True) if needed]:
        (wanted.out / name).mkdir(exist_ok=True)
    details = wanted.maps or wanted.overlays or wanted.report
    with (
        Progress("scores", len(files), len(known), unit="image", lines=False) as progress,
        ThreadPoolExecutor(WRITERS) as pool,
    ):
        _say_skipped((done[printable(path)] for path in files if path in known), progress)
        for batch in scan(detector, todo, details):
            rows = list(pool.map(lambda found: _row(found, wanted, detector), batch))
            for row, found in zip(rows, batch, strict=True):
                assert found.path is not None
                row["stamp"] = stamps[found.path]
            journal.add(rows)
            done |= {row["path"]: row for row in rows}
            _say_skipped(rows, progress)
            progress.update(len(batch))
    return [done[printable(path)] for path in files]


def scan(detector: Detector, files: Sequence[Path] = (), details: bool = False) -> Iterator[list[Result | Skipped]]:
    """:meth:`Detector.scan_batches` on all ranks: what rank 0 asks for comes back there, in order; nothing elsewhere.

    The batches are those of a single process, dealt out to the ranks, so that the scores are the same bit for bit.
    """
    files, details = ranks.job().on_first(lambda: (files, details))
    size = detector.scorer.batch
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    own = [path for batch in batches[ranks.job().rank :: ranks.job().world] for path in batch]
    scored = detector.scan_batches(own, details=details)
    for _ in range(0, len(batches), ranks.job().world):
        found = ranks.job().gathered(next(scored, None))
        yield from (batch for batch in found or () if batch is not None)


def _say_skipped(rows: Iterable[Row], progress: Progress) -> None:
    for row in rows:
        if "reason" in row:
            progress.say(f"skipped: {row['reason']}")


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file: a row of a file that has changed since does not count."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _row(found: Result | Skipped, wanted: Wanted, detector: Detector) -> Row:
    assert found.path is not None
    row: Row = {"path": printable(found.path)}
    if isinstance(found, Skipped):
        return row | {"reason": found.reason}
    row |= {
        "score": _number(found.score),
        "nearest_class": found.nearest_class,
        **{name: _number(getattr(found, name)) for name in TERMS},
        "map_max": _number(found.peak.value),
        "map_x": found.peak.x,
        "map_y": found.peak.y,
    }
    if wanted.maps:
        row["map"] = f"maps/{_own_name(found.path)}.npy"
        map = found.map
        assert map is not None
        write_atomically(wanted.out / row["map"], lambda file: np.save(file, map))
    if wanted.overlays:
        row["overlay"] = f"overlays/{_own_name(found.path)}.png"
        picture = overlay_of_file(found, wanted.scale)
        write_atomically(wanted.out / row["overlay"], lambda file: picture.save(file, "PNG", compress_level=3))
    if wanted.report:
        assert found.image is not None
        assert found.reconstruction is not None
        assert found.map is not None
        row["strip"] = strip(found.image, found.reconstruction, found.map, wanted.scale)
    return row


def _number(value: float) -> float:
    """The float32 as the tables show it, the same in all of them."""
    return float(f"{value:.9g}")


def _own_name(path: Path) -> str:
    """A file name of its own for each path, whatever the path holds."""
    # As _OWN_NAME has it.
    own = hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem)[:80]}-{own}"


@dataclass(frozen=True)
class Table:
    """The rows of a whole run with the decisions."""

    records: list[Row]
    skipped: list[Row]  # path and reason
    threshold: float

    @classmethod
    def of(cls, rows: Sequence[Row], threshold: float) -> Table:
        threshold = _number(threshold)
        records, skipped = [], []
        for row in rows:
            if "reason" in row:
                skipped.append({"path": row["path"], "reason": row["reason"]})
                continue
            more = {name: row[name] for name in ("map", "overlay") if name in row}
            decided = {"threshold": threshold, "predicted": decision(row["score"] > threshold)}
            records.append({name: (row | decided)[name] for name in COLUMNS} | more)
        return cls(records, skipped, threshold)

    @property
    def anomalous(self) -> int:
        return sum(record["predicted"] == "anomalous" for record in self.records)

    def write(self, out: Path, made_with: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """``scores.csv``, ``scores.json`` (a list of records) and ``summary.json``.

        Args:
            out: the folder.
            made_with: what the scores depend on.
            about: what else the summary says.
        """
        write_csv(out / "scores.csv", COLUMNS, ([_cell(record[name]) for name in COLUMNS] for record in self.records))
        write_json(out / "scores.json", self.records)
        summary: Row = {"scored": len(self.records), "anomalous": self.anomalous, "skipped": len(self.skipped)}
        summary |= {"threshold": self.threshold, **about, "made_with": dict(made_with), "skipped_files": self.skipped}
        write_json(out / "summary.json", summary)


def write_detected(path: Path, rows: Sequence[Row], table: Table, stored: Checkpoint, run: str) -> None:
    """The report of a table.

    Args:
        path: the file.
        rows: of :func:`score_files`, scored for a report.
        table: the rows with their decisions.
        stored: the checkpoint that scored them.
        run: how the user calls it.
    """
    fields = [f.name for f in dataclasses.fields(Shown) if f.name not in ("label", "anomalous")]
    write_report(
        path,
        Report(
            title=f"{len(table.records)} images scored with {run}",
            threshold=table.threshold,
            images=[Shown(**{name: row[name] for name in fields}) for row in rows if "reason" not in row],
            held_out=[_number(score) for score in stored.held_out.get("score", torch.empty(0)).tolist()],
            skipped=table.skipped,
            facts={"normal classes": ", ".join(stored.classes), "model": f"{stored.config['image_size']} px"},
            run=run,
        ),
    )


def _cell(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
