"""Runs one row of a table in a folder of its own, from images to figures. A stopped row continues."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch

from raccgan.config import SCORES
from raccgan.data.samples import spread
from raccgan.evaluation.assessment import Assessment
from raccgan.evaluation.metrics import image_metrics
from raccgan.evaluation.result_files import evaluate_run
from raccgan.experiment.results import Figures, choice_column, pixel_column, score_column
from raccgan.experiment.tables import Trial
from raccgan.models import checkpoint as checkpoints
from raccgan.models.density import Distances
from raccgan.scoring.calibration import calibrate, fit_density, score_dataset
from raccgan.scoring.score_module import combined
from raccgan.scoring.scorer import Scored, Scorer
from raccgan.training.loop import PHASES, Training
from raccgan.training.run import Run, prepare

SPARE = 3000
"""The most anomalous images of the training part that are scored."""


def execute(row: Trial, folder: Path, device: torch.device, data_root: Path) -> Figures:
    """Train and judge one row in its folder, which is there; part of it that is in there is continued.

    Returns:
        The row's line of the results, by column.

    Raises:
        InputError: whatever is wrong with data, settings or folder, and numbers that are not finite.
        raccgan.training.loop.Interrupted: Ctrl-C, after the step was finished and saved.
    """
    run = prepare(row.config, data_root, device)
    stored = checkpoints.load(folder) if (folder / checkpoints.NAME).exists() else None
    if stored is not None:
        checkpoints.check_same_model(stored, run.config, run.classes, run.channels)
    training = Training(run, run.dataset(run.split.train), folder / checkpoints.NAME, stored)
    for phase in PHASES:
        training.run(phase)
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    scorer = Scorer(run.config, training.networks, run.classes)
    held_out = run.dataset(run.split.held_out)
    training.calibration = calibration = calibrate(scorer, held_out, quantile=run.config.quantile)
    training.save(PHASES[-1])
    seconds, history = training.seconds, training.history
    assessment = evaluate_run(folder, run, scorer, calibration, seconds=seconds, history=history)
    assert assessment is not None  # a row is of one process
    return _result(row, run, scorer, assessment)


def _result(row: Trial, run: Run, scorer: Scorer, assessment: Assessment) -> Figures:
    found = assessment.metrics
    variant, normal, seed, digest = row.key
    return {
        "variant": variant,
        "normal": normal,
        "seed": seed,
        "digest": digest,
        "auroc": _figure(found["image"]["auroc"]),
        "pixel_auroc": _figure(found["pixel"]["auroc"]),
        **{name: _figure(control["auroc"]) for name, control in found["controls"].items()},
        **{pixel_column(name): _figure(control["pixel_auroc"]) for name, control in found["controls"].items()},
        **_scores(run, scorer, assessment),
        "train_seconds": f"{found['seconds']:.0f}",
        "score_seconds_per_1000": f"{_scoring_seconds(run, scorer):.2f}",
        "steps": f"{run.config.gan_steps}+{run.config.encoder_steps}",
        "kernels": run.config.kernels,
        "threads": str(torch.get_num_threads()),
        "machine": _machine(run.device),
        "torch": torch.__version__,
    }


def _scores(run: Run, scorer: Scorer, assessment: Assessment) -> dict[str, str]:
    """The AUROC of every kind of score, under the condition that the model's own chose, tested and to choose by."""
    kinds = _kinds(scorer, assessment.scored)
    tested = {score_column(name): _auroc(scores, assessment.anomalous) for name, scores in kinds}
    return tested | _choices(run, scorer)


def _choices(run: Run, scorer: Scorer) -> dict[str, str]:
    """Held-out images against the anomalous ones of the training part, by which a kind may be chosen."""
    spare = spread(run.split.spare, SPARE)
    if not spare:
        return dict.fromkeys(map(choice_column, SCORES), "")
    normal, anomalous = (
        score_dataset(scorer, run.dataset(samples), "scores to choose by") for samples in (run.split.held_out, spare)
    )
    assert normal is not None
    assert anomalous is not None
    labels = np.arange(len(normal.score) + len(spare)) >= len(normal.score)
    kinds = zip(_kinds(scorer, normal), _kinds(scorer, anomalous), strict=True)
    return {choice_column(name): _auroc(np.concatenate([low, high]), labels) for (name, low), (_, high) in kinds}


def _kinds(scorer: Scorer, scored: Scored) -> list[tuple[str, np.ndarray]]:
    """Each kind of score, [N]."""
    reconstruction = scored.terms["residual"] + scorer.module.kappa * scored.terms["feature"]
    distances = Distances(*(scored.terms[name] for name in Distances._fields))
    return [(name, combined(name, reconstruction, distances).numpy()) for name in SCORES]


def _auroc(scores: np.ndarray, anomalous: np.ndarray) -> str:
    return _figure(image_metrics(scores, anomalous, float(np.median(scores))).auroc)


def _scoring_seconds(run: Run, scorer: Scorer, most: int = 1000) -> float:
    """Seconds that a thousand images take, decoded beforehand."""
    test = run.dataset(run.split.test)
    images = test.images(range(min(most, len(test))))
    begun = time.monotonic()
    scorer.score_batches(lambda indices: images[indices], len(images))
    return (time.monotonic() - begun) * 1000 / len(images)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
