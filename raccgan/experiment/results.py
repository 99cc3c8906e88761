"""The results of a benchmark: a CSV that any machine may continue, and means and deviations as text and picture."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from raccgan.config import SCORES
from raccgan.errors import InputError
from raccgan.evaluation.beside import CONTROLS, MAPPED
from raccgan.experiment.tables import Benchmark, Trial
from raccgan.outputs import figures
from raccgan.outputs.files import write_csv

Figures = dict[str, str]  # one line of the CSV, by column; an empty figure is one that the data do not define

KEY = ("variant", "normal", "seed", "digest")
HEADER = (
    *KEY, "auroc", "pixel_auroc", *CONTROLS, *(f"pixel_{name}" for name in MAPPED),
    *(f"auroc_{name}" for name in SCORES), *(f"choice_{name}" for name in SCORES),
    "train_seconds", "score_seconds_per_1000", "steps", "kernels", "threads", "machine", "torch",
)  # fmt: skip
"""The columns: ``pixel_`` is the pixel AUROC of a control, ``auroc_`` the AUROC of a kind of score on the test images,
and ``choice_`` that on the training part, held-out normal images against the images of all other classes there."""

# Columns that older tables lack; a figure is empty there.
_YOUNGER = (
    *(f"{what}_{score}" for what in ("auroc", "choice") for score in ("defects", "learned")),
    *(name for name in CONTROLS if name not in MAPPED),
)


class Results:
    """The CSV at ``path``; it need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Figures]:
        """Every line; InputError where the file is not such a table."""
        if not self.path.exists():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                lines = list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"cannot read {self.path}: {error}") from None
        missing = [name for name in HEADER if name not in _YOUNGER and name not in (reader.fieldnames or ())]
        if missing or any(None in line or None in line.values() for line in lines):
            what = f"it has no column {missing[0]!r}" if missing else "a line is longer or shorter than the first"
            raise InputError(f"{self.path} is no table of results: {what}; name another --out, or mend it")
        return [dict.fromkeys(_YOUNGER, "") | line for line in lines]

    def of(self, rows: Sequence[Trial]) -> dict[Trial, Figures]:
        """What is known about these rows, the later line where there are two."""
        by_key = {tuple(line[name] for name in KEY): line for line in self.read()}
        return {row: by_key[row.key] for row in rows if row.key in by_key}

    def add(self, result: Figures) -> None:
        """Add one line. Several processes may add to one file."""
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [*self.read(), result]
            write_csv(self.path, HEADER, [[line[name] for name in HEADER] for line in lines])


@dataclass(frozen=True)
class Mean:
    """A figure over classes and seeds: the mean over the classes of each seed, then mean and deviation over seeds."""

    mean: float
    deviation: float | None = None  # None for one seed, and where it is not known
    seeds: int = 0
    classes: int = 0  # that every seed has
    of: int = 0  # classes of the table

    def __str__(self) -> str:
        around = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{around}"

    @property
    def extent(self) -> str:
        missing = "" if self.classes == self.of else f" of {self.of}"
        classes, seeds = "class" if self.of == 1 else "classes", "seed" if self.seeds == 1 else "seeds"
        return f"{self.classes}{missing} {classes}, {self.seeds} {seeds}"


def mean_of(results: Mapping[Trial, Figures], column: str, of: int) -> Mean | None:
    """The mean of a column over the classes that every seed has; None where nothing is known."""
    known = {(row.seed, row.normal): float(line[column]) for row, line in results.items() if line[column]}
    seeds = sorted({seed for seed, _ in known})
    classes = [name for name in {name for _, name in known} if all((seed, name) in known for seed in seeds)]
    if not classes:
        return None
    means = [mean(known[seed, name] for name in classes) for seed in seeds]
    return Mean(mean(means), stdev(means) if len(means) > 1 else None, len(seeds), len(classes), of)


def summary(name: str, table: Benchmark, by_variant: Mapping[str, Mapping[Trial, Figures]]) -> str:
    """Everything that is known about a table as text. The controls, which do not depend on it, are of one variant."""
    of = len(table.normal)
    rows: list[tuple[object, ...]] = [("variant", "AUROC", "pixel AUROC", "over", "training, s")]
    for variant, results in by_variant.items():
        found, pixel = (mean_of(results, column, of) for column in ("auroc", "pixel_auroc"))
        if found is None:
            rows.append((variant, "not run yet", "", "", ""))
        else:
            seconds = mean(float(line["train_seconds"]) for line in results.values())
            rows.append((variant, found, pixel or "", found.extent, f"{seconds:11.0f}"))
    rows += [(beside, image, pixel or "", source, "") for beside, image, pixel, source in _beside(table, by_variant)]
    lines = [f"{name}: image AUROC, mean over classes, ± deviation over seeds", "", *_lines(rows, 24, 15, 15, 24, 11)]
    variant, first = _first(by_variant)
    if first:
        rows = [(f"--score, {variant}", "tested", "on the training part, to choose by")]
        for score in SCORES:
            tested, choice = (mean_of(first, f"{column}_{score}", of) for column in ("auroc", "choice"))
            rows.append((score, tested or "", choice or ""))
        lines += ["", *_lines(rows, 24, 15, 34)]
    lines += _losing(first)
    if table.note:
        lines += ["", f"note: {table.note}"]
    return "\n".join(lines)


def draw(path: Path, name: str, table: Benchmark, by_variant: Mapping[str, Mapping[Trial, Figures]]) -> None:
    """The same as a picture: one dot a variant with its deviation, controls and published figures as lines."""
    means = {variant: mean_of(results, "auroc", len(table.normal)) for variant, results in by_variant.items()}
    figures.comparison(
        path,
        {variant: (m.mean, m.deviation or 0.0) for variant, m in means.items() if m},
        {beside: image.mean for beside, image, *_ in _beside(table, by_variant)},
        title=f"{name}: image AUROC, mean over classes",
    )


def _lines(rows: Iterable[Sequence[object]], *widths: int) -> Iterator[str]:
    """A table in Markdown; the first row is its header."""
    for place, row in enumerate(rows):
        yield f"| {' | '.join(f'{cell!s:{width}}' for cell, width in zip(row, widths, strict=True))} |"
        if place == 0:
            yield f"|{'|'.join('-' * (width + 2) for width in widths)}|"


def _first(by_variant: Mapping[str, Mapping[Trial, Figures]]) -> tuple[str, Mapping[Trial, Figures]]:
    """The first variant of which something is known, and that; nothing where there is none."""
    return next(((variant, results) for variant, results in by_variant.items() if results), ("", {}))


def _beside(
    table: Benchmark, by_variant: Mapping[str, Mapping[Trial, Figures]]
) -> list[tuple[str, Mean, Mean | None, str]]:
    """The controls, and what others published: name, image AUROC, pixel AUROC, source."""
    _, first = _first(by_variant)
    beside: list[tuple[str, Mean, Mean | None, str]] = []
    for name in CONTROLS:
        image = mean_of(first, name, len(table.normal))
        pixel = mean_of(first, f"pixel_{name}", len(table.normal)) if name in MAPPED else None
        if image is not None:
            beside.append((name.replace("_", " "), image, pixel, "control, same split"))
    return beside + [(other.name, Mean(other.auroc), None, other.source) for other in table.published]


def _losing(results: Mapping[Trial, Figures]) -> list[str]:
    """A row that a control beats says so."""
    lost = []
    for row, line in results.items():
        known = {control: float(line[control]) for control in CONTROLS if line[control]}
        best = max(known, key=lambda control: known[control], default="")
        if best and float(line["auroc"]) <= known[best]:
            lost.append(f"  {row.normal}, seed {row.seed}: {line['auroc']} against {line[best]} ({best})")
    return ["", "not above every control:", *lost] if lost else []
