"""Chooses a threshold from the scores of held-out normal images, or takes the one that is given."""

from __future__ import annotations

import numpy as np

from raccgan.errors import InputError
from raccgan.models.checkpoint import Checkpoint


def choose_threshold(
    stored: Checkpoint,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    sensitivity: float | None = None,
) -> float:
    """The threshold to decide with.

    Args:
        stored: the checkpoint; with none of the others, its own threshold.
        threshold: this one.
        quantile: this quantile, 0 to 1, of the scores of the held-out normal images.
        sensitivity: the lowest threshold that at most this share of the held-out normal images exceeds.

    Raises:
        InputError: more than one is given, or the checkpoint has no threshold or no held-out scores to take it from.
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
    scores = stored.held_out["score"].numpy()
    if sensitivity is not None:
        return threshold_at(scores, sensitivity)
    assert quantile is not None
    if not 0 <= quantile <= 1:
        raise InputError(f"the quantile is {quantile}; it must be from 0 to 1")
    return threshold_of(scores, quantile)


def threshold_of(held_out_scores: np.ndarray, quantile: float) -> float:
    """A quantile of the scores [N] of normal images that were held out of training.

    Raises:
        InputError: there are no such scores.
    """
    if len(held_out_scores) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    return float(np.quantile(held_out_scores, quantile))


def threshold_at(held_out_scores: np.ndarray, sensitivity: float) -> float:
    """The lowest of the held-out scores [N] that at most a share ``sensitivity`` of them exceeds.

    A quantile interpolates between two scores; this one never flags more normal images than were accepted.

    Raises:
        InputError: there are no such scores, or the share is not in [0, 1).
    """
    if not 0 <= sensitivity < 1:
        raise InputError(f"the sensitivity is {sensitivity}; it is a share of normal images, at least 0 and below 1")
    ordered = np.sort(held_out_scores)
    if len(ordered) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    accepted = int(np.floor(sensitivity * len(ordered) + 1e-9))  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.99
    return float(ordered[len(ordered) - 1 - accepted])
