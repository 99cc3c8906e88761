"""A journal keeps the rows of a long run as they come, so that a stopped run continues where it stopped.

The first of its JSON lines names the run: the checkpoint and every setting that a row depends on. Each further line
holds the rows of one batch; one that was cut off in the middle counts as not written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from raccgan.errors import InputError
from raccgan.outputs.files import said

Row = dict[str, Any]


class Journal(AbstractContextManager["Journal"]):
    """Open, or continue, the journal at ``path``; ``restart`` throws away what is there.

    ``run`` is what the rows depend on. A journal of another run is an InputError that names what differs; a damaged
    one, or one that cannot be written, is an InputError too.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        try:
            # Unbuffered, so that closing the file does not try a failed write again.
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {path}: {said(error)}") from None
        try:
            self._read(dict(run), restart)
        except BaseException:
            self._file.close()
            raise

    def add(self, rows: Sequence[Row]) -> None:
        """Write the rows of one batch. When this returns, they survive everything but a failure of the machine."""
        self._append(rows)
        self.rows += rows

    def remove(self) -> None:
        """The run is complete."""
        self.path.unlink()

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _read(self, run: Row, restart: bool) -> None:
        self._file.seek(0)
        whole, end, _ = self._file.read().rpartition(b"\n")  # what follows the last line's end was cut off
        if restart or not end:
            self._file.truncate(0)
            self._append(run)
            return
        try:
            there, *batches = map(json.loads, whole.split(b"\n"))
            rows = [row for batch in batches for row in batch]
            ours = all(isinstance(row, dict) and {"path", "stamp"} <= row.keys() for row in rows)
        except (ValueError, TypeError, RecursionError):
            ours = False
        if not ours or not isinstance(there, dict):
            raise InputError(f"{self.path} is damaged: add --restart to score anew")
        if differ := differences(there, run):
            raise InputError(
                f"{self.path.parent} holds part of another run ({differ}): name another --out, repeat the command of "
                "that run to finish it, or add --restart to throw it away"
            )
        self.rows = rows
        self._file.truncate(len(whole) + 1)

    def _append(self, line: Row | Sequence[Row]) -> None:
        left = json.dumps(line).encode() + b"\n"
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {said(error)}, then repeat the command to go on") from None


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What two runs differ in, for a person; empty where they are alike."""
    return "; ".join(
        f"{name} is {there.get(name)} there and {value} here"
        for name, value in here.items()
        if there.get(name) != value
    )
