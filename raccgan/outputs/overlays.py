"""Anomaly maps as pictures: warm colours over the grey image, above what normal images reach, which stay grey."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float = NDArray[np.float32]

OUTLINE = (6, 182, 212)  # the colour round what is truly anomalous, which no map has
PREDICTED = (132, 204, 22)  # and round what is predicted to be
LONGEST = 1024  # pixels of the longer side of an overlay; larger originals are made smaller


@dataclass(frozen=True)
class MapScale:
    """Map values between which colours go from clear to hottest.

    The default is for checkpoints without held-out scores: a quarter to the whole of the squared distance between
    mid-grey and white.
    """

    low: float = 0.25
    high: float = 1.0

    @classmethod
    def of(cls, held_out: Mapping[str, Tensor]) -> MapScale:
        """From the maxima of the held-out normal images' maps: half of the median to twice the highest decile."""
        if not held_out:
            return cls()
        peaks = held_out["peak"]
        low, high = float(peaks.median()) / 2, 2 * float(torch.quantile(peaks, 0.9))
        return cls(low, high) if high > low else cls()

    def unit(self, map: NDArray[Any]) -> Float:
        """Map values as 0 to 1."""
        return np.clip((map - self.low) / (self.high - self.low), 0, 1).astype(np.float32)


def overlay(image: NDArray[np.uint8], map: NDArray[Any], scale: MapScale) -> NDArray[np.uint8]:
    """Blend a map [H, W] over an image [H, W, 3]; colours of the image would mix with the map's, so it turns grey."""
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    heat = scale.unit(map)
    # Purple to orange: inferno's own ends are black and nearly white, which an image has too.
    colour = _colours()[np.rint(100 + 120 * heat).astype(int)]
    opaque = (0.85 * np.sqrt(heat))[..., None]
    return np.rint(grey * (1 - opaque) + colour * opaque).astype(np.uint8)


def outlined(
    picture: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int] = OUTLINE
) -> NDArray[np.uint8]:
    """A copy of a picture [H, W, 3] with a line along the inner border of a mask [H, W]."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    result = picture.copy()
    result[mask & ~inside] = colour
    return result


def boxed(
    picture: NDArray[np.uint8], boxes: Iterable[Mapping[str, Any]], original: tuple[int, int]
) -> NDArray[np.uint8]:
    """A copy of a picture [H, W, 3] with a line round each box, one pixel away from it where there is room.

    Boxes have ``x``, ``y``, ``width`` and ``height`` in pixels of the ``original`` height x width.
    """
    result = picture.copy()
    height, width = picture.shape[:2]
    down, across = height / original[0], width / original[1]  # of a narrow strip they differ, by rounding
    for box in boxes:
        left, top = max(0, int(box["x"] * across) - 1), max(0, int(box["y"] * down) - 1)
        right = min(width - 1, math.ceil((box["x"] + box["width"]) * across))
        bottom = min(height - 1, math.ceil((box["y"] + box["height"]) * down))
        result[[top, bottom], left : right + 1] = PREDICTED
        result[top : bottom + 1, [left, right]] = PREDICTED
    return result


def to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """[1 or 3, H, W] in [-1, 1] -> [H, W, 3]; an array of another shape is a ValueError."""
    array = np.asarray(image, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"an image must be [1 or 3, H, W], not {array.shape}")
    scaled = np.rint(np.nan_to_num(array).clip(-1, 1) * 127.5 + 127.5).astype(np.uint8).transpose(1, 2, 0)
    return np.broadcast_to(scaled, (*scaled.shape[:2], 3))


@cache
def _colours() -> Float:
    """256 colours as [256, 3] in 0..255."""
    from matplotlib import colormaps

    table: Float = (colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.float32)
    return table
