"""Runs one row of a table in a folder of its own, from images to figures. A stopped row continues."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch

from raccgan.config import SCORES
from raccgan.data.samples import spread
from raccgan.evaluation.assessment import evaluate_run
from raccgan.evaluation.beside import MAPPED
from raccgan.evaluation.metrics import auroc
from raccgan.experiment.results import KEY, Figures
from raccgan.experiment.tables import Trial
from raccgan.models import checkpoint as checkpoints
from raccgan.scoring.calibration import calibrate, fitted_scorer, score_dataset
from raccgan.scoring.scorer import FORMULAS, Scored, Scorer, concatenate
from raccgan.training.loop import PHASES, Training
from raccgan.training.run import Run, prepare

SPARE = 3000  # the most anomalous images of the training part that are scored
TIMED = 1000  # the most test images that are scored for the time of scoring


def execute(row: Trial, folder: Path, device: torch.device, data_root: Path) -> Figures:
    """Train and judge one row, and return its line; part of the row that is in its folder is continued.

    An InputError for whatever is wrong with data, settings or folder, and for numbers that are not finite; a
    :class:`raccgan.training.loop.Interrupted` after Ctrl-C, when the step is finished and saved.
    """
    run = prepare(row.config, data_root, device)
    stored = checkpoints.load(folder) if (folder / checkpoints.NAME).exists() else None
    if stored is not None:
        checkpoints.check_same_model(stored, run.config, run.classes, run.channels)
    training = Training(run, run.dataset(run.split.train), folder / checkpoints.NAME, stored)
    for phase in PHASES:
        training.run(phase)
    held_out = run.dataset(run.split.held_out)
    scorer = fitted_scorer(run.config, training.networks, run.classes, training.data, held_out)
    training.calibration = calibration = calibrate(scorer, held_out, quantile=run.config.quantile)
    training.save(PHASES[-1])
    seconds, history = training.seconds, training.history
    assessment = evaluate_run(folder, run, scorer, calibration, seconds=seconds, history=history)
    assert assessment is not None  # a row is of one process
    found, kinds = assessment.metrics, _kinds(scorer, assessment.scored)
    return {
        **dict(zip(KEY, row.key, strict=True)),
        "auroc": _figure(found["image"]["auroc"]),
        "pixel_auroc": _figure(found["pixel"]["auroc"]),
        **{name: _figure(control["auroc"]) for name, control in found["controls"].items()},
        **{f"pixel_{name}": _figure(found["controls"][name]["pixel_auroc"]) for name in MAPPED},
        **{f"auroc_{name}": _figure(auroc(scores, assessment.anomalous)) for name, scores in kinds.items()},
        **_choices(run, scorer),
        "train_seconds": f"{found['seconds']:.0f}",
        "score_seconds_per_1000": f"{_scoring_seconds(run, scorer):.2f}",
        "steps": "+".join(str(getattr(run.config, f"{phase}_steps")) for phase in PHASES),
        "kernels": run.config.kernels,
        "threads": str(torch.get_num_threads()),
        "machine": _machine(run.device),
        "torch": torch.__version__,
    }


def _choices(run: Run, scorer: Scorer) -> Figures:
    spare = spread(run.split.spare, SPARE)
    bad = run.dataset(spare).problems()  # which nobody has read yet, as neither training nor tests need them
    spare = [sample for index, sample in enumerate(spare) if index not in bad]
    if not spare:
        return {f"choice_{name}": "" for name in SCORES}
    parts = (score_dataset(scorer, run.dataset(s), "scores to choose by") for s in (run.split.held_out, spare))
    kinds = _kinds(scorer, concatenate([part for part in parts if part is not None]))
    anomalous = np.repeat([False, True], [len(run.split.held_out), len(spare)])
    return {f"choice_{name}": _figure(auroc(scores, anomalous)) for name, scores in kinds.items()}


def _kinds(scorer: Scorer, scored: Scored) -> dict[str, np.ndarray]:
    """Every kind of score, [N], under the class that the model's own score chose."""
    reconstruction = scored.terms["residual"] + scorer.module.kappa * scored.terms["feature"]
    terms = scored.terms | {"reconstruction": reconstruction}
    return {name: FORMULAS[name](scorer.module.evidence, terms).numpy() for name in SCORES}


def _scoring_seconds(run: Run, scorer: Scorer) -> float:
    """Seconds that a thousand images take, decoded beforehand."""
    test = run.dataset(run.split.test)
    images = test.images(range(min(TIMED, len(test))))
    begun = time.monotonic()
    for part in images.split(scorer.batch):
        scorer.score(part)
    return (time.monotonic() - begun) * 1000 / len(images)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
