"""Where an image is anomalous: the pixels whose map is above a threshold, and the boxes round their regions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raccgan.data.images.geometry import Float, Placement

MOST_BOXES = 100
"""Of an image; noise has thousands."""


class Box(NamedTuple):
    """A region of anomalous pixels that touch, at corners too, in pixels of the upright original."""

    x: int  # of the left column
    y: int  # of the upper row
    width: int
    height: int
    area: int  # anomalous pixels of the region, at most width * height
    peak: float  # the largest value of the map in it


class Marked(NamedTuple):
    """The map of an image laid over its upright original, or over a smaller copy, and what is anomalous there."""

    map: Float  # [height, width]
    mask: NDArray[np.bool_]  # [height, width]: the map is above the threshold


def marked(map: Float, place: Placement, threshold: float, *, longest: int = 0) -> Marked:
    """Lay a map [size, size] over the upright original that ``place`` knows; of it ``longest`` pixels at most."""
    share = min(1.0, longest / max(place.height, place.width)) if longest else 1.0
    width, height = (max(1, round(side * share)) for side in (place.width, place.height))
    laid = place.lay(map, width, height)
    return Marked(laid, laid > np.float64(threshold))  # not in float32, in which the threshold could round down


def boxes(found: Marked) -> tuple[Box, ...]:
    """The regions of a mask, at most MOST_BOXES, that with the largest peak first."""
    if not found.mask.any():
        return ()
    from scipy import ndimage  # here, because few images have any, and importing it takes a tenth of a second

    regions, count = ndimage.label(found.mask, structure=np.ones((3, 3), dtype=bool))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:].tolist()
    peaks = np.asarray(ndimage.maximum(found.map, regions, np.arange(1, count + 1))).tolist()
    made = [
        Box(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start, area, peak)
        for (rows, columns), area, peak in zip(ndimage.find_objects(regions), areas, peaks, strict=True)
    ]
    return tuple(sorted(made, key=lambda box: -box.peak)[:MOST_BOXES])
