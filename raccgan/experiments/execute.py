"""One row of a table, from the images to the figures: trained, or continued, in a folder of its own."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch

from raccgan import checkpoint as checkpoints
from raccgan.evaluation import Evaluation, calibrate, evaluate, fit_density, score, write_results
from raccgan.experiments.compositions import composed, terms_of
from raccgan.experiments.results import Result, composition_column
from raccgan.experiments.tables import Row
from raccgan.metrics import image_metrics
from raccgan.run import Run, prepare
from raccgan.scoring import Scorer
from raccgan.training import PHASES, Training


def execute(row: Row, folder: Path, device: torch.device, data_root: Path) -> Result:
    """Train and judge one row in its folder, which is there; part of it that is in there is continued.

    Returns:
        The row's line of the results, by column.

    Raises:
        InputError: whatever is wrong with data, settings or folder, and numbers that are not finite.
        raccgan.training.Interrupted: Ctrl-C, after the step was finished and saved.
    """
    run = prepare(row.config, data_root, device)
    stored = checkpoints.load(folder) if (folder / checkpoints.NAME).exists() else None
    if stored is not None:
        checkpoints.check_same_model(stored, run.config, run.classes, run.channels)
    training = Training.of(run, run.dataset(run.split.train), folder / checkpoints.NAME, stored)
    for phase in PHASES:
        training.run(phase)
    fit_density(run, training.networks, training.data)
    scorer = run.scorer(training.networks)
    training.calibration = calibrate(run, scorer)
    training.save(PHASES[-1])
    evaluation = evaluate(run, scorer, training.calibration.threshold, seconds=training.seconds, details=True)
    assert evaluation is not None  # a row is of one process
    write_results(folder, run, evaluation, scorer, training.history)
    return _result(row, run, scorer, evaluation)


def _result(row: Row, run: Run, scorer: Scorer, evaluation: Evaluation) -> Result:
    found = evaluation.metrics
    variant, normal, seed, digest = row.key
    return {
        "variant": variant,
        "normal": normal,
        "seed": seed,
        "digest": digest,
        "auroc": _figure(found["image"]["auroc"]),
        "pixel_auroc": _figure(found["pixel"]["auroc"]),
        **{name: _figure(control["auroc"]) for name, control in found["controls"].items()},
        **_compositions(run, scorer, evaluation),
        "train_seconds": f"{found['seconds']:.0f}",
        "score_seconds_per_1000": f"{_scoring_seconds(run, scorer):.2f}",
        "steps": f"{run.config.gan_steps}+{run.config.encoder_steps}",
        "kernels": run.config.kernels,
        "threads": str(torch.get_num_threads()),
        "machine": _machine(run.device),
        "torch": torch.__version__,
    }


def _compositions(run: Run, scorer: Scorer, evaluation: Evaluation) -> dict[str, str]:
    held_out = run.dataset(run.split.held_out)
    scored = score(scorer, held_out, "held-out scores", details=True)
    assert scored is not None
    normal = terms_of(scorer, held_out, scored, "held-out terms")
    asked = terms_of(scorer, run.dataset(run.split.test), evaluation.scored, "test terms")
    return {
        composition_column(name): _figure(image_metrics(scores, evaluation.anomalous, float(np.median(scores))).auroc)
        for name, scores in composed(asked, normal).items()
    }


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
