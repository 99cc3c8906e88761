"""Writes the rows of a journal as tables: scores.csv, scores.json, summary.json and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raccgan.errors import InputError
from raccgan.models.checkpoint import Checkpoint
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.journal import Row
from raccgan.outputs.report import Report, Shown, write_report
from raccgan.scoring.record import FILE_COLUMNS, TITLES, ScoreRecord, cells, rounded


@dataclass(frozen=True)
class Table:
    """The rows of a whole run with the decisions."""

    records: list[Row]  # by FILE_COLUMNS, and "map" and "overlay" where they were wanted
    strips: list[str]  # of each record, if the rows are of a run with a report
    skipped: list[Row]  # path and reason
    threshold: float

    @classmethod
    def of(cls, rows: Sequence[Row], threshold: float) -> Table:
        """The table of a journal's rows.

        Raises:
            InputError: a row is not one of ours.
        """
        table = cls([], [], [], rounded(threshold))
        for row in rows:
            if "reason" in row:
                table.skipped.append({"path": row["path"], "reason": row["reason"]})
                continue
            try:
                record = ScoreRecord.from_journal(row, table.threshold).values()
            except (KeyError, TypeError):
                raise InputError("the journal of this run is damaged: add --restart to score anew") from None
            files = {name: row[name] for name in ("map", "overlay") if name in row}
            table.records.append({"path": row["path"]} | record | files)
            table.strips.append(row.get("strip", ""))
        return table

    @property
    def anomalous(self) -> int:
        """How many images are."""
        return sum(record["predicted"] == "anomalous" for record in self.records)

    def write(self, out: Path, made_with: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """``scores.csv``, ``scores.json`` and ``summary.json``, which holds ``about`` and what the scores depend on."""
        write_csv(out / "scores.csv", FILE_COLUMNS, (cells(record, FILE_COLUMNS) for record in self.records))
        write_json(out / "scores.json", self.records)
        summary: Row = {"scored": len(self.records), "anomalous": self.anomalous, "skipped": len(self.skipped)}
        summary |= {"threshold": self.threshold, **about, "made_with": dict(made_with), "skipped_files": self.skipped}
        write_json(out / "summary.json", summary)

    def write_report(self, path: Path, stored: Checkpoint, run: str) -> None:
        """The page of a table whose rows were scored for a report, by a checkpoint that the user calls ``run``."""
        held_out = stored.held_out["score"].tolist() if stored.held_out else []
        report = Report(
            title=f"{len(self.records)} images scored with {run}",
            threshold=self.threshold,
            terms=TITLES,
            images=[Shown(record, strip) for record, strip in zip(self.records, self.strips, strict=True)],
            held_out=[rounded(score) for score in held_out],
            skipped=self.skipped,
            facts={"normal classes": ", ".join(stored.classes), "model": f"{stored.config['image_size']} px"},
            run=run,
        )
        write_report(path, report)
