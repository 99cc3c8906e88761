"""Where an image is anomalous: the pixels whose map is above a threshold, and the boxes round their regions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raccgan.data.images.geometry import Float, Placement

MOST_BOXES = 100  # of an image; noise has thousands


class Box(NamedTuple):
    """A region of anomalous pixels that touch, at corners too, in pixels of the upright original."""

    x: int  # of the left column
    y: int  # of the upper row
    width: int
    height: int
    area: int  # anomalous pixels of the region, at most width * height
    peak: float  # the largest value of the map in it


class Marked(NamedTuple):
    """What of an image is anomalous."""

    mask: NDArray[np.bool_]  # [height, width] of the upright original
    boxes: tuple[Box, ...]  # of its regions, at most MOST_BOXES, that with the largest peak first


def mark(map: Float, place: Placement, threshold: float) -> Marked:
    """Lay a map [size, size] over the upright original that ``place`` knows, and mark what is above the threshold."""
    if not (map > np.float64(threshold)).any():  # not in float32, in which the threshold could round down
        return Marked(np.zeros((place.height, place.width), dtype=bool), ())
    laid = place.lay(map, place.width, place.height)
    mask = laid > np.float64(threshold)
    return Marked(mask, _boxes(laid, mask))


def _boxes(map: Float, mask: NDArray[np.bool_]) -> tuple[Box, ...]:
    from scipy import ndimage  # here, because few images need it, and importing it takes a tenth of a second

    regions, count = ndimage.label(mask, structure=np.ones((3, 3), dtype=bool))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:].tolist()
    peaks = np.asarray(ndimage.maximum(map, regions, np.arange(1, count + 1))).tolist()
    made = [
        Box(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start, area, peak)
        for (rows, columns), area, peak in zip(ndimage.find_objects(regions), areas, peaks, strict=True)
    ]
    return tuple(sorted(made, key=lambda box: -box.peak)[:MOST_BOXES])
