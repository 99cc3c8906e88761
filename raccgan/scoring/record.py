"""The record of an image's score, and tables of records: their columns, JSON, the page and exports follow its fields.

A term of the score is declared here as a field, and computed under the same name in
:meth:`raccgan.scoring.scorer.ScoreModule.terms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raccgan.errors import InputError
from raccgan.models.checkpoint import Checkpoint
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.journal import Row
from raccgan.outputs.report import Report, Shown, write_report


def _term(help: str, title: str) -> Any:
    """A number that stands beside every score: described in exports by ``help``, on the page by ``title``."""
    return field(metadata={"help": help, "title": title})


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """One image's score, what it is made of, and the decision. Fields are columns of tables, in this order."""

    score: float  # higher is more anomalous
    normalised: float = field(init=False)  # the score from 0 to 1, 0.5 at the threshold
    threshold: float
    predicted: str = field(init=False)  # "anomalous" if the score is above the threshold, else "normal"
    nearest_class: str  # the normal class under which the image looks most normal
    residual: float = _term("the image term of the score", "image term")
    feature: float = _term("the feature term of the score, kappa not applied", "feature term")
    density: float = _term("distance of the descriptor from those of normal images", "distance from normal images")
    texture_density: float = _term("distance of the texture from that of normal images", "its texture's distance")
    defect_density: float = _term(
        "distance of the largest errors from those of normal images", "its largest errors' distance"
    )
    pathology: float = _term("how much the image looks like a synthetic pathology, a logit", "like a pathology")
    feature_density: float = _term(
        "distance of the pathology head's features from those of normal images", "its features' distance"
    )
    place_density: float = _term("the same at each place, mean over places", "its places' distance")
    place_peak: float = _term("the same at the place where it is largest", "its farthest place's distance")
    contrast_4: float = _term(
        "distance of the contrast of 4 x 4 regions from that of normal images", "its contrast's distance, 4 x 4"
    )
    contrast_8: float = _term("likewise of 8 x 8 regions", "8 x 8 regions")
    contrast_16: float = _term("likewise of 16 x 16 regions", "16 x 16 regions")
    map_max: float | None = None  # of the anomaly map
    map_x: int | None = None  # the pixel of the upright original at which it lies
    map_y: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "normalised", normalised(self.score, self.threshold))
        object.__setattr__(self, "predicted", decision(self.anomalous))

    @property
    def anomalous(self) -> bool:
        return self.score > self.threshold

    def values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    def to_journal(self) -> dict[str, Any]:
        """What stays when the threshold changes, its numbers as tables show them."""
        return {name: rounded(getattr(self, name)) for name in _KEPT}


FIELDS = tuple(f.name for f in dataclasses.fields(ScoreRecord))
_KEPT = tuple(name for name in FIELDS if name not in ("normalised", "threshold", "predicted"))

# The terms of every score: what each is, and what the page calls it.
TERMS = {f.name: f.metadata["help"] for f in dataclasses.fields(ScoreRecord) if "help" in f.metadata}
TITLES = {f.name: f.metadata["title"] for f in dataclasses.fields(ScoreRecord) if "title" in f.metadata}

FILE_COLUMNS = ("path", *FIELDS)  # of the table of scored files
_OF_FILES = ("threshold", "map_max", "map_x", "map_y")
# Of the table of scored test images; "label" is the true decision.
TEST_COLUMNS = ("path", "class", "label", *(name for name in FIELDS if name not in _OF_FILES))


@dataclass(frozen=True)
class Table:
    """The rows of a whole run with the decisions."""

    records: list[Row]  # by FILE_COLUMNS, and "map", "overlay", "mask" and "boxes" where they were wanted
    strips: list[str]  # of each record, if the rows are of a run with a report
    skipped: list[Row]  # path and reason
    threshold: float

    @classmethod
    def of(cls, rows: Sequence[Row], threshold: float) -> Table:
        """The table of a journal's rows; an InputError if one is not of ours."""
        table = cls([], [], [], rounded(threshold))
        for row in rows:
            if "reason" in row:
                table.skipped.append({"path": row["path"], "reason": row["reason"]})
                continue
            try:
                record = ScoreRecord(threshold=table.threshold, **{name: row[name] for name in _KEPT}).values()
            except (KeyError, TypeError):
                raise InputError("the journal of this run is damaged: add --restart to score anew") from None
            files = {name: row[name] for name in ("map", "overlay", "mask", "boxes") if name in row}
            table.records.append({"path": row["path"]} | record | {"normalised": rounded(record["normalised"])} | files)
            table.strips.append(row.get("strip", ""))
        return table

    @property
    def anomalous(self) -> int:
        return sum(record["predicted"] == "anomalous" for record in self.records)

    def write(self, out: Path, made_with: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """``scores.csv``, ``scores.json`` and ``summary.json``, which holds ``about`` and what the scores depend on."""
        write_csv(out / "scores.csv", FILE_COLUMNS, (cells(record, FILE_COLUMNS) for record in self.records))
        write_json(out / "scores.json", self.records)
        summary: Row = {"scored": len(self.records), "anomalous": self.anomalous, "skipped": len(self.skipped)}
        summary |= {"threshold": self.threshold, **about, "made_with": dict(made_with), "skipped_files": self.skipped}
        write_json(out / "summary.json", summary)

    def write_report(self, path: Path, stored: Checkpoint, run: str, marked: float | None = None) -> None:
        """The page of a table whose rows were scored for a report, by a checkpoint that the user calls ``run``.

        ``marked`` is the threshold of the pixels that have a line round them, if any have.
        """
        held_out = stored.held_out["score"].tolist() if stored.held_out else []
        report = Report(
            title=f"{len(self.records)} images scored with {run}",
            threshold=self.threshold,
            terms=TITLES,
            images=[Shown(record, strip) for record, strip in zip(self.records, self.strips, strict=True)],
            held_out=[rounded(score) for score in held_out],
            skipped=self.skipped,
            facts={
                "normal classes": ", ".join(stored.classes),
                "model": f"{stored.config['image_size']} px",
                **about_marks(marked),
            },
            run=run,
        )
        write_report(path, report)


def about_marks(threshold: float | None) -> dict[str, str]:
    """What a page says about the line round anomalous pixels; nothing where there is none."""
    return {} if threshold is None else {"green line": f"round pixels whose map is above {threshold:.4g}"}


def normalised(score: float, threshold: float) -> float:
    """A score from 0 to 1: s / (s + t), which is 0.5 at the threshold t and 2/3 at twice the threshold.

    It grows with the score. Scores are distances, so none is below 0; one below 0 is 0 here. Of a threshold that is not
    above 0, all that is above it is 1.
    """
    if threshold <= 0:
        return 0.5 if score == threshold else float(score > threshold)
    return max(score, 0.0) / (max(score, 0.0) + threshold)


def decision(anomalous: bool) -> str:
    """The word for a decision in tables and pictures."""
    return "anomalous" if anomalous else "normal"


def rounded(value: Any) -> Any:
    """A float to nine significant digits, which tell every float32 from its neighbours; anything else as it is."""
    return float(f"{value:.9g}") if isinstance(value, float) else value


def cells(row: Mapping[str, Any], columns: tuple[str, ...]) -> list[Any]:
    """The cells of a row of a table, floats as text of nine significant digits."""
    return [f"{value:.9g}" if isinstance(value := row[name], float) else value for name in columns]
