"""The files of an evaluation: ``metrics.json``, ``scores.csv``, the pictures and, where asked for, ``report.html``."""

from __future__ import annotations

from pathlib import Path

from raccgan.evaluation.assessment import Assessment, assess, shown, true_mask
from raccgan.evaluation.result_pictures import write_pictures
from raccgan.models.checkpoint import Calibration, History
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.overlays import MapScale
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.scorer import TERMS, Scorer, decision
from raccgan.training.run import Run

SCORES_HEADER = ("path", "class", "label", "score", "predicted", "nearest_class", *TERMS)


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
    _write_scores(out / "scores.csv", run, assessment)
    write_pictures(out, run, assessment, scorer, history)
    if report_of:
        _write_page(out / "report.html", run, assessment, calibration, report_of)
    return assessment


def _write_scores(path: Path, run: Run, assessment: Assessment) -> None:
    scored = assessment.scored
    columns = (
        run.split.test,
        assessment.anomalous.tolist(),
        scored.score.tolist(),
        scored.condition.tolist(),
        scored.terms(),
    )
    rows = (
        (
            sample.key,
            sample.label,
            decision(anomalous),
            f"{value:.9g}",
            decision(value > assessment.threshold),
            run.classes[condition],
            *(f"{term:.9g}" for term in terms.values()),
        )
        for sample, anomalous, value, condition, terms in zip(*columns, strict=True)
    )
    write_csv(path, SCORES_HEADER, rows)


def _write_page(path: Path, run: Run, assessment: Assessment, calibration: Calibration, name: str) -> None:
    """The report of an assessment with details."""
    scored, scale = assessment.scored, MapScale.of(calibration.held_out)
    assert scored.map is not None
    assert scored.reconstruction is not None
    test = run.dataset(run.split.test)
    images = []
    for i, (sample, terms) in enumerate(zip(run.split.test, scored.terms(), strict=True)):
        map, image = scored.map[i].numpy(), test.images([i])[0].numpy()
        images.append(
            Shown(
                path=sample.key,
                score=float(scored.score[i]),
                nearest_class=run.classes[int(scored.condition[i])],
                **terms,
                map_max=float(map.max()),
                strip=strip(image, scored.reconstruction[i].numpy(), map, scale, true_mask(run, sample)),
                label=sample.label,
                anomalous=bool(assessment.anomalous[i]),
            )
        )
    beside = assessment.metrics["controls"].items()
    report = Report(
        title=f"{name} against the test images of {run.config.dataset}",
        threshold=assessment.threshold,
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
