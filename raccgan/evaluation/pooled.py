"""The pixels of many maps in bounded memory: how many of each value are anomalous, and how many are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MOST_VALUES = 1 << 20
"""Distinct values that are told apart. Past that the lowest bits go: with 2^20 of them, values that agree to five
digits or more count as ties."""


@dataclass(frozen=True)
class PixelMetrics:
    """Pixel-level results in 0..1: areas under the ROC and, up to a false positive rate, under the PRO curve; and
    F1 and intersection over union of the pixels above a threshold. None where undefined."""

    auroc: float | None
    aupro: float | None
    f1: float | None = None
    iou: float | None = None
    threshold: float | None = None


class Pooled:
    """Pixels by their value. A million distinct values, and one image, are in memory at a time.

    A value is held as an integer of the same order, from which bits are dropped as values become too many.

    Args:
        threshold: what F1 and IoU are of; None for neither.
    """

    def __init__(self, threshold: float | None = None, *, most: int = MOST_VALUES) -> None:
        self.threshold, self.most = threshold, most
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty((3, 0))  # of each value: normal pixels, anomalous ones, and these by 1 / their region
        self._dropped = 0  # bits
        self._waiting: list[tuple[NDArray[np.int64], Floats]] = []
        self._found = np.zeros(3, np.int64)  # at the threshold: true positives, false positives, false negatives

    def add(self, map: NDArray[np.generic], mask: Bools) -> None:
        """The pixels of an image: a map [H, W] of finite numbers, and what is truly anomalous [H, W]."""
        values, y = np.asarray(map, dtype=np.float64).ravel(), mask.ravel()
        if self.threshold is not None:
            predicted = values > self.threshold
            self._found += [(predicted & y).sum(), (predicted & ~y).sum(), (~predicted & y).sum()]
        counts = np.stack([(~y).astype(np.float64), y.astype(np.float64), _region_shares(mask).ravel()])
        self._waiting.append(_summed(_ordered(values) >> self._dropped, counts))
        if sum(len(keys) for keys, _ in self._waiting) > self.most:
            self._merge()

    def metrics(self, max_fpr: float) -> PixelMetrics:
        """The metrics of all pixels that were added; None where all, or none, of them are anomalous."""
        self._merge()
        normal, anomalous, _ = self._counts.sum(axis=1)
        if normal == 0 or anomalous == 0:
            return PixelMetrics(auroc=None, aupro=None)
        falling = self._counts[:, ::-1].cumsum(axis=1)  # at least this value
        fpr, tpr, overlap = (np.concatenate([[0.0], rate / rate[-1]]) for rate in falling)
        inside = int(np.searchsorted(fpr, max_fpr, side="right"))
        fpr_to_limit = np.append(fpr[:inside], max_fpr)
        overlap_to_limit = np.append(overlap[:inside], np.interp(max_fpr, fpr, overlap))
        true, false, missed = (int(count) for count in self._found)
        known = self.threshold is not None
        return PixelMetrics(
            auroc=float(np.trapezoid(tpr, fpr)),
            aupro=float(np.trapezoid(overlap_to_limit, fpr_to_limit) / max_fpr),
            f1=2 * true / (2 * true + false + missed) if known else None,
            iou=true / (true + false + missed) if known else None,
            threshold=self.threshold,
        )

    def _merge(self) -> None:
        """All that waits becomes part of the table, of at most ``most`` values."""
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
        counts = np.concatenate([self._counts, *(counts for _, counts in self._waiting)], axis=1)
        self._waiting.clear()
        self._keys, self._counts = _summed(keys, counts)
        if len(self._keys) > self.most:  # down to half, so that this is rare
            bits = _bits_to_drop(self._keys, self.most // 2)
            self._dropped += bits
            self._keys, self._counts = _summed(self._keys >> bits, self._counts)


def _ordered(values: Floats) -> NDArray[np.int64]:
    """Integers in the order of float64 values, equal for equal ones."""
    bits = (values + 0.0).view(np.int64)  # -0.0 becomes 0.0
    return np.where(bits < 0, bits ^ np.int64(0x7FFF_FFFF_FFFF_FFFF), bits)


def _summed(keys: NDArray[np.int64], counts: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Each key once, in rising order, with the sums of its counts [3, n]."""
    unique, place = np.unique(keys, return_inverse=True)
    return unique, np.stack([np.bincount(place, weights=row, minlength=len(unique)) for row in counts])


def _bits_to_drop(keys: NDArray[np.int64], most: int) -> int:
    """Low bits without which at most so many of the keys, distinct and rising, are distinct."""
    apart = keys[1:] ^ keys[:-1]
    highest = np.where(
        apart < 0, 64, np.frexp(apart.astype(np.float64))[1]
    )  # the highest bit in which neighbours differ
    left = (
        1 + np.bincount(highest, minlength=65)[::-1].cumsum()[::-1]
    )  # at each place: of neighbours that differ there on
    return int(np.argmax(np.append(left[1:], 1) <= max(1, most)))


def _region_shares(mask: Bools) -> Floats:
    """[H, W]: 1 / size of its region for an anomalous pixel, 0 for a normal one. Pixels touch at corners too."""
    regions, count = ndimage.label(mask, structure=np.ones((3, 3), dtype=bool))
    sizes = np.bincount(regions.ravel(), minlength=count + 1).astype(np.float64)
    shares: Floats = np.where(mask, 1 / np.maximum(sizes, 1)[regions], 0.0)
    return shares
