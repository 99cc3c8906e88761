"""Tests a trained run on its test images: scores and metrics, the plain controls beside them, and files of all that."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raccgan.data.images.decode import decode_mask
from raccgan.data.samples import Sample
from raccgan.evaluation import metrics
from raccgan.evaluation.beside import Control, trained_on_nothing_else, untrained
from raccgan.models.checkpoint import Calibration, History
from raccgan.models.maps import smoothed
from raccgan.models.randomness import stream
from raccgan.outputs import figures
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.overlays import MapScale
from raccgan.outputs.pictures import sample_grid
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.calibration import score_dataset, without_reconstructions
from raccgan.scoring.record import TEST_COLUMNS, TITLES, ScoreRecord, about_marks, cells, decision
from raccgan.scoring.scorer import Scored, Scorer
from raccgan.training.run import Run

MOST_CLASSES = 20
"""Rows of ``samples.png``."""


@dataclass(frozen=True)
class Assessment:
    """A run's scores on its N test images, and what metrics and tables are made of."""

    metrics: dict[str, Any]  # the content of metrics.json
    scored: Scored
    anomalous: NDArray[np.bool_]  # [N], the truth
    threshold: float
    controls: dict[str, Control]

    def by_auroc(self) -> list[str]:
        """The controls whose image AUROC is defined, the best first."""
        known = {name: found["auroc"] for name, found in self.metrics["controls"].items() if found["auroc"] is not None}
        return sorted(known, key=lambda name: -known[name])

    def best_control(self) -> str:
        """Its name and image AUROC."""
        for name in self.by_auroc()[:1]:
            return f"{name.replace('_', ' ')} {_shown(self.metrics['controls'][name]['auroc'])}"
        return "n/a"

    def summary(self) -> str:
        """Metrics and decisions in two lines, and one on the masks that are missing, for the terminal."""
        image, pixel, confusion = self.metrics["image"], self.metrics["pixel"], self.metrics["image"]["confusion"]
        marked = f", F1 {_shown(pixel['f1'])}, IoU {_shown(pixel['iou'])}" if pixel["f1"] is not None else ""
        pixels = f", pixel AUROC {_shown(pixel['auroc'])}{marked}" if pixel["auroc"] is not None else ""
        of_pixels = self.metrics["masks"]
        left_out = f"\n{of_pixels['note']}" if of_pixels["note"] else ""
        anomalies = confusion["true_positive"] + confusion["false_negative"]
        normal = confusion["false_positive"] + confusion["true_negative"]
        return (
            f"image AUROC {_shown(image['auroc'])}, AUPR {_shown(image['auprc'])}{pixels}  "
            f"(best control: {self.best_control()})\n"
            f"at threshold {self.threshold:.4g}: {confusion['true_positive']} of {anomalies} anomalies found, "
            f"{confusion['false_positive']} of {normal} normal images taken for anomalies{left_out}"
        )


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
    assessment = _assess(run, scorer, calibration, seconds=seconds, details=bool(report_of))
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
def _write_samples(path: Path, run: Run, scorer: Scorer) -> None:
    draw = stream(run.config.seed, "samples")
    rows = {}
    for index, name in enumerate(run.classes[:MOST_CLASSES]):
        z = torch.randn(10, run.config.latent_size, generator=draw).to(run.device)
        y = torch.full((10,), index, device=run.device)
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
            mask=_true_mask(run, sample),
        )
        for row, (i, sample) in enumerate(zip(chosen, samples, strict=True))
    ]
    figures.reconstructions(path, rows)


def _write_roc(path: Path, assessment: Assessment) -> None:
    scores, anomalous = assessment.scored.score.numpy(), assessment.anomalous
    curves = {"RA-CCGAN": figures.RocCurve(*metrics.roc(scores, anomalous), assessment.metrics["image"]["auroc"])}
    for name in assessment.by_auroc()[:2]:
        values, auroc = assessment.controls[name].scores, assessment.metrics["controls"][name]["auroc"]
        curves[name.replace("_", " ")] = figures.RocCurve(*metrics.roc(values, anomalous), auroc)
    figures.roc_and_histogram(path, scores, anomalous, assessment.threshold, curves)


def _write_page(
    path: Path, run: Run, assessment: Assessment, calibration: Calibration, rows: list[dict[str, Any]], name: str
) -> None:
    scale, test, images = MapScale.of(calibration.held_out), run.dataset(run.split.test), []
    for i, (sample, row, map, reconstruction) in enumerate(
        zip(run.split.test, rows, *assessment.scored.details(), strict=True)
    ):
        threshold = calibration.pixel_threshold
        predicted = None if threshold is None else map > np.float64(threshold)
        mask = _true_mask(run, sample)
        picture = strip(test.images([i])[0].numpy(), reconstruction, map, scale, mask, predicted=predicted)
        images.append(Shown(row | {"map_max": float(map.max())}, picture))
    report = Report(
        title=f"{name} against the test images of {run.config.dataset}",
        threshold=assessment.threshold,
        terms=TITLES,
        images=images,
        held_out=calibration.held_out["score"].tolist() if calibration.held_out else (),
        facts={
            "normal classes": ", ".join(run.classes),
            "protocol": run.config.protocol,
            **about_marks(calibration.pixel_threshold),
            "best control's AUROC": assessment.best_control(),
        },
        run=name,
        auroc=assessment.metrics["image"]["auroc"],
        auprc=assessment.metrics["image"]["auprc"],
    )
    write_report(path, report)


def _assess(
    run: Run, scorer: Scorer, calibration: Calibration, *, seconds: float, details: bool = False
) -> Assessment | None:
    """Score the test images, and compute the metrics and those of the controls; None on ranks but the first.

    ``seconds`` is the training time, for the record; ``details`` keeps maps and reconstructions, for a report.
    """
    test, threshold = run.dataset(run.split.test), calibration.threshold
    has_masks = any(sample.mask is not None for sample in run.split.test)
    whole = {} if details else {"kept": without_reconstructions}
    scored = score_dataset(scorer, test, "test scores", details=has_masks or details, **whole)
    behind_untrained = untrained(run, test)
    if scored is None or behind_untrained is None:
        return None
    anomalous = np.array([run.split.is_anomalous(sample) for sample in run.split.test])
    beside = trained_on_nothing_else(run, test) | {"untrained": Control(behind_untrained.score.double().numpy())}
    pixel = metrics.PixelMetrics(auroc=None, aupro=None)
    pixel_aurocs: dict[str, float | None] = dict.fromkeys(beside)
    masks = _masks(run)
    if masks.images:
        truth = masks.stacked()
        assert scored.map is not None
        maps_of = scored.map.numpy()[masks.images]
        pixel = metrics.pixel_metrics(maps_of, truth, threshold=calibration.pixel_threshold)
        for name, control in beside.items():
            if control.maps is not None:  # smoothed as ours are
                pixel_aurocs[name] = metrics.pixel_metrics(smoothed(control.maps[masks.images]).numpy(), truth).auroc
    found = {
        "image": dataclasses.asdict(metrics.image_metrics(scored.score.numpy(), anomalous, threshold)),
        "pixel": dataclasses.asdict(pixel),
        "masks": {
            "images": len(masks.images),
            "without_mask": masks.without,
            "empty": masks.empty,
            "note": masks.note(int(anomalous.sum())),
        },
        "controls": {
            name: {"auroc": metrics.auroc(control.scores, anomalous), "pixel_auroc": pixel_aurocs[name]}
            for name, control in beside.items()
        },
        "threshold": threshold,
        "seed": run.config.seed,
        "seconds": round(seconds, 1),
        "kernels": run.config.kernels,
        "device": str(run.device),
        "dataset": run.config.dataset,
        "protocol": run.config.protocol,
        "normal_classes": run.classes,
        "images": {
            "train": len(run.split.train),
            "held_out": len(run.split.held_out),
            "test_normal": int((~anomalous).sum()),
            "test_anomalous": int(anomalous.sum()),
        },
    }
    return Assessment(found, scored, anomalous, threshold, beside)


def _true_mask(run: Run, sample: Sample) -> NDArray[np.bool_] | None:
    """The anomalous pixels [H, W] of a sample, in the square that the model sees; None without a mask file."""
    if sample.mask is None:
        return None
    return decode_mask(sample.mask, sample.image, size=run.config.image_size, fit=run.config.fit)


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


@dataclass(frozen=True)
class _Masks:
    """The test images whose every pixel is known to be normal or anomalous, and how many anomalous ones are not."""

    size: int
    images: list[int]  # places among the test images; empty where no anomalous image has a mask
    known: list[NDArray[np.bool_] | None]  # of each of these; None where all is normal
    without: int  # anomalous images without a mask
    empty: int  # anomalous images whose masks mark nothing that the model sees

    def stacked(self) -> NDArray[np.bool_]:
        """[N, H, W]."""
        masks = np.zeros((len(self.known), self.size, self.size), dtype=bool)
        for place, mask in enumerate(self.known):
            if mask is not None:
                masks[place] = mask
        return masks

    def note(self, anomalous: int) -> str | None:
        """Why there are no pixel metrics, or how many images they leave out; None where there is nothing to say."""
        if not anomalous:
            return "no pixel metrics: no test image is anomalous"
        reasons = {"have no mask": self.without, "have one that marks nothing that the model sees": self.empty}
        said = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
        if not self.images:
            return f"no pixel metrics: of {anomalous} anomalous test images {said}"
        return f"left out of pixel metrics: of {anomalous} anomalous test images {said}" if said else None


def _masks(run: Run) -> _Masks:
    """An image of a normal class is normal everywhere, unless a mask says otherwise."""
    images: list[int] = []
    known: list[NDArray[np.bool_] | None] = []
    without, empty, marked = 0, 0, 0
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(partial(_true_mask, run), run.split.test))
    for place, (sample, mask) in enumerate(zip(run.split.test, read, strict=True)):
        if run.split.is_anomalous(sample):
            without += mask is None
            empty += mask is not None and not mask.any()
            if mask is None or not mask.any():
                continue
            marked += 1
        images.append(place)
        known.append(mask)
    if marked == 0:
        images, known = [], []
    return _Masks(run.config.image_size, images, known, without, empty)
