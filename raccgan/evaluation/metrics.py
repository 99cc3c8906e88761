"""How well scores tell anomalous from normal: per image, and per pixel where masks are known.

A higher score is more anomalous; an image is predicted anomalous if, and only if, its score > threshold.
A number that the data do not define (one class missing) is None, never a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sklearn_metrics

from raccgan.errors import InputError
from raccgan.evaluation.pooled import PixelMetrics as PixelMetrics
from raccgan.evaluation.pooled import Pooled

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Confusion:
    """How many images were judged which way at the threshold; positive means anomalous."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int


@dataclass(frozen=True)
class ImageMetrics:
    """Image-level results, all in 0..1 but ``f1_max_threshold``, None where undefined."""

    auroc: float | None
    auprc: float | None  # average precision
    f1_max: float | None  # over all thresholds
    f1_max_threshold: float | None
    confusion: Confusion  # at the threshold given, as all below
    precision: float | None
    recall: float | None
    balanced_accuracy: float | None


def image_metrics(scores: ArrayLike, anomalous: ArrayLike, threshold: float) -> ImageMetrics:
    """Judge ``scores [N]`` by the labels ``anomalous [N]`` (bool, or 0 and 1).

    Raises:
        InputError: a score is NaN or infinite (the message names the first), or the threshold is NaN.
        ValueError: the shapes differ or are not ``[N]``.
    """
    s, y = _scores_and_labels(scores, anomalous)
    if np.isnan(threshold):
        raise InputError("the threshold is NaN: calibrate it on normal images with finite scores")
    predicted = s > threshold
    # scikit-learn takes no empty table, and then nothing has been counted anyway.
    counts = (
        sklearn_metrics.confusion_matrix(y, predicted, labels=[False, True]).ravel() if s.size else np.zeros(4, int)
    )
    both = _has_both(y)
    f1_max, f1_max_threshold = _best_f1(s, y) if both else (None, None)
    tn, fp, fn, tp = (int(count) for count in counts)
    return ImageMetrics(
        auroc=auroc(s, y),
        auprc=float(sklearn_metrics.average_precision_score(y, s)) if both else None,
        f1_max=f1_max,
        f1_max_threshold=f1_max_threshold,
        confusion=Confusion(true_positive=tp, false_positive=fp, true_negative=tn, false_negative=fn),
        precision=float(sklearn_metrics.precision_score(y, predicted)) if tp + fp else None,
        recall=float(sklearn_metrics.recall_score(y, predicted)) if tp + fn else None,
        balanced_accuracy=float(sklearn_metrics.balanced_accuracy_score(y, predicted)) if both else None,
    )


def pixel_metrics(
    maps: Sequence[ArrayLike] | Floats,
    masks: Sequence[ArrayLike] | Bools,
    max_fpr: float = 0.3,
    *,
    threshold: float | None = None,
) -> PixelMetrics:
    """Judge anomaly maps by the true masks (bool, or 0 and 1), all pixels pooled.

    ``maps`` and ``masks`` are [N, H, W], or N of [H, W] that may differ in size and are looked at one after the other.
    AUPRO is the area under mean region overlap against false positive rate from 0 to ``max_fpr``, over ``max_fpr``.
    Regions are 8-connected within one image. The overlap is the true positive rate of a ROC in which each anomalous
    pixel weighs 1 / (size of its region) and a normal one 1. F1 and IoU are those of the pixels above ``threshold``,
    and None without one. Memory does not grow with N: see :class:`Pooled`.

    Raises:
        InputError: a map holds NaN or infinity (the message names the first image).
        ValueError: the shapes differ or are not ``[N, H, W]``, or ``max_fpr`` is not in 0 < max_fpr <= 1.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in 0 < max_fpr <= 1, not {max_fpr}")
    if len(maps) != len(masks):
        raise ValueError(f"maps and masks must both be [N, H, W], not of {len(maps)} and {len(masks)} images")
    pooled = Pooled(threshold)
    for image, (map, mask) in enumerate(zip(maps, masks, strict=True)):
        m, y = np.asarray(map), np.asarray(mask).astype(bool)
        if m.ndim != 2 or m.shape != y.shape:
            raise ValueError(f"maps and masks must both be [N, H, W], not {m.shape} and {y.shape} of an image")
        if not np.isfinite(m).all():
            raise InputError(f"the anomaly map of image {image} holds NaN or infinity: the model is broken")
        pooled.add(m, y)
    return pooled.metrics(max_fpr)


def auroc(scores: ArrayLike, anomalous: ArrayLike) -> float | None:
    """The area under the curve of :func:`roc`, with its errors; None where one class is missing."""
    s, y = _scores_and_labels(scores, anomalous)
    return float(sklearn_metrics.roc_auc_score(y, s)) if _has_both(y) else None


def roc(scores: ArrayLike, anomalous: ArrayLike) -> tuple[Floats, Floats]:
    """False and true positive rates, each [points] from 0 to 1; both empty where one class is missing.

    Raises:
        InputError, ValueError: as :func:`image_metrics`.
    """
    s, y = _scores_and_labels(scores, anomalous)
    return sklearn_metrics.roc_curve(y, s)[:2] if _has_both(y) else (np.empty(0), np.empty(0))


def _scores_and_labels(scores: ArrayLike, anomalous: ArrayLike) -> tuple[Floats, Bools]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(anomalous).astype(bool)
    if s.ndim != 1 or s.shape != y.shape:
        raise ValueError(f"scores and labels must both be [N], not {s.shape} and {y.shape}")
    broken = ~np.isfinite(s)
    if broken.any():
        first = int(broken.argmax())
        raise InputError(f"the score of image {first} is {s[first]}: the model or the image is broken")
    return s, y


def _has_both(y: Bools) -> bool:
    return bool(y.any() and not y.all())


def _best_f1(s: Floats, y: Bools) -> tuple[float, float]:
    precision, recall, reached = sklearn_metrics.precision_recall_curve(y, s)
    # Precision and recall are both 0 where no true positive is left: F1 is 0 there.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(f1[:-1].argmax())  # the curve's last point belongs to no threshold
    # The curve counts score >= t; ours counts score > t, so the threshold is the next lower score.
    lower = s[s < reached[best]]
    return float(f1[best]), float(lower.max() if lower.size else np.nextafter(reached[best], -np.inf))
