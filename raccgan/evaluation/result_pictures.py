"""The pictures of an evaluation: samples, reconstructions, losses, ROC and histogram."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from raccgan.evaluation.assessment import Assessment, true_mask
from raccgan.evaluation.metrics import roc
from raccgan.models.checkpoint import History
from raccgan.models.randomness import stream
from raccgan.outputs import figures
from raccgan.outputs.pictures import sample_grid
from raccgan.scoring.scorer import Scorer
from raccgan.training.run import Run

MOST_CLASSES = 20
"""Rows of ``samples.png``."""


def write_pictures(out: Path, run: Run, assessment: Assessment, scorer: Scorer, history: History) -> None:
    """``samples.png``, ``reconstructions.png``, and where there is something to show ``losses.png`` and ``roc.png``."""
    _write_samples(out / "samples.png", run, scorer)
    _write_reconstructions(out / "reconstructions.png", run, assessment, scorer)
    if history:
        figures.loss_curves(out / "losses.png", history)
    if assessment.anomalous.any() and not assessment.anomalous.all():
        _write_roc(out / "roc.png", assessment)


@torch.inference_mode()
def _write_samples(path: Path, run: Run, scorer: Scorer, columns: int = 10) -> None:
    """Generated images of each normal class, from the run's seed."""
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
    assert scored.map is not None
    assert scored.reconstruction is not None
    rows = [
        figures.Reconstruction(
            original=images[row].numpy(),
            reconstruction=scored.reconstruction[row].numpy(),
            map=scored.map[row].numpy(),
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

    def curve(values: ArrayLike, auroc: float | None) -> figures.RocCurve:
        return figures.RocCurve(*roc(values, anomalous), auroc)

    curves = {"RA-CCGAN": curve(scores, assessment.metrics["image"]["auroc"])}
    for name, values in assessment.controls.items():
        curves[name.replace("_", " ")] = curve(values, assessment.metrics["controls"][name]["auroc"])
    figures.roc_and_histogram(path, scores, anomalous, assessment.threshold, curves)
