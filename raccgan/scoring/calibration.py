"""Fits a trained run to normal images after training: its density, and the threshold of its scores.

Ranks call these functions together. The batches are those of a single process, dealt out to the ranks, so that results
are the same bit for bit for any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.synthesis import Draws, synthetic
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.models.checkpoint import Calibration, Checkpoint, config_of
from raccgan.models.density import Vectors
from raccgan.models.evidence import TERMS
from raccgan.models.inference import frozen
from raccgan.models.networks import Networks
from raccgan.models.pathology import Observed
from raccgan.models.randomness import stream
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say
from raccgan.scoring.scorer import Scored, Scorer, concatenate

DENSITY_IMAGES = 10_000  # the most training images that the density of a class is fitted to
SYNTHETIC = 3  # pathologies that are made of each held-out image

T = TypeVar("T")


@torch.inference_mode()
def fit_density(networks: Networks, data: ImageDataset, *, batch: int) -> None:
    """Fit ``networks.density`` to the normal images of training, ``batch`` a pass, and copy it to every rank."""
    device = next(networks.encoder.parameters()).device
    encoder, generator, pathology = frozen(networks.encoder), frozen(networks.average), frozen(networks.pathology)

    def seen(indices: Sequence[int]) -> tuple[Vectors, Observed]:
        x, y = data.images(indices).to(device), data.labels[indices].to(device)
        z, h = encoder.describe(x, y)
        map = (x - generator(z, y)).square().mean(dim=1)
        vectors, observed = Vectors.of(h, x, map), pathology.observe(x)
        return Vectors(*(v.cpu() for v in vectors)), Observed(*(v.cpu() for v in observed))

    for k in range(len(networks.density.descriptor.images)):  # class by class: the features of all places are large
        members = (data.labels == k).nonzero()[:, 0]
        evenly = members[torch.linspace(0, len(members) - 1, min(DENSITY_IMAGES, len(members))).round().long()]
        found = _dealt_out(evenly.tolist(), batch, "density of normal images", seen)
        if found is not None:
            vectors, observed = (zip(*parts, strict=True) for parts in zip(*found, strict=True))
            networks.density.fit(Vectors(*map(torch.cat, vectors)), Observed(*map(torch.cat, observed)), k)
    ranks.job().copy_from_first([networks.density])


@torch.inference_mode()
def fit_evidence(config: Config, networks: Networks, classes: Sequence[str], held_out: ImageDataset) -> None:
    """Fit ``networks.evidence`` to held-out normal images and to pathologies made of them, each under its own class."""
    scorer = Scorer(config, networks, classes)
    batch = config.score_batch

    def terms(indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x, y = held_out.images(indices), held_out.labels[indices]
        draw = stream(config.seed, "evidence", indices[0])
        copies = [x]
        for turn in range(SYNTHETIC):
            other = held_out.images([(i + 1 + turn) % len(held_out) for i in indices])
            copies.append(synthetic(x, other, Draws.of(len(x), x.shape[-1], draw))[0])
        normal, *ill = (scorer.terms_under(each, y) for each in copies)
        return normal, {name: torch.cat([each[name] for each in ill]) for name in normal}

    found = _dealt_out(range(len(held_out)), batch, "weights of the score's terms", terms)
    if found is not None:
        normal, ill = (
            {name: torch.cat([t[name] for t in each]) for name in TERMS} for each in zip(*found, strict=True)
        )
        networks.evidence.fit(normal, ill)
    ranks.job().copy_from_first([networks.evidence])


def fitted_scorer(
    config: Config, networks: Networks, classes: Sequence[str], train: ImageDataset, held_out: ImageDataset
) -> Scorer:
    """The scorer of trained networks, whose density is fitted to training images, and whose weights of terms to
    held-out ones; both stay in ``networks``."""
    fit_density(networks, train, batch=config.score_batch)
    fit_evidence(config, networks, classes, held_out)
    return Scorer(config, networks, classes)


def calibrate(scorer: Scorer, held_out: ImageDataset, *, quantile: float) -> Calibration:
    """The thresholds of scores and of pixels: a quantile (0 to 1) of the scores, and of the map maxima, of held-out
    normal images; with these numbers."""
    scored = score_dataset(scorer, held_out, "held-out scores", details=True, kept=_peaks)

    def calibration() -> Calibration:
        assert scored is not None
        assert scored.map is not None
        scores = {"score": scored.score, "peak": scored.map.flatten()}
        note_few(len(scored.score), quantile)
        threshold, pixel_threshold = (threshold_of(values.numpy(), quantile) for values in scores.values())
        return Calibration(threshold, scores, scorer.label_policy, pixel_threshold)

    return ranks.job().on_first(calibration)


def note_few(held_out: int, quantile: float) -> None:
    """Say that a threshold rests on too few images: fewer than one of them is expected above the quantile."""
    if 0 < held_out * (1 - quantile) < 1 - 1e-9 and quantile < 1:
        images = "1 held-out normal image" if held_out == 1 else f"{held_out} held-out normal images"
        needed = math.ceil(1 / (1 - quantile) - 1e-9)
        say(
            f"note: the threshold rests on {images}, and a {quantile:g} quantile needs {needed}: raise --held-out, or "
            "calibrate with more normal images"
        )


def calibration_for(
    stored: Checkpoint, config: Config, scorer: Scorer, held_out: Callable[[], ImageDataset], quantile: float | None
) -> Calibration:
    """The threshold of a trained run under a configuration and a label policy that may differ from the checkpoint's.

    Scores in the checkpoint serve if they are of the same kind and policy; else ``held_out`` images are scored. Without
    a ``quantile`` it is the checkpoint's threshold, if there is one.
    """
    policy = scorer.label_policy
    as_stored = policy == stored.held_out_policy and config.score == config_of(stored).score
    if stored.held_out and as_stored:
        pixel_threshold = choose_pixel_threshold(stored, quantile=quantile)
        return Calibration(choose_threshold(stored, quantile=quantile), stored.held_out, policy, pixel_threshold)
    if stored.threshold is None or quantile is not None or not as_stored:
        return calibrate(scorer, held_out(), quantile=config.quantile)
    return Calibration(stored.threshold, {}, policy, stored.pixel_threshold)


def choose_threshold(
    stored: Checkpoint,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    sensitivity: float | None = None,
) -> float:
    """The threshold to decide with; the checkpoint's own where nothing else is given.

    ``threshold`` is taken as it is. ``quantile``, 0 to 1, is that of the held-out normal images' scores in the
    checkpoint, interpolated between two of them. ``sensitivity``, at least 0 and below 1, means the lowest of those
    scores that at most this share of them exceeds. An InputError if more than one is given, one is out of range, or
    the checkpoint holds nothing to take it from.
    """
    if sum(value is not None for value in (threshold, quantile, sensitivity)) > 1:
        raise InputError("threshold, quantile and sensitivity exclude each other: give one")
    if threshold is not None:
        if not np.isfinite(threshold):
            raise InputError(f"the threshold must be a finite number, got {threshold}")
        return float(threshold)
    if quantile is None and sensitivity is None:
        if stored.threshold is None:
            raise InputError(
                "the checkpoint has no threshold: its encoder is not trained yet; or give one with --threshold"
            )
        return stored.threshold
    if not stored.held_out:
        raise InputError(
            "the checkpoint holds no scores of held-out normal images: "
            "python -m raccgan.calibrate CHECKPOINT FOLDER_OF_NORMAL_IMAGES adds them"
        )
    return _among(stored.held_out["score"].numpy(), quantile, sensitivity)


def choose_pixel_threshold(
    stored: Checkpoint,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    sensitivity: float | None = None,
) -> float | None:
    """The threshold of pixels: a pixel is anomalous where its map, the smoothed squared difference, is above it.

    It comes from the maxima of the held-out normal images' maps as :func:`choose_threshold` has it from their scores:
    with a quantile of 0.95, one normal image in twenty has an anomalous pixel at all. None where the checkpoint holds
    neither a threshold of pixels nor such maxima.

    Args:
        stored: the checkpoint.
        threshold: this one.
        quantile, sensitivity: as in :func:`choose_threshold`; at most one of them.

    Raises:
        InputError: a value is out of range.
    """
    if threshold is not None:
        if not np.isfinite(threshold):
            raise InputError(f"the threshold of pixels must be a finite number, got {threshold}")
        return float(threshold)
    if quantile is None and sensitivity is None:
        if stored.pixel_threshold is not None:
            return stored.pixel_threshold
        quantile = config_of(stored).quantile
    if not stored.held_out:
        return None
    return _among(stored.held_out["peak"].numpy(), quantile, sensitivity)


def _among(values: np.ndarray, quantile: float | None, sensitivity: float | None) -> float:
    """A quantile of held-out values [N], or the lowest of them that at most a share ``sensitivity`` exceeds."""
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise InputError(f"the quantile is {quantile}; it must be from 0 to 1")
        return threshold_of(values, quantile)
    assert sensitivity is not None
    if not 0 <= sensitivity < 1:
        raise InputError(f"the sensitivity is {sensitivity}; it is a share of normal images, at least 0 and below 1")
    accepted = int(np.floor(sensitivity * len(values) + 1e-9))  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.99
    return float(np.sort(values)[len(values) - 1 - accepted])


def threshold_of(held_out_scores: np.ndarray, quantile: float) -> float:
    """A quantile of the scores [N] of held-out normal images; an InputError if there are none."""
    if len(held_out_scores) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    return float(np.quantile(held_out_scores, quantile))


def score_dataset(
    scorer: Scorer,
    data: ImageDataset,
    title: str,
    *,
    details: bool = False,
    kept: Callable[[Scored], Scored] = lambda scored: scored,
) -> Scored | None:
    """The scores of a data set, in its order; None on ranks but the first.

    ``title`` is that of the progress bar. ``kept`` is what is kept of each batch, where details are too large.
    """

    def score(some: Sequence[int]) -> Scored:
        return kept(scorer.score(data.images(some), details=details))

    found = _dealt_out(range(len(data)), scorer.batch, title, score)
    return None if found is None else concatenate(found)


def without_reconstructions(scored: Scored) -> Scored:
    """The same, for a data set whose maps are wanted alone."""
    return dataclasses.replace(scored, reconstruction=None)


def _peaks(scored: Scored) -> Scored:
    """The same with the maxima [N, 1, 1] of the maps in their place."""
    assert scored.map is not None
    return dataclasses.replace(scored, map=scored.map.amax(dim=(1, 2), keepdim=True), reconstruction=None)


def _dealt_out(indices: Sequence[int], batch: int, title: str, compute: Callable[[Sequence[int]], T]) -> list[T] | None:
    """``compute`` of every ``batch`` indices, on the ranks in turn: all results in order on rank 0, None elsewhere."""
    job = ranks.job()
    batches = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    mine = batches[job.rank :: job.world]
    own = []
    with Progress(title, sum(map(len, mine)), unit="image", shown=job.first) as progress:
        for some in mine:
            own.append(compute(some))
            progress.update(len(some))
    gathered = job.gathered(own)
    if gathered is None:
        return None
    return [gathered[place % job.world][place // job.world] for place in range(len(batches))]
