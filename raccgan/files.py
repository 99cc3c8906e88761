"""Files that are either whole or not there: every result is written beside its place and then moved into it.

A run that is stopped, or a disk that fills, leaves the older file as it was and no half-written one.
What the machine refuses (disk full, read-only folder, no such place) is an InputError in one line.
"""

import contextlib
import csv
import errno
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from raccgan.errors import InputError

# A spreadsheet runs a cell that starts with one of these as a formula; a file name may hold anything.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Make ``path`` hold what ``write`` puts into the binary file it is given, or leave everything as it was.

    The bytes reach the disk (flush and fsync) before the file takes its name. A link is followed, not replaced.

    Raises:
        InputError: the machine refuses to write there (OSError, also as the reason of another exception), or ``path``
            is a folder or a device.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise InputError(f"cannot write {path}: it is there already and is not an ordinary file; name another one")
    temporary = place.with_name(f".{secrets.token_hex(8)}.part")
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
        raise InputError(f"cannot write {path}: {_said(refusal)}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 with the line ends it has; bytes of a file name that are no text become ``\\udcXX``.

    Raises:
        InputError: as :func:`write_atomically`.
    """
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="backslashreplace")))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, keys in the order given; None becomes null.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have: say None where there is no value.
        InputError: as :func:`write_atomically`.
    """
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)

    def write(file: BinaryIO) -> None:
        for piece in encoder.iterencode(value):  # a table of many records as one string takes several times its size
            file.write(piece.encode("utf-8", errors="backslashreplace"))
        file.write(b"\n")

    write_atomically(path, write)


def write_csv(path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table: one header line, then one line a row; None is an empty cell.

    Text that begins with ``= + - @``, a tab or a carriage return gets a leading ``'``, so that no spreadsheet runs a
    file's name as a formula. Numbers, and text that reads as a plain number ("-0.5"), stay as they are.

    Raises:
        ValueError: a row is longer or shorter than the header.
        InputError: as :func:`write_atomically`.
    """

    def write(file: BinaryIO) -> None:
        table = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
        try:
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(header)
            for number, row in enumerate(rows):
                if len(row) != len(header):
                    raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
                writer.writerow([_without_formula(cell) for cell in row])
        finally:
            table.detach()  # which flushes, and leaves the file open

    write_atomically(path, write)


def prepare_out(path: str | os.PathLike[str]) -> Path:
    """Create the folder of a run with its parents, prove that it takes a file, and return it.

    Called before hours of work, not after. Files that are there already stay.

    Raises:
        InputError: the folder cannot be created or does not take a file.
    """
    folder = Path(path)
    probe = folder / f".{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
    except OSError as error:
        reason = "it is an ordinary file; name another place" if folder.is_file() else _said(error)
        raise InputError(f"cannot use {path} as the output folder: {reason}") from error
    finally:
        _remove(probe)
    return folder


def _without_formula(cell: object) -> object:
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return "'" + cell
    return cell


def _refusal_behind(error: BaseException | None) -> OSError | None:
    # torch.save answers a full disk with a RuntimeError whose context is the OSError.
    while isinstance(error, Exception):
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _said(refusal: OSError) -> str:
    mend = "free some space" if refusal.errno in (errno.ENOSPC, errno.EDQUOT) else "name a place that can be written"
    return f"{refusal.strerror or refusal}; {mend}"


def _remove(temporary: Path) -> None:
    # An OSError: its folder is no folder, or has gone; then nothing is left there either.
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
