"""Position and rotation of the one object on a plain ground, for parts that are photographed as they fall.

The ground is what the image's border mostly shows, the object the largest connected region that stands out (Otsu,
1979). Its axis is that of its largest second moment. The third moment tells the narrower end, which is turned below.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONGEST = 256  # pixels of the longer side at which an object is looked for; smaller things are not seen
MARGIN = 1 / 16  # ground round the object on each side, as a share of its own length and breadth
FAINTEST = 2 / 255  # an object differs from the ground by this much somewhere, of intensities in [0, 1]
ROUND = 1.1  # a longer axis is this much longer than the shorter, as ratio of second moments, or nothing is turned
EVEN = 0.05  # an object of less skewness along its axis has no narrower end: it is turned by less than half a turn

Vector = NDArray[np.float64]
"""y and x, in pixels; pixel i of an image lies from i to i + 1."""


class Pose(NamedTuple):
    """A turned rectangle."""

    corner: Vector  # that becomes the upper left one
    down: Vector  # the side from there to the one that becomes the lower left
    right: Vector  # and to the upper right


def find_pose(image: NDArray[np.float32]) -> Pose:
    """The rectangle round the object of an image [H, W, C] with some ground; of a blank image, the whole of it."""
    height, width = image.shape[:2]
    small = _shrunk(image)
    scale = np.array([height / small.shape[0], width / small.shape[1]])
    rows, columns = np.nonzero(_object(small))
    if len(rows) == 0:
        return Pose(np.zeros(2), np.array([height, 0.0]), np.array([0.0, width]))
    points = (np.stack([rows, columns], axis=1) + 0.5) * scale  # [n, 2]
    middle = points.mean(axis=0)
    axis = _axis(points - middle)
    across = np.array([-axis[1], axis[0]])
    along = (points - middle) @ np.stack([axis, across], axis=1)
    low, high = along.min(axis=0) - scale / 2, along.max(axis=0) + scale / 2
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    corner = middle + low[0] * axis + low[1] * across
    return Pose(corner, (high[0] - low[0]) * axis, (high[1] - low[1]) * across)


def _shrunk(image: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    share = LONGEST / max(height, width)
    if share >= 1:
        return image
    size = (max(1, round(width * share)), max(1, round(height * share)))
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0))
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BOX)) for plane in planes], axis=2)


def _object(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The largest piece of [H, W, C] that is not ground, its gaps and holes closed; nothing where all is alike."""
    from scipy import ndimage  # here, so that whoever asks for the names of data sets does not wait for it

    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    difference = np.abs(image - np.median(border, axis=0))
    apart = np.maximum.reduce([difference[..., c] for c in range(difference.shape[2])])
    if apart.max() < FAINTEST:
        return np.zeros(apart.shape, dtype=bool)
    reach = max(1, max(apart.shape) // 64)
    distinct = np.pad(apart > _otsu(apart), reach)
    closed = ndimage.binary_closing(distinct, iterations=reach)[reach:-reach, reach:-reach]
    pieces, count = ndimage.label(closed)
    if count == 0:
        return closed
    sizes = np.bincount(pieces.ravel())
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(pieces == 1 + sizes[1:].argmax())
    return filled


def _otsu(values: NDArray[np.float32], bins: int = 128) -> float:
    """The threshold that parts values into two groups with the most variance between them."""
    counts, edges = np.histogram(values, bins=bins)
    below = np.cumsum(counts)[:-1].astype(np.float64)
    sums = np.cumsum(counts * (edges[1:] + edges[:-1]) / 2)
    above = values.size - below
    apart = (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(edges[1 + (below * above * apart).argmax()])


def _axis(points: Vector) -> Vector:
    """The unit vector along points [n, 2] about their middle, to the narrower end."""
    second = points.T @ points / len(points)
    moments, axes = np.linalg.eigh(second)
    if moments[1] <= ROUND * moments[0]:
        return np.array([1.0, 0.0])
    axis: Vector = axes[:, 1]
    along = points @ axis
    skewness = (along**3).mean() / moments[1] ** 1.5
    downwards = skewness if abs(skewness) > EVEN else axis[0] if abs(axis[0]) > 1e-9 else axis[1]
    return axis if downwards > 0 else -axis
