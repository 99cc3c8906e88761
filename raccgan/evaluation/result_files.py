"""The files of an evaluation: ``metrics.json``, ``scores.csv``, the pictures and, where asked for, ``report.html``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raccgan.evaluation.assessment import Assessment, assess, shown, true_mask
from raccgan.evaluation.metrics import roc
from raccgan.models.checkpoint import Calibration, History
from raccgan.models.randomness import stream
from raccgan.outputs import figures
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.overlays import MapScale
from raccgan.outputs.pictures import sample_grid
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.record import TEST_COLUMNS, TITLES, ScoreRecord, cells, decision
from raccgan.scoring.scorer import Scorer
from raccgan.training.run import Run

MOST_CLASSES = 20
"""Rows of ``samples.png``."""


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
    """Assess a trained run on its test images, and write the results into the folder ``out``, which is there.

    All ranks call it together; rank 0 alone writes and gets the assessment.

    Args:
        seconds: training time, for the record.
        history: losses by name, for the picture of them.
        report_of: the user's name for the run, with which ``report.html`` is written; empty for no report.
    """
    assessment = assess(run, scorer, calibration.threshold, seconds=seconds, details=bool(report_of))
    if assessment is None:
        return None
    write_json(out / "metrics.json", assessment.metrics)
    rows = _rows(run, assessment)
    write_csv(out / "scores.csv", TEST_COLUMNS, (cells(row, TEST_COLUMNS) for row in rows))
    _write_samples(out / "samples.png", run, scorer)
    _write_reconstructions(out / "reconstructions.png", run, assessment, scorer)
    if history:
        figures.loss_curves(out / "losses.png", history)
    if assessment.anomalous.any() and not assessment.anomalous.all():
        _write_roc(out / "roc.png", assessment)
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


@torch.inference_mode()
def _write_samples(path: Path, run: Run, scorer: Scorer, columns: int = 10) -> None:
    draw = stream(run.config.seed, "samples")
    rows = {}
    for index, name in enumerate(run.classes[:MOST_CLASSES]):
        z = torch.randn(columns, run.config.latent_size, generator=draw).to(run.device)
        y = torch.full((columns,), index, device=run.device)
        rows[name] = scorer.module.generator(z, y).float().cpu().numpy()
    sample_grid(path, rows, title="generated, one row a normal class")


def _write_reconstructions(path: Path, run: Run, assessment: Assessment, scorer: Scorer, each: int = 6) -> None:
    """Some normal and some anomalous test images, drawn without looking at their scores."""
    draw = random.Random(run.config.seed)
    chosen: list[int] = []
    for wanted in (False, True):
        members = np.flatnonzero(assessment.anomalous == wanted).tolist()
        chosen += sorted(draw.sample(members, min(each, len(members))))
    samples = [run.split.test[i] for i in chosen]
    images = run.dataset(samples).images(range(len(samples)))
    scored = scorer.score(images, details=True)
    maps, reconstructions = scored.details()
    rows = [
        figures.Reconstruction(
            original=images[row].numpy(),
            reconstruction=reconstructions[row],
            map=maps[row],
            name=sample.key,
            label=sample.label,
            score=float(scored.score[row]),
            anomalous=bool(assessment.anomalous[i]),
            predicted=bool(scored.score[row] > assessment.threshold),
            mask=true_mask(run, sample),
        )
        for row, (i, sample) in enumerate(zip(chosen, samples, strict=True))
    ]
    figures.reconstructions(path, rows)


def _write_roc(path: Path, assessment: Assessment) -> None:
    scores, anomalous = assessment.scored.score.numpy(), assessment.anomalous
    curves = {"RA-CCGAN": figures.RocCurve(*roc(scores, anomalous), assessment.metrics["image"]["auroc"])}
    for name, values in assessment.controls.items():
        auroc = assessment.metrics["controls"][name]["auroc"]
        curves[name.replace("_", " ")] = figures.RocCurve(*roc(values, anomalous), auroc)
    figures.roc_and_histogram(path, scores, anomalous, assessment.threshold, curves)


def _write_page(
    path: Path, run: Run, assessment: Assessment, calibration: Calibration, rows: list[dict[str, Any]], name: str
) -> None:
    scale, test, images = MapScale.of(calibration.held_out), run.dataset(run.split.test), []
    for i, (sample, row, map, reconstruction) in enumerate(
        zip(run.split.test, rows, *assessment.scored.details(), strict=True)
    ):
        picture = strip(test.images([i])[0].numpy(), reconstruction, map, scale, true_mask(run, sample))
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
