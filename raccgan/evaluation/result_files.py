"""The files of an evaluation: ``metrics.json``, ``scores.csv``, the pictures and, where asked for, ``report.html``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raccgan.evaluation.assessment import Assessment, assess, shown, true_mask
from raccgan.evaluation.result_pictures import write_pictures
from raccgan.models.checkpoint import Calibration, History
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.overlays import MapScale
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.record import TEST_COLUMNS, TITLES, ScoreRecord, cells, decision
from raccgan.scoring.scorer import Scorer
from raccgan.training.run import Run


def evaluate_run(
    out: Path,
    run: Run,
    scorer: Scorer,
    calibration: Calibration,
    *,
    seconds: float,
    history: History,
    report_of: str = "",
) -> Assessment | None:
    """Assess a trained run on its test images, and write the results into the folder ``out``.

    All ranks call it together; rank 0 alone writes.

    Args:
        out: the folder, which is there.
        run, scorer, calibration: the data, the scores and the threshold.
        seconds: training time, for the record.
        history: losses by name, for the picture of them.
        report_of: the user's name for the run, with which ``report.html`` is written; empty for no report.

    Returns:
        What was found; None on ranks but the first.
    """
    assessment = assess(run, scorer, calibration.threshold, seconds=seconds, details=bool(report_of))
    if assessment is None:
        return None
    write_json(out / "metrics.json", assessment.metrics)
    rows = _rows(run, assessment)
    write_csv(out / "scores.csv", TEST_COLUMNS, (cells(row, TEST_COLUMNS) for row in rows))
    write_pictures(out, run, assessment, scorer, history)
    if report_of:
        _write_page(out / "report.html", run, assessment, calibration, rows, report_of)
    return assessment


def _rows(run: Run, assessment: Assessment) -> list[dict[str, Any]]:
    """The truth and the record of each test image, by TEST_COLUMNS and more."""
    known = zip(run.split.test, assessment.anomalous.tolist(), assessment.scored.rows(run.classes), strict=True)
    return [
        {"path": sample.key, "class": sample.label, "label": decision(anomalous)}
        | ScoreRecord(threshold=assessment.threshold, **row).values()
        for sample, anomalous, row in known
    ]


def _write_page(
    path: Path, run: Run, assessment: Assessment, calibration: Calibration, rows: list[dict[str, Any]], name: str
) -> None:
    """The report of an assessment with details."""
    scored, scale = assessment.scored, MapScale.of(calibration.held_out)
    assert scored.map is not None
    assert scored.reconstruction is not None
    test = run.dataset(run.split.test)
    images = []
    for i, (sample, row) in enumerate(zip(run.split.test, rows, strict=True)):
        map, image = scored.map[i].numpy(), test.images([i])[0].numpy()
        picture = strip(image, scored.reconstruction[i].numpy(), map, scale, true_mask(run, sample))
        images.append(Shown(row | {"map_max": float(map.max())}, picture))
    beside = assessment.metrics["controls"].items()
    report = Report(
        title=f"{name} against the test images of {run.config.dataset}",
        threshold=assessment.threshold,
        terms=TITLES,
        images=images,
        held_out=calibration.held_out["score"].tolist() if calibration.held_out else (),
        facts={
            "normal classes": ", ".join(run.classes),
            "protocol": run.config.protocol,
            **{f"{control.replace('_', ' ')} AUROC": shown(found["auroc"]) for control, found in beside},
        },
        run=name,
        auroc=assessment.metrics["image"]["auroc"],
        auprc=assessment.metrics["image"]["auprc"],
    )
    write_report(path, report)
