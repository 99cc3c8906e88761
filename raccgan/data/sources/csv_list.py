"""A CSV list of images: columns ``path``, ``label``, ``split`` and, where there are any, ``mask``, ``category`` and
``group``.

A column ``group`` holds patients, whose images are held out for the threshold all or none.

Columns may be called as other programs call them, and be separated by commas, semicolons or tabs. Paths are relative to
the list or to the folder above it; backslashes count as slashes, and an absolute path of another machine is found by
its end. Other columns are ignored, and the encoding is UTF-8. A cell may be as our own tables write it: a ``'`` before
what a spreadsheet would run, odd characters of a file's name escaped.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple, TextIO

from raccgan.data.layouts import split_of
from raccgan.data.samples import Sample, Source, path_of, printable
from raccgan.data.sources.reading import describe, one_category
from raccgan.errors import InputError
from raccgan.outputs.files import cell_text
from raccgan.outputs.terminal import one_line

COLUMNS = ("path", "label", "split")

NAMES = {  # what other programs call the columns
    "path": ("image", "image_path", "file_name", "filename", "filepath", "file_path", "file", "img", "img_path"),
    "label": ("class", "class_name", "target", "defect", "defect_type"),
    "split": ("set", "subset", "partition", "phase"),
    "mask": ("mask_path", "mask_file", "mask_filename", "ground_truth", "gt", "gt_path"),
    "category": ("object",),
    "group": ("patient", "patient_id", "patientid", "subject", "subject_id"),
}
SEPARATORS = ",;\t"
LONGEST_LINE = 1 << 18  # characters; a file without line ends would otherwise be read whole


def load_csv(root: Path, problems: list[str] | None = None, category: str | None = None) -> Source:
    """Load a list, or the only one in the folder ``root``; of a list with several categories, one.

    A line that cannot be used adds a line to ``problems``, and the others go on; without ``problems`` it is an
    InputError, as a list without lines, without a column, or that is not there.
    """
    path = _the_list(root)
    rows = list(_rows(path))
    categories = list(dict.fromkeys(row["category"] for _, row in rows if row.get("category")))
    chosen = one_category(path, categories, category) if categories or category else ""
    samples: list[Sample] = []
    moved: list[str] = []  # keys of images that were found by the ends of their paths
    first_line: dict[str, int] = {}
    for line, row in rows:
        if chosen and row["category"] != chosen:
            continue
        try:
            sample, by_end = _sample(path, line, row)
            # One image on two lines could be trained on and tested.
            assert isinstance(sample.image, Path)
            same = first_line.setdefault(os.path.normpath(sample.image), line)
            if same != line:
                raise InputError(f"{printable(path)} line {line}: {row['path']} is on line {same} already; remove one")
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
        else:
            samples.append(sample)
            moved += [sample.key] * by_end
    if not samples:
        why = f"no line that can be used: {problems[0]}" if problems else "a header but no images: add lines"
        raise InputError(f"{printable(path)} has {why}")
    name = printable(path.name) + (f" {chosen}" if chosen else "")
    note = f"{len(moved)} lines of {printable(path)} have paths of another machine; their ends are read, such as "
    return replace(describe(name, samples), notes=(note + moved[0],) if moved else ())


def _the_list(root: Path) -> Path:
    lists = sorted(root.glob("*.csv")) if root.is_dir() else [root]
    if len(lists) != 1:
        found = ", ".join(printable(path.name) for path in lists) or "none"
        raise InputError(f"{printable(root)} should hold one .csv file, and holds {found}: name the file itself")
    if not lists[0].is_file():
        raise InputError(f"no file {printable(lists[0])}: name a .csv file with the columns {', '.join(COLUMNS)}")
    return lists[0]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> value, spaces stripped) of every line; missing values are empty, blank lines skipped."""
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark first.
        with path.open(encoding="utf-8-sig", newline="") as opened:
            lines = _lines(path, opened)
            first = next(lines, "")
            # Of a header, unlike of other lines, the separator is what occurs most.
            separator = max(SEPARATORS, key=first.count)
            reader = csv.reader(chain([first], lines), delimiter=separator)
            header = _header(path, next(reader, []))
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


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    """The names of the columns, those of other programs replaced by ours."""
    header = [cell.strip().lower() for cell in cells]
    for name, others in NAMES.items():
        there = [column for column in header if column in others]
        if name in header or not there:
            continue
        if len(there) > 1:
            raise InputError(
                f"{printable(path)} line 1: the columns {' and '.join(there)} may both be the {name}: call one {name}"
            )
        header[header.index(there[0])] = name
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(
            f"{printable(path)} line 1: no column {', '.join(missing)}; the first line has to name the "
            f"columns {', '.join(COLUMNS)}, with commas between them"
        )
    return header


def _lines(path: Path, opened: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: opened.readline(LONGEST_LINE), ""), 1):
        if len(line) == LONGEST_LINE:
            raise InputError(f"{printable(path)} line {number}: longer than {LONGEST_LINE} characters")
        yield line


def _sample(path: Path, line: int, row: dict[str, str]) -> tuple[Sample, bool]:
    """The sample of a line, and whether its path was found by its end alone."""
    where = f"{printable(path)} line {line}"
    for name in COLUMNS:
        if not row[name]:
            raise InputError(f"{where}: no {name}; every line needs {', '.join(COLUMNS)}")
    split = split_of(row["split"])
    if split is None:
        raise InputError(f"{where}: the split is {row['split']!r}; it has to be train, test or valid")
    label = cell_text(row["label"])
    if label != one_line(label):
        raise InputError(f"{where}: the label {one_line(label)} holds characters that cannot be seen")
    image = _existing(path, where, row["path"])
    mask = _existing(path, where, row["mask"]).file if row.get("mask") else None
    return Sample(printable(image.name), label, split, image.file, mask, row.get("group", "")), image.by_end


class _File(NamedTuple):
    name: Path  # as tables show it
    file: Path
    by_end: bool


def _existing(path: Path, where: str, name: str) -> _File:
    """The file that a cell names, relative to the list or to the folder above it unless it is absolute."""
    cell = cell_text(name)
    windows = PureWindowsPath(cell)
    places = [(place, False) for place in (path_of(cell), Path(cell), Path(name), Path(windows.as_posix()))]
    foreign = windows if windows.is_absolute() else PurePosixPath(cell)
    if foreign.is_absolute():
        places += [(Path(*foreign.parts[start:]), True) for start in range(1, len(foreign.parts))]
    for place, by_end in places:
        for base in (path.parent, path.parent.parent):
            if os.path.isfile(base / place):  # False, too, for what no file can be called
                return _File(place, base / place, by_end)
    raise InputError(f"{where}: no file {name}; paths are relative to {printable(path.parent)}")
