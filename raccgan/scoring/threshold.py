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
    """The threshold to decide with; the checkpoint's own where nothing else is given.

    Args:
        stored: the checkpoint, which holds the scores of the held-out normal images.
        threshold: this one.
        quantile: this quantile, 0 to 1, of those scores, interpolated between two of them.
        sensitivity: the lowest of those scores that at most this share of them, at least 0 and below 1, exceeds.

    Raises:
        InputError: more than one is given, one is out of range, or the checkpoint holds nothing to take it from.
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
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise InputError(f"the quantile is {quantile}; it must be from 0 to 1")
        return threshold_of(scores, quantile)
    assert sensitivity is not None
    if not 0 <= sensitivity < 1:
        raise InputError(f"the sensitivity is {sensitivity}; it is a share of normal images, at least 0 and below 1")
    accepted = int(np.floor(sensitivity * len(scores) + 1e-9))  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.99
    return float(np.sort(scores)[len(scores) - 1 - accepted])


def threshold_of(held_out_scores: np.ndarray, quantile: float) -> float:
    """A quantile of the scores [N] of normal images that were held out of training.

    Raises:
        InputError: there are no such scores.
    """
    if len(held_out_scores) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    return float(np.quantile(held_out_scores, quantile))
