"""Fits a trained run to normal images after training: its density, and the threshold of its scores.

All ranks of a job call these functions together. The batches are those of a single process, dealt out to the ranks, so
that the results are the same bit for bit for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from raccgan.scoring.scorer import MINIMUM, Scored, Scorer, concatenate
from raccgan.scoring.threshold import choose_threshold, threshold_of

DENSITY_IMAGES = 10_000
"""The density of a class is fitted to at most this many training images."""


@torch.inference_mode()
def fit_density(networks: Networks, data: ImageDataset, *, batch: int) -> None:
    """Fit ``networks.density`` to the normal images of ``data``, and copy the result to every rank.

    Args:
        networks: trained networks.
        data: the normal images that they were trained on.
        batch: images a pass.
    """
    device = next(networks.encoder.parameters()).device
    encoder, generator = frozen(networks.encoder), frozen(networks.average)
    chosen = _evenly(data.labels, DENSITY_IMAGES)
    places = [chosen[i] for i in _own_places(len(chosen), batch)]
    own: list[Vectors] = []
    with Progress("density of normal images", len(places), unit="image", shown=ranks.job().first) as progress:
        for indices in torch.tensor(places, dtype=torch.int64).split(batch):
            x, y = data.images(indices).to(device), data.labels[indices].to(device)
            z, h = encoder.describe(x, y)
            map = (x - generator(z, y)).square().mean(dim=1)
            own.append(Vectors(*(v.cpu() for v in Vectors.of(h, x, map))))
            progress.update(len(indices))
    gathered = ranks.job().gathered((places, own))

    def fit() -> None:
        assert gathered is not None
        order = _order(gathered)
        each = (vectors for _, theirs in gathered for vectors in theirs)
        vectors = Vectors(*(torch.cat(parts)[order] for parts in zip(*each, strict=True)))
        networks.density.fit(vectors, data.labels[sorted(chosen)])

    ranks.job().on_first(fit)
    ranks.job().copy_from_first([networks.density])


def calibrate(scorer: Scorer, held_out: ImageDataset, *, quantile: float, policy: str = MINIMUM) -> Calibration:
    """The threshold, which is a quantile of the scores of held-out normal images, with these scores.

    Args:
        scorer: scores of the trained run.
        held_out: normal images that the run was not trained on.
        quantile: from 0 to 1.
        policy: the scorer's label policy, for the record.

    Raises:
        InputError: there is no held-out image.
    """
    scored = score_dataset(scorer, held_out, "held-out scores", details=True)

    def calibration() -> Calibration:
        assert scored is not None
        assert scored.map is not None
        scores = {"score": scored.score, "peak": scored.map.flatten(1).amax(dim=1)}
        return Calibration(threshold_of(scored.score.numpy(), quantile), scores, policy)

    return ranks.job().on_first(calibration)


def calibration_for(
    stored: Checkpoint,
    config: Config,
    scorer: Scorer,
    held_out: Callable[[], ImageDataset],
    *,
    policy: str,
    quantile: float | None,
) -> Calibration:
    """The threshold of a trained run under a configuration and a label policy that may differ from the checkpoint's.

    The scores of held-out images in the checkpoint serve where they are of the same kind and policy; else the images
    are scored again.

    Args:
        stored: the checkpoint.
        config: of the evaluation.
        scorer: scores of the run, of that configuration and policy.
        held_out: gives the held-out normal images.
        policy: the label policy.
        quantile: the quantile that the user asked for, None for the checkpoint's threshold if there is one.
    """
    as_stored = policy == stored.held_out_policy and config.score == config_of(stored).score
    if stored.held_out and as_stored:
        return Calibration(choose_threshold(stored, quantile=quantile), stored.held_out, policy)
    if stored.threshold is None or quantile is not None or not as_stored:
        return calibrate(scorer, held_out(), quantile=config.quantile, policy=policy)
    return Calibration(stored.threshold, {}, policy)


def score_dataset(scorer: Scorer, data: ImageDataset, title: str, *, details: bool = False) -> Scored | None:
    """Score every image of a data set under a progress bar called ``title``.

    Args:
        scorer, data: what scores, and what is scored.
        title: the name of the progress bar.
        details: keep maps and reconstructions.

    Returns:
        On rank 0 the scores in the order of ``data``; None on the other ranks.
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
    gathered = ranks.job().gathered((places, own))
    if gathered is None:
        return None
    return concatenate([part for _, parts in gathered for part in parts])[_order(gathered)]


def _evenly(labels: Tensor, most: int) -> list[int]:
    """The indices of at most ``most`` images of each class, at even distances."""
    members = [(labels == k).nonzero()[:, 0] for k in labels.unique()]
    return [i for of in members for i in of[torch.linspace(0, len(of) - 1, min(most, len(of))).round().long()].tolist()]


def _own_places(count: int, batch: int) -> list[int]:
    """The indices of this rank's share of ``count`` images: whole batches of ``batch``."""
    return [i for i in range(count) if i // batch % ranks.job().world == ranks.job().rank]


def _order(gathered: list[tuple[list[int], Any]]) -> Tensor:
    """The permutation that brings the ranks' results, each with the indices of its images, into the order of images."""
    return torch.tensor([i for theirs, _ in gathered for i in theirs]).argsort()
