"""Fits a trained run to normal images after training: its density, and the threshold of its scores.

All ranks of a job call these functions together. The batches are those of a single process, dealt out to the ranks, so
that the results are the same bit for bit for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.distributed import ranks
from raccgan.models.checkpoint import Calibration, Checkpoint, config_of
from raccgan.models.density import Vectors
from raccgan.models.inference import frozen
from raccgan.models.networks import Networks
from raccgan.outputs.progress import Progress
from raccgan.scoring.scorer import Scored, Scorer, concatenate
from raccgan.scoring.threshold import choose_threshold, threshold_of

DENSITY_IMAGES = 10_000
"""The density of a class is fitted to at most this many training images."""

T = TypeVar("T")


@torch.inference_mode()
def fit_density(networks: Networks, data: ImageDataset, *, batch: int) -> None:
    """Fit ``networks.density`` to the normal images that the networks were trained on, and copy it to every rank.

    Args:
        networks: trained networks.
        data: these images.
        batch: images a pass.
    """
    device = next(networks.encoder.parameters()).device
    encoder, generator = frozen(networks.encoder), frozen(networks.average)
    chosen = _evenly(data.labels, DENSITY_IMAGES)

    def vectors(indices: Sequence[int]) -> Vectors:
        x, y = data.images(indices).to(device), data.labels[indices].to(device)
        z, h = encoder.describe(x, y)
        map = (x - generator(z, y)).square().mean(dim=1)
        return Vectors(*(v.cpu() for v in Vectors.of(h, x, map)))

    found = _dealt_out(chosen, batch, "density of normal images", vectors)
    if found is not None:
        order = torch.tensor(chosen).argsort()
        ordered = Vectors(*(torch.cat(parts)[order] for parts in zip(*found, strict=True)))
        networks.density.fit(ordered, data.labels[chosen][order])
    ranks.job().copy_from_first([networks.density])


def calibrate(scorer: Scorer, held_out: ImageDataset, *, quantile: float) -> Calibration:
    """The threshold, which is a quantile (0 to 1) of the scores of held-out normal images, with these scores.

    Raises:
        InputError: there is no held-out image.
    """
    scored = score_dataset(scorer, held_out, "held-out scores", details=True)

    def calibration() -> Calibration:
        assert scored is not None
        assert scored.map is not None
        scores = {"score": scored.score, "peak": scored.map.amax(dim=(1, 2))}
        return Calibration(threshold_of(scored.score.numpy(), quantile), scores, scorer.label_policy)

    return ranks.job().on_first(calibration)


def calibration_for(
    stored: Checkpoint, config: Config, scorer: Scorer, held_out: Callable[[], ImageDataset], quantile: float | None
) -> Calibration:
    """The threshold of a trained run under a configuration and a label policy that may differ from the checkpoint's.

    The held-out scores in the checkpoint serve if they are of the same kind and policy; else the images are scored.

    Args:
        stored: the checkpoint.
        config: of the evaluation.
        scorer: scores of the run, of that configuration and of the label policy.
        held_out: gives the held-out normal images.
        quantile: what the user asked for, None for the checkpoint's threshold if there is one.
    """
    policy = scorer.label_policy
    as_stored = policy == stored.held_out_policy and config.score == config_of(stored).score
    if stored.held_out and as_stored:
        return Calibration(choose_threshold(stored, quantile=quantile), stored.held_out, policy)
    if stored.threshold is None or quantile is not None or not as_stored:
        return calibrate(scorer, held_out(), quantile=config.quantile)
    return Calibration(stored.threshold, {}, policy)


def score_dataset(scorer: Scorer, data: ImageDataset, title: str, *, details: bool = False) -> Scored | None:
    """Score every image of a data set under a progress bar called ``title``.

    Returns:
        On rank 0 the scores in the order of ``data``, with maps and reconstructions if ``details``; else None.
    """
    indices = range(len(data))
    found = _dealt_out(indices, scorer.batch, title, lambda some: scorer.score(data.images(some), details=details))
    return None if found is None else concatenate(found)


def _evenly(labels: Tensor, most: int) -> list[int]:
    """The indices of at most ``most`` images of each class, at even distances."""
    members = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    return [i for of in members for i in of[torch.linspace(0, len(of) - 1, min(most, len(of))).round().long()].tolist()]


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
