"""Scores the files that a command line names into a journal: which files are meant, and what is kept of each."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from raccgan.data.images.decode import read_upright
from raccgan.data.images.opening import room
from raccgan.data.listing import (
    MASKS,
    LeftOut,
    is_image,
    left_out_line,
    list_files,
    matching,
    no_image,
    without_apart,
)
from raccgan.data.samples import printable
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.errors import InputError
from raccgan.outputs.files import stamp, write_atomically
from raccgan.outputs.journal import Journal, Row, differences
from raccgan.outputs.overlays import LONGEST, PREDICTED, MapScale, boxed, outlined, overlay
from raccgan.outputs.progress import Progress
from raccgan.outputs.report import strip
from raccgan.scoring.detector import Detector, Result
from raccgan.scoring.reading import Skipped
from raccgan.scoring.record import rounded

T = TypeVar("T")

RESULTS = ("scores.csv", "scores.json", "summary.json", "report.html")
FOLDERS = ("maps", "overlays", "masks")
_OWN_NAME = re.compile(r"-[0-9a-f]{12}\.(npy|png)$")

WRITERS = 8  # threads that write maps and overlays, and wait for the disk: a file is on it before its row is


class Found(NamedTuple):
    """The files that the arguments mean, each once, a line for every argument that means none, and what is left out."""

    files: tuple[Path, ...]
    problems: tuple[str, ...]
    left_out: LeftOut


def find(arguments: Sequence[str], out: Path | None = None) -> Found:
    """Files, folders (with all below them) and patterns such as ``scans/**/*.png``, in the order given.

    Masks, linked folders, results of ours and the folder ``out`` are left out unless they are named.
    """
    files: dict[Path, None] = {}
    problems: list[str] = []
    left_out = LeftOut()
    for argument in arguments:
        less = LeftOut()
        try:
            files |= dict.fromkeys(_meant(argument, out, problems, less))
        except InputError as error:
            problems.append(str(error))
        left_out.merge(less)
    return Found(tuple(files), tuple(problems), left_out)


def _meant(argument: str, out: Path | None, problems: list[str], left_out: LeftOut) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        found = list_files(path, problems, but=out)
        left_out.merge(found.left_out)
        for mask in found.masks:
            left_out.add(MASKS, printable(mask.parent.relative_to(path)))
        if not found.images:
            raise no_image(path, left_out)
        return found.images
    if os.path.lexists(path) or not glob.has_magic(argument):
        return [path]  # a file that is not there is named when it is read
    other_case: set[Path] = set()
    matches = matching(argument, problems, other_case)
    images = without_apart([match for match in matches if is_image(match)], argument, out, left_out)
    for match in matches:
        if not is_image(match) and not match.is_dir():
            left_out.add("files of other kinds", match.suffix.lower() or "no ending")
    for match in sorted(other_case):
        left_out.add("files whose names match the pattern in other case alone", printable(match.name))
    if not images:
        left = f" (left out: {left_out_line(left_out)})" if left_out else ""
        raise InputError(f"no image matches {printable(argument)}{left}")
    return images


class Wanted(NamedTuple):
    """What is kept of every image beside its row."""

    out: Path
    maps: bool
    overlays: bool
    masks: bool
    report: bool
    scale: MapScale


def take_folder(out: Path, run: Mapping[str, Any], *, restart: bool) -> None:
    """Refuse results in ``out`` of another checkpoint or other settings; or ``restart``: remove what a run left there.

    An InputError if ``summary.json`` is not of this command, or if what the scores depend on differs from ``run``.
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


def score_files(
    detector: Detector,
    files: Sequence[Path],
    journal: Journal,
    wanted: Wanted,
    job: Collectives = SINGLE,
    *,
    shown: bool = True,
) -> list[Row]:
    """A row for each file, each file given once, in order; the journal gets the rows batch by batch.

    Rows of files whose size and time have not changed since are not scored again. This is the first rank of ``job``;
    the other ranks call :func:`help_first`. ``shown`` is whether progress is.
    """
    done = {row["path"]: row for row in journal.rows}
    stamps = {path: list(found[1:]) if (found := stamp(path)) else None for path in files}  # size and time
    known = {path: None for path in files if (row := done.get(printable(path))) and row["stamp"] == stamps[path]}
    todo = [path for path in files if path not in known]
    for name in FOLDERS:
        if getattr(wanted, name):
            (wanted.out / name).mkdir(exist_ok=True)
    details = wanted.maps or wanted.overlays or wanted.masks or wanted.report
    with (
        Progress("scores", len(files), len(known), unit="image", lines=False, shown=shown) as progress,
        ThreadPoolExecutor(WRITERS) as pool,
    ):
        _say_skipped((done[printable(path)] for path in known), progress)
        batches = _scan(detector, todo, details, job)
        for rows in _one_behind(pool, lambda found: _row(found, wanted, stamps), batches):
            journal.add(rows)
            done |= {row["path"]: row for row in rows}
            _say_skipped(rows, progress)
            progress.update(len(rows))
    return [done[printable(path)] for path in files]


def _one_behind(
    pool: ThreadPoolExecutor, write: Callable[[T], Row], batches: Iterable[Sequence[T]]
) -> Iterator[list[Row]]:
    """What ``write`` makes of each batch; the threads of ``pool`` write one while the next is scored."""
    waiting: list[Future[Row]] = []
    for batch in batches:
        begun = [pool.submit(write, found) for found in batch]
        if waiting:
            yield [future.result() for future in waiting]
        waiting = begun
    if waiting:
        yield [future.result() for future in waiting]


def help_first(detector: Detector, job: Collectives) -> None:
    """Score this rank's share of the files that :func:`score_files` has on rank 0."""
    for _ in _scan(detector, (), False, job):
        pass


def _scan(
    detector: Detector, files: Sequence[Path], details: bool, job: Collectives
) -> Iterator[list[Result | Skipped]]:
    """:meth:`Detector.scan_batches` on all ranks, by the batches of a single process: what rank 0 asks for comes back
    there, in order, the same bit for bit; nothing elsewhere."""
    files, details = job.on_first(lambda: (files, details))
    size = detector.scorer.batch
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    own = [path for batch in batches[job.rank :: job.world] for path in batch]
    scored = detector.scan_batches(own, details=details)
    for _ in range(0, len(batches), job.world):
        found = job.gathered(next(scored, None))
        yield from (batch for batch in found or () if batch is not None)


def _say_skipped(rows: Iterable[Row], progress: Progress) -> None:
    for row in rows:
        if "reason" in row:
            progress.say(f"skipped: {row['reason']}")


def _row(found: Result | Skipped, wanted: Wanted, stamps: Mapping[Path, list[int] | None]) -> Row:
    """What the journal keeps of an image, whose map and overlay are on the disk when this returns."""
    assert found.path is not None
    row: Row = {"path": printable(found.path), "stamp": stamps[found.path]}
    if isinstance(found, Skipped):
        return row | {"reason": found.reason}
    row |= found.to_journal()
    own = hashlib.blake2b(os.fsencode(found.path), digest_size=6).hexdigest()  # a name of its own, as _OWN_NAME has it
    map, name = found.map, f"{re.sub(r'[^A-Za-z0-9._-]', '_', found.path.stem)[:80]}-{own}"
    if wanted.maps:
        assert map is not None
        row["map"] = f"maps/{name}.npy"
        write_atomically(wanted.out / row["map"], lambda file: np.save(file, map))
    if wanted.masks:
        row |= _marks(found, wanted.out, f"masks/{name}.png")
    if wanted.overlays:
        row["overlay"] = f"overlays/{name}.png"
        picture = overlay_of(found, wanted.scale, row.get("boxes"))
        write_atomically(wanted.out / row["overlay"], lambda file: picture.save(file, "PNG", compress_level=3))
    if wanted.report:
        assert found.image is not None
        assert found.reconstruction is not None
        assert map is not None
        threshold = found.pixel_threshold
        predicted = map > np.float64(threshold) if wanted.masks and threshold is not None else None
        row["strip"] = strip(found.image, found.reconstruction, map, wanted.scale, predicted=predicted)
    return row


def _marks(found: Result, out: Path, name: str) -> Row:
    """The mask of a scored file, written below ``out``, and its boxes."""
    with room(found.place.height * found.place.width):  # several maps as large as the original are in work
        marked = found.marked
        assert marked is not None
        picture = Image.fromarray(marked.mask.astype(np.uint8) * 255)
        write_atomically(out / name, lambda file: picture.save(file, "PNG", compress_level=3))
        vars(found).pop("marked")  # the batch is in memory until all of it is written
    boxes = [box._asdict() | {"peak": rounded(box.peak)} for box in marked.boxes]
    return {"mask": name, "boxes": boxes}


def overlay_of(result: Result, scale: MapScale, boxes: Sequence[Mapping[str, Any]] | None = None) -> Image.Image:
    """The map of a scored file over the upright original, at most LONGEST pixels on its longer side.

    With ``boxes``, of x, y, width and height, these are drawn, and a line round the anomalous pixels. The file is read
    again, because originals may be large and are not kept. InputError: it cannot be read any more.
    """
    assert result.path is not None
    assert result.map is not None
    original = read_upright(result.path, LONGEST)
    height, width = original.shape[:2]
    laid = result.place.lay(result.map, width, height)
    drawn = overlay(original, laid, scale)
    if boxes:
        assert result.pixel_threshold is not None
        drawn = outlined(drawn, laid > np.float64(result.pixel_threshold), PREDICTED)
        drawn = boxed(drawn, boxes, (result.place.height, result.place.width))
    return Image.fromarray(drawn)
