"""What follows training: density and threshold from normal images; then, against the test images, scores, metrics, the
controls, and what is left in the folder."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.data.images.decode import decode_mask
from raccgan.data.samples import Sample
from raccgan.distributed import ranks
from raccgan.evaluation import controls, metrics
from raccgan.models.checkpoint import Calibration, History
from raccgan.models.density import Vectors
from raccgan.models.inference import frozen
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.models.randomness import stream
from raccgan.outputs import pictures
from raccgan.outputs.files import write_csv, write_json
from raccgan.outputs.overlays import MapScale
from raccgan.outputs.progress import Progress
from raccgan.outputs.report import Report, Shown, strip, write_report
from raccgan.scoring.scorer import MINIMUM, TERMS, Scored, Scorer, concatenate, decision, threshold_of
from raccgan.training.run import Run

CONTROL_BYTES = 1 << 30
"""The most training pixels, as float32, that the controls see."""

DENSITY_IMAGES = 10_000
"""The most training images of a class that its density is fitted to."""

SCORES_HEADER = ("path", "class", "label", "score", "predicted", "nearest_class", *TERMS)


@dataclass(frozen=True)
class Evaluation:
    """Everything the pictures and tables are made of."""

    metrics: dict[str, Any]
    scored: Scored
    anomalous: np.ndarray  # [N] bool
    threshold: float
    controls: dict[str, np.ndarray]  # scores [N] by control


@torch.inference_mode()
def fit_density(run: Run, networks: Networks, data: ImageDataset) -> None:
    """Fit the networks' density to the normal images ``data`` that they were trained on, the same on every rank."""
    batch = run.config.score_batch
    encoder, generator = frozen(networks.encoder), frozen(networks.average)
    chosen = _evenly(data.labels, DENSITY_IMAGES)
    places = [chosen[i] for i in _own_places(len(chosen), batch)]
    own: list[Vectors] = []
    with Progress("density of normal images", len(places), unit="image", shown=ranks.job().first) as progress:
        for indices in torch.tensor(places, dtype=torch.int64).split(batch):
            x, y = data.images(indices).to(run.device), data.labels[indices].to(run.device)
            z, h = encoder.describe(x, y)
            map = (x - generator(z, y)).square().mean(dim=1)
            own.append(Vectors(*(v.cpu() for v in Vectors.of(h, x, map))))
            progress.update(len(indices))
    found = ranks.job().gathered((places, own))

    def fit() -> None:
        assert found is not None
        order = _order(found)
        each = (vectors for _, theirs in found for vectors in theirs)
        vectors = Vectors(*(torch.cat(parts)[order] for parts in zip(*each, strict=True)))
        networks.density.fit(vectors, data.labels[sorted(chosen)])

    ranks.job().on_first(fit)
    ranks.job().copy_from_first([networks.density])


def _evenly(labels: Tensor, most: int) -> list[int]:
    """The places of at most ``most`` images of each class, at even distances."""
    members = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    return [i for of in members for i in of[torch.linspace(0, len(of) - 1, min(most, len(of))).round().long()].tolist()]


def _own_places(count: int, batch: int) -> list[int]:
    """This rank's share of ``count`` images: the batches of a single process, dealt out."""
    return [i for i in range(count) if i // batch % ranks.job().world == ranks.job().rank]


def _order(found: list[tuple[list[int], Any]]) -> Tensor:
    """How what the ranks found, with the places of its images, comes into the order of a single process."""
    return torch.tensor([i for theirs, _ in found for i in theirs]).argsort()


def calibrate(run: Run, scorer: Scorer, policy: str = MINIMUM) -> Calibration:
    """The threshold: the configured quantile of the held-out normal images' scores, with these scores; on every rank.

    Args:
        policy: the label policy that the scorer has, for the record.
    """
    scored = score(scorer, run.dataset(run.split.held_out), "held-out scores", details=True)

    def calibration() -> Calibration:
        assert scored is not None
        assert scored.map is not None
        held_out = {"score": scored.score, "peak": scored.map.flatten(1).amax(dim=1)}
        return Calibration(threshold_of(scored.score.numpy(), run.config.quantile), held_out, policy)

    return ranks.job().on_first(calibration)


def score(scorer: Scorer, data: ImageDataset, title: str, *, details: bool = False) -> Scored | None:
    """Score every image of a data set under a progress bar: on rank 0 all scores, on the others None.

    The batches are those of a single process, dealt out to the ranks, so that the scores are the same bit for bit.
    """
    places = _own_places(len(data), scorer.batch)
    with Progress(title, len(places), unit="image", shown=ranks.job().first) as progress:
        own = [
            scorer.score_batches(
                lambda some: data.images([places[i] for i in some]),
                len(places),
                details=details,
                progress=progress.update,
            )
            for _ in places[:1]  # a rank without images has nothing to score
        ]
    found = ranks.job().gathered((places, own))
    if found is None:
        return None
    scored = concatenate([part for _, parts in found for part in parts])
    order = _order(found)
    ordered: dict[str, Any] = {name: None if t is None else t[order] for name, t in vars(scored).items()}
    return Scored(**ordered)


def evaluate(run: Run, scorer: Scorer, threshold: float, *, seconds: float, details: bool = False) -> Evaluation | None:
    """Score the test images and the controls, and compute the metrics; ranks but the first only help with the scores.

    Args:
        seconds: training time, for the record.
        details: keep maps and reconstructions, for a report.

    Returns:
        None on ranks but the first, which have nothing left to do.
    """
    test = run.dataset(run.split.test)
    anomalous = np.array([run.split.is_anomalous(sample) for sample in run.split.test])
    has_masks = any(sample.mask is not None for sample in run.split.test)
    scored = score(scorer, test, "test scores", details=has_masks or details)
    if scored is None:
        return None
    scores = scored.score.numpy()
    image = metrics.image_metrics(scores, anomalous, threshold)
    masks = _masks(run) if has_masks else None
    pixel = metrics.PixelMetrics(auroc=None, aupro=None)
    if masks is not None:
        assert scored.map is not None
        pixel = metrics.pixel_metrics(scored.map.numpy(), masks)
    control_maps = _control_maps(run, test)
    control_scores = {name: maps.double().mean(dim=(1, 2)).numpy() for name, maps in control_maps.items()}
    found: dict[str, Any] = {
        "image": dataclasses.asdict(image),
        "pixel": dataclasses.asdict(pixel),
        "controls": {
            name: {
                "auroc": metrics.image_metrics(values, anomalous, float(np.median(values))).auroc,
                "pixel_auroc": _pixel_auroc(control_maps[name], masks),
            }
            for name, values in control_scores.items()
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
    return Evaluation(found, scored, anomalous, threshold, control_scores)


def write_results(out: Path, run: Run, evaluation: Evaluation, scorer: Scorer, history: History) -> None:
    """``metrics.json``, ``scores.csv`` and the pictures, into ``out``."""
    write_json(out / "metrics.json", evaluation.metrics)
    _write_scores(out / "scores.csv", run, evaluation)
    _write_samples(out / "samples.png", run, scorer)
    _write_reconstructions(out / "reconstructions.png", run, evaluation, scorer)
    if history:
        pictures.loss_curves(out / "losses.png", history)
    if evaluation.anomalous.any() and not evaluation.anomalous.all():
        pictures.roc_and_histogram(
            out / "roc.png",
            evaluation.scored.score.numpy(),
            evaluation.anomalous,
            evaluation.threshold,
            evaluation.metrics["image"]["auroc"],
            {
                name.replace("_", " "): (values, evaluation.metrics["controls"][name]["auroc"])
                for name, values in evaluation.controls.items()
            },
        )


def write_evaluated(path: Path, run: Run, evaluation: Evaluation, calibration: Calibration, name: str) -> None:
    """The report of an evaluation that kept the details; ``name`` is how the user calls the run."""
    scored, scale = evaluation.scored, MapScale.of(calibration.held_out)
    assert scored.map is not None
    assert scored.reconstruction is not None
    test = run.dataset(run.split.test)
    shown = []
    for i, (sample, terms) in enumerate(zip(run.split.test, scored.terms(), strict=True)):
        map, image = scored.map[i].numpy(), test.images([i])[0].numpy()
        mask = _mask(run, sample)
        shown.append(
            Shown(
                path=sample.key,
                score=float(scored.score[i]),
                nearest_class=run.classes[int(scored.condition[i])],
                **terms,
                map_max=float(map.max()),
                strip=strip(image, scored.reconstruction[i].numpy(), map, scale, mask),
                label=sample.label,
                anomalous=bool(evaluation.anomalous[i]),
            )
        )
    image_metrics = evaluation.metrics["image"]
    report = Report(
        title=f"{name} against the test images of {run.config.dataset}",
        threshold=evaluation.threshold,
        images=shown,
        held_out=calibration.held_out["score"].tolist() if calibration.held_out else (),
        facts={
            "normal classes": ", ".join(run.classes),
            "protocol": run.config.protocol,
            **{
                f"{control.replace('_', ' ')} AUROC": _percent(found["auroc"])
                for control, found in evaluation.metrics["controls"].items()
            },
        },
        run=name,
        auroc=image_metrics["auroc"],
        auprc=image_metrics["auprc"],
    )
    write_report(path, report)


def summary(evaluation: Evaluation) -> str:
    """The result in two lines, for the terminal."""
    image, beside = evaluation.metrics["image"], evaluation.metrics["controls"]
    confusion = image["confusion"]
    controls_text = ", ".join(f"{name.replace('_', ' ')} {_percent(value['auroc'])}" for name, value in beside.items())
    pixel = evaluation.metrics["pixel"]
    pixel_text = f", pixel AUROC {_percent(pixel['auroc'])}" if pixel["auroc"] is not None else ""
    return (
        f"image AUROC {_percent(image['auroc'])}, AUPR {_percent(image['auprc'])}{pixel_text}"
        f"  (controls: {controls_text})\n"
        f"at threshold {evaluation.threshold:.4g}: {confusion['true_positive']} of "
        f"{confusion['true_positive'] + confusion['false_negative']} anomalies found, "
        f"{confusion['false_positive']} of {confusion['false_positive'] + confusion['true_negative']} normal images "
        "taken for anomalies"
    )


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _pixel_auroc(errors: Tensor, masks: np.ndarray | None) -> float | None:
    """Of a control's error maps, smoothed as ours are; None where nobody marked what is anomalous."""
    return None if masks is None else metrics.pixel_metrics(smoothed(errors).numpy(), masks).auroc


def _masks(run: Run) -> np.ndarray:
    """[N, H, W] bool; an image without a mask file is normal everywhere."""
    size = run.config.image_size
    empty = np.zeros((size, size), dtype=bool)
    masks = (_mask(run, sample) for sample in run.split.test)
    return np.stack([empty if mask is None else mask for mask in masks])


def _mask(run: Run, sample: Sample) -> np.ndarray | None:
    """[H, W] bool, as the model sees its image; None where there is no mask file."""
    if sample.mask is None:
        return None
    return decode_mask(sample.mask, sample.image, size=run.config.image_size, fit=run.config.fit)


def _control_maps(run: Run, test: ImageDataset) -> dict[str, Tensor]:
    """Error maps of the two plain controls on the same split: what a GAN has to beat."""
    train = run.dataset(run.split.train)
    most = max(1, CONTROL_BYTES // (4 * run.channels * run.config.image_size**2))
    known = train.images(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int).tolist())
    asked = test.images(range(len(test)))
    result: dict[str, Tensor] = {}
    with Progress("control: autoencoder", run.config.control_steps) as progress:
        result["autoencoder"] = controls.autoencoder(
            known,
            asked,
            seed=run.config.seed,
            steps=run.config.control_steps,
            device=run.device,
            progress=lambda step, steps: progress.update(),
        )
    result["nearest_neighbour"] = controls.nearest_neighbour(known, asked)
    return result


def _write_scores(path: Path, run: Run, evaluation: Evaluation) -> None:
    scored = evaluation.scored
    rows = zip(
        run.split.test,
        evaluation.anomalous.tolist(),
        scored.score.tolist(),
        scored.condition.tolist(),
        scored.terms(),
        strict=True,
    )
    write_csv(
        path,
        SCORES_HEADER,
        (
            (
                sample.key,
                sample.label,
                decision(anomalous),
                f"{value:.9g}",
                decision(value > evaluation.threshold),
                run.classes[condition],
                *(f"{term:.9g}" for term in terms.values()),
            )
            for sample, anomalous, value, condition, terms in rows
        ),
    )


@torch.inference_mode()
def _write_samples(path: Path, run: Run, scorer: Scorer, columns: int = 10) -> None:
    """Images that the generator makes of each normal class, from the run's seed."""
    draw = stream(run.config.seed, "samples")
    rows: dict[str, np.ndarray] = {}
    for index, name in list(enumerate(run.classes))[:20]:
        z = torch.randn(columns, run.config.latent_size, generator=draw).to(run.device)
        y = torch.full((columns,), index, device=run.device)
        rows[name] = scorer.generator(z, y).float().cpu().numpy()
    pictures.sample_grid(path, rows, title="generated, one row a normal class")


def _write_reconstructions(path: Path, run: Run, evaluation: Evaluation, scorer: Scorer, each: int = 6) -> None:
    """Some normal and some anomalous test images, drawn without looking at their scores."""
    draw = random.Random(run.config.seed)
    chosen: list[int] = []
    for wanted in (False, True):
        members = np.flatnonzero(evaluation.anomalous == wanted).tolist()
        chosen += sorted(draw.sample(members, min(each, len(members))))
    test = run.dataset([run.split.test[i] for i in chosen])
    images: Tensor = test.images(range(len(test)))
    scored = scorer.score(images, details=True)
    assert scored.map is not None
    assert scored.reconstruction is not None
    items = []
    for place, i in enumerate(chosen):
        sample = run.split.test[i]
        mask = _mask(run, sample)
        items.append(
            pictures.Reconstruction(
                original=images[place].numpy(),
                reconstruction=scored.reconstruction[place].numpy(),
                map=scored.map[place].numpy(),
                name=sample.key,
                label=sample.label,
                score=float(scored.score[place]),
                anomalous=bool(evaluation.anomalous[i]),
                predicted=bool(scored.score[place] > evaluation.threshold),
                mask=mask,
            )
        )
    pictures.reconstructions(path, items)
