"""Atomic writes: every result is written beside its place and then renamed, so that a file is whole or absent.

A run that is killed leaves its half-written file beside it, under a name that the next run into the folder removes. An
error of the operating system (disk full, read-only folder, no such place) is an InputError of one line.
"""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from raccgan.errors import InputError
from raccgan.outputs.terminal import say

LOCK = ".raccgan-lock"  # of a folder; the lock ends with its process, so the file of a killed run stops nobody

_PART = re.compile(r"\.[0-9a-f]{16}\.part")

# A spreadsheet runs a cell that starts with one of these as a formula; a class may be called anything. Some take the
# wide forms of East Asian keyboards too, and all pass over what a leading ' hides. A plain number is no formula.
_FORMULA = re.compile(r"(?![+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z)'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Make ``path`` hold what ``write`` puts into the binary file it is given, or leave everything as it was.

    The bytes reach the disk (flush and fsync) before the file takes its name. A link is followed, not replaced. An
    OSError, also as the reason of another exception, becomes an InputError; a folder or a device is one too.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise InputError(f"cannot write {path}: it is there already and is not an ordinary file; name another one")
    temporary = place.with_name(_part_name())
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException as error:
        _remove(temporary)
        refusal = _refusal_behind(error)
        if refusal is None:
            raise
        raise InputError(f"cannot write {path}: {said(refusal)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 with the line ends it has; bytes of a file name that are no text become ``\\udcXX``."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="backslashreplace")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, keys in the order given, None as null; NaN or infinity is a ValueError."""
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)

    def write(file: BinaryIO) -> None:
        for piece in encoder.iterencode(value):  # a table of many records as one string takes several times its size
            file.write(piece.encode("utf-8", errors="backslashreplace"))
        file.write(b"\n")

    write_atomically(path, write)


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table: one header line, then one line a row; None is an empty cell.

    Text that begins with ``= + - @`` (also in their wide forms), a tab or the end of a line gets a leading ``'``, so
    that no spreadsheet runs a name as a formula; so does text that would read as escaped, and :func:`cell_text` takes
    it away again. Numbers, and text that reads as a plain number ("-0.5"), stay as they are. A row that is longer or
    shorter than the header is a ValueError.
    """

    def write(file: BinaryIO) -> None:
        table = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
        try:
            writer = csv.writer(table, lineterminator="\n")
            quoting = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(header)
            for number, row in enumerate(rows):
                if len(row) != len(header):
                    raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
                cells = [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row]
                # A lone carriage return ends a line for every reader, and Python 3.11 writes it without quotes.
                (quoting if any("\r" in cell for cell in cells if isinstance(cell, str)) else writer).writerow(cells)
        finally:
            table.detach()  # which flushes, and leaves the file open

    write_atomically(path, write)


def cell_text(cell: str) -> str:
    """The text that :func:`write_csv` wrote as this cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def prepare_out(path: str | os.PathLike[str]) -> Path:
    """Create the folder of a run with its parents, prove that it takes a file, and return it.

    Called before hours of work, not after. Files that are there already stay. A folder that cannot be created, or takes
    no file, is an InputError.
    """
    folder = Path(path)
    probe = folder / _part_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        reason = "it is an ordinary file; name another place" if folder.is_file() else said(error)
        raise InputError(f"cannot use {path} as the output folder: {reason}") from error
    finally:
        _remove(probe)
    return folder


@contextlib.contextmanager
def own_folder(path: str | os.PathLike[str], below: Sequence[str] = ()) -> Iterator[Path]:
    """:func:`prepare_out`, and the folder is this run's alone until it ends.

    The folders in it that ``below`` names belong to the run too. What a killed run was in the middle of writing is
    removed at the start; at the end, the folders that this made and that hold nothing. The lock is the kernel's: it
    ends with the process, however that ends. Another run in the folder is an InputError.
    """
    made = [place for place in (Path(path), *Path(path).parents) if not place.exists()]
    folder = prepare_out(path)
    lock = _locked(folder / LOCK)
    places = [folder / name for name in below]
    try:
        for part in (part for place in (folder, *places) for part in place.glob(".*.part")):
            if _PART.fullmatch(part.name):
                _remove(part)
        yield folder
    finally:
        _remove(folder / LOCK)  # while it is locked: whoever has opened it meanwhile sees that its name is gone
        os.close(lock)
        for place in (*places, *made) if made else ():
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()


def stamp(path: Path) -> tuple[int, int, int] | None:
    """An identity that changes when another file takes this place; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: after a power cut, a file that took its place before is still there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no such thing, and need none
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(place: Path) -> int:
    """The descriptor of the lock file, locked, and under its name when this returns."""
    while True:
        # A link in a folder that somebody else made is not followed, and a pipe not waited for.
        try:
            lock = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise InputError(f"cannot write {place}: {said(error)}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(
                f"another run is writing into {place.parent}: wait for it, or name another --out"
            ) from None
        except OSError as error:
            say(f"note: no lock in {place.parent} ({error.strerror}): make sure that no other run writes there")
        if place.exists() and os.path.samestat(os.fstat(lock), place.stat()):
            return lock
        os.close(lock)  # the run before removed the name between our opening and our locking


def _part_name() -> str:
    return f".{secrets.token_hex(8)}.part"  # as _PART has it


def _refusal_behind(error: BaseException | None) -> OSError | None:
    # torch.save answers a full disk with a RuntimeError whose context is the OSError.
    while isinstance(error, Exception):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def said(refusal: OSError) -> str:
    """The reason of an error of the operating system, and what would mend it."""
    mend = "free some space" if refusal.errno in (errno.ENOSPC, errno.EDQUOT) else "name a place that can be written"
    return f"{refusal.strerror or refusal}; {mend}"


def _remove(temporary: Path) -> None:
    # An OSError: its folder is no folder, or has gone; then nothing is left there either.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
