"""A CSV list of images: columns ``path``, ``label``, ``split`` (train or test) and, where there are any, ``mask``.

Paths are relative to the list, other columns are ignored, and the encoding is UTF-8. A cell may be as our own tables
write it: a ``'`` before what a spreadsheet would run, odd characters of a file's name escaped.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from raccgan.data.samples import Sample, Source, path_of, printable
from raccgan.data.sources.folder import SPLITS, describe
from raccgan.errors import InputError
from raccgan.outputs.files import cell_text
from raccgan.outputs.terminal import one_line

COLUMNS = ("path", "label", "split")

LONGEST_LINE = 1 << 18  # characters; a file without line ends would otherwise be read whole


def load_csv(root: Path, problems: list[str] | None = None) -> Source:
    """Load a list, or the only one in the folder ``root``.

    A line that cannot be used adds a line to ``problems``, and the others go on; without ``problems`` it is an
    InputError, as a list without lines, without a column, or that is not there.
    """
    lists = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if len(lists) != 1:
        found = ", ".join(printable(path.name) for path in lists) or "none"
        raise InputError(f"{printable(root)} should hold one .csv file, and holds {found}: name the file itself")
    path = lists[0]
    if not path.is_file():
        raise InputError(f"no file {printable(path)}: name a .csv file with the columns {', '.join(COLUMNS)}")
    samples: list[Sample] = []
    first_line: dict[str, int] = {}
    for line, row in _rows(path):
        try:
            sample = _sample(path, line, row)
            # One image on two lines could be trained on and tested.
            same = first_line.setdefault(os.path.normpath(path.parent / sample.key), line)
            if same != line:
                raise InputError(f"{printable(path)} line {line}: {row['path']} is on line {same} already; remove one")
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            samples.append(sample)
    if not samples:
        why = f"no line that can be used: {problems[0]}" if problems else "a header but no images: add lines"
        raise InputError(f"{printable(path)} has {why}")
    return describe(printable(path.name), samples)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> value, spaces stripped) of every line; missing values are empty, blank lines skipped."""
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark first.
        with path.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(_lines(path, opened))
            header = [name.strip().lower() for name in next(reader, [])]
            if missing := [name for name in COLUMNS if name not in header]:
                raise InputError(
                    f"{printable(path)} line 1: no column {', '.join(missing)}; the first line has to name the "
                    f"columns {', '.join(COLUMNS)}, with commas between them"
                )
            for values in reader:
                if any(value.strip() for value in values):
                    padded = values + [""] * (len(header) - len(values))
                    yield reader.line_num, dict(zip(header, (value.strip() for value in padded), strict=False))
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)} is not UTF-8: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{printable(path)} line {reader.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {printable(path)}: {error.strerror}") from None


def _lines(path: Path, opened: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: opened.readline(LONGEST_LINE), ""), 1):
        if len(line) == LONGEST_LINE:
            raise InputError(f"{printable(path)} line {number}: longer than {LONGEST_LINE} characters")
        yield line


def _sample(path: Path, line: int, row: dict[str, str]) -> Sample:
    where = f"{printable(path)} line {line}"
    for name in COLUMNS:
        if not row[name]:
            raise InputError(f"{where}: no {name}; every line needs {', '.join(COLUMNS)}")
    split = next((split for split in SPLITS if split == row["split"].lower()), None)
    if split is None:
        raise InputError(f"{where}: the split is {row['split']!r}; it has to be train or test")
    label = cell_text(row["label"])
    if label != one_line(label):
        raise InputError(f"{where}: the label {one_line(label)} holds characters that cannot be seen")
    image = _existing(path, where, row["path"])
    mask = _existing(path, where, row["mask"]) if row.get("mask") else None
    return Sample(printable(image), label, split, path.parent / image, mask and path.parent / mask)


def _existing(path: Path, where: str, name: str) -> Path:
    """The file that a cell names, relative to the list unless it is absolute."""
    for file in (path_of(cell_text(name)), Path(cell_text(name)), Path(name)):
        if (path.parent / file).is_file():
            return file
    raise InputError(f"{where}: no file {name}; paths are relative to {printable(path.parent)}")
