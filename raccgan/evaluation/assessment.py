"""Tests a trained run on the test images: scores, metrics, and the plain controls beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.data.images.decode import decode_mask
from raccgan.data.samples import Sample
from raccgan.evaluation import controls, metrics
from raccgan.models.maps import smoothed
from raccgan.outputs.progress import Progress
from raccgan.scoring.calibration import score_dataset
from raccgan.scoring.scorer import Scored, Scorer
from raccgan.training.run import Run

CONTROL_BYTES = 1 << 30
"""The most training pixels, as float32, that the controls see."""


@dataclass(frozen=True)
class Assessment:
    """A run's scores on its N test images, and what metrics and tables are made of."""

    metrics: dict[str, Any]  # the content of metrics.json
    scored: Scored
    anomalous: NDArray[np.bool_]  # [N], the truth
    threshold: float
    controls: dict[str, NDArray[np.float64]]  # scores [N] of each control

    def summary(self) -> str:
        """Metrics and decisions in two lines, for the terminal."""
        image, pixel, confusion = self.metrics["image"], self.metrics["pixel"], self.metrics["image"]["confusion"]
        beside = ", ".join(
            f"{name.replace('_', ' ')} {shown(found['auroc'])}" for name, found in self.metrics["controls"].items()
        )
        pixels = f", pixel AUROC {shown(pixel['auroc'])}" if pixel["auroc"] is not None else ""
        anomalies = confusion["true_positive"] + confusion["false_negative"]
        normal = confusion["false_positive"] + confusion["true_negative"]
        return (
            f"image AUROC {shown(image['auroc'])}, AUPR {shown(image['auprc'])}{pixels}  (controls: {beside})\n"
            f"at threshold {self.threshold:.4g}: {confusion['true_positive']} of {anomalies} anomalies found, "
            f"{confusion['false_positive']} of {normal} normal images taken for anomalies"
        )


def assess(run: Run, scorer: Scorer, threshold: float, *, seconds: float, details: bool = False) -> Assessment | None:
    """Score the test images, and compute the metrics and those of the controls; None on ranks but the first.

    ``seconds`` is the training time, for the record; ``details`` keeps maps and reconstructions, for a report.
    """
    test = run.dataset(run.split.test)
    has_masks = any(sample.mask is not None for sample in run.split.test)
    scored = score_dataset(scorer, test, "test scores", details=has_masks or details)
    if scored is None:
        return None
    anomalous = np.array([run.split.is_anomalous(sample) for sample in run.split.test])
    control_maps = _control_maps(run, test)
    control_scores = {name: maps.double().mean(dim=(1, 2)).numpy() for name, maps in control_maps.items()}
    pixel = metrics.PixelMetrics(auroc=None, aupro=None)
    pixel_aurocs: dict[str, float | None] = dict.fromkeys(control_maps)
    if has_masks:
        masks = _masks(run)
        pixel = metrics.pixel_metrics(scored.details()[0], masks)
        for name, maps in control_maps.items():  # smoothed as ours are
            pixel_aurocs[name] = metrics.auroc(smoothed(maps).flatten().numpy(), masks.ravel())
    found = {
        "image": dataclasses.asdict(metrics.image_metrics(scored.score.numpy(), anomalous, threshold)),
        "pixel": dataclasses.asdict(pixel),
        "controls": {
            name: {"auroc": metrics.auroc(values, anomalous), "pixel_auroc": pixel_aurocs[name]}
            for name, values in control_scores.items()
        },
        "threshold": threshold,
        **_circumstances(run, seconds, anomalous),
    }
    return Assessment(found, scored, anomalous, threshold, control_scores)


def true_mask(run: Run, sample: Sample) -> NDArray[np.bool_] | None:
    """The anomalous pixels [H, W] of a sample, in the square that the model sees; None without a mask file."""
    if sample.mask is None:
        return None
    return decode_mask(sample.mask, sample.image, size=run.config.image_size, fit=run.config.fit)


def shown(value: float | None) -> str:
    """A metric as text, to three digits."""
    return "n/a" if value is None else f"{value:.3f}"


def _circumstances(run: Run, seconds: float, anomalous: NDArray[np.bool_]) -> dict[str, Any]:
    return {
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


def _masks(run: Run) -> NDArray[np.bool_]:
    """[N, H, W]; an image without a mask file is normal everywhere."""
    empty = np.zeros((run.config.image_size, run.config.image_size), dtype=bool)
    masks = (true_mask(run, sample) for sample in run.split.test)
    return np.stack([empty if mask is None else mask for mask in masks])


def _control_maps(run: Run, test: ImageDataset) -> dict[str, Tensor]:
    """Error maps [N, S, S] of the two plain controls on the same split: a GAN has to beat them."""
    train = run.dataset(run.split.train)
    most = max(1, CONTROL_BYTES // (4 * run.channels * run.config.image_size**2))
    known = train.images(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int).tolist())
    asked = test.images(range(len(test)))
    with Progress("control: autoencoder", run.config.control_steps) as progress:
        errors = controls.autoencoder(
            known,
            asked,
            seed=run.config.seed,
            steps=run.config.control_steps,
            device=run.device,
            progress=lambda step, steps: progress.update(),
        )
    return {"autoencoder": errors, "nearest_neighbour": controls.nearest_neighbour(known, asked)}
