"""What a ground-truth mask marks: masks with hard or soft edges, and maps of class numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raccgan.data.images.geometry import Float

NUMBERS = 1 / 8  # a mask whose largest value is below this share of its scale holds numbers of classes
FLAT = 0.1  # numbers of classes fill areas: more than this share of values in between lies among its equals


def marked(mask: Float) -> NDArray[np.bool_]:
    """The anomalous pixels [H, W] of a mask [H, W, C] in [0, 1]; the brightest channel counts.

    A mask of two levels marks the higher, one of a single level everything or, if that is 0, nothing. Soft edges, as
    resizing and JPEG leave them, end half way between the lowest and the highest value. In a map of class numbers every
    number but the lowest is anomalous.
    """
    plane = mask.max(axis=-1)
    low, high = plane.min(), plane.max()
    if low == high:
        return np.full(plane.shape, high > 0)
    if high >= NUMBERS and is_soft(plane):
        return plane >= (low + high) / 2
    return plane > low


def is_soft(plane: NDArray[Any]) -> bool:
    """True where a plane [H, W] has values between its lowest and highest that fill no areas."""
    between = (plane > plane.min()) & (plane < plane.max())
    count = int(between.sum())
    if count == 0:
        return False
    inner = plane[1:-1, 1:-1]
    equal = between[1:-1, 1:-1].copy()
    for neighbour in (plane[:-2, 1:-1], plane[2:, 1:-1], plane[1:-1, :-2], plane[1:-1, 2:]):
        equal &= inner == neighbour
    return int(equal.sum()) <= FLAT * count
