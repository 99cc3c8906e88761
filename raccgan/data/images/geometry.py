"""The geometry between an image and the model's square: pixels and masks into the square, maps back out of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raccgan.data.images.pose import Pose, find_pose
from raccgan.errors import InputError

FITS = ("stretch", "crop", "pad", "align")

FINEST = 2  # samples along a side of a pixel of the square, at least, where an image is turned: no jagged edges

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Placement(ABC):
    """The place of one image, of height x width, in a square of ``size``."""

    height: int
    width: int
    size: int

    @abstractmethod
    def take(self, planes: Float) -> Float:
        """Channels [C, height, width] of the image as [C, size, size]: bilinear, antialiased; 0 in black bars."""

    @abstractmethod
    def take_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask [height, width] as [size, size]: True where any pixel of a cell is; False in black bars."""

    @abstractmethod
    def original(self, row: int, column: int) -> tuple[int, int]:
        """x and y of the image's pixel under the middle of one of the square's; outside, the nearest on its border."""

    @abstractmethod
    def lay(self, map: Float, width: int, height: int) -> Float:
        """A map [size, size] laid over the image that is drawn as height x width; 0 where the model saw nothing."""

    def _pixel(self, y: float, x: float) -> tuple[int, int]:
        return int(min(max(x, 0), self.width - 1)), int(min(max(y, 0), self.height - 1))


def place_in_square(image: NDArray[Any], size: int, fit: str) -> Placement:
    """Where an image [H, W, C] comes to lie in a square of ``size``.

    ``stretch`` does not keep the aspect, ``crop`` takes the central square, and ``pad`` adds black bars. ``align``,
    which alone looks at pixels, turns the one object on a plain ground upright, its narrower end below.
    """
    height, width = image.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    rows, columns = size, size
    if fit == "align":
        return Turned(height, width, size, find_pose(image))
    if fit == "crop":
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif fit == "pad":
        rows = max(1, round(size * height / max(height, width)))
        columns = max(1, round(size * width / max(height, width)))
    elif fit != "stretch":
        raise InputError(f"no fit called {fit!r}; there are {', '.join(FITS)}")
    upper, left_bar = (size - rows) // 2, (size - columns) // 2
    return Boxed(height, width, size, box, slice(upper, upper + rows), slice(left_bar, left_bar + columns))


def covered(
    mask: NDArray[np.bool_], box: tuple[float, float, float, float], width: int, height: int
) -> NDArray[np.bool_]:
    """[height, width] cells over a box (left, upper, right, lower) of a mask: True where any pixel of a cell is marked.

    A pixel belongs to the cell that its middle lies in. A cell finer than pixels has the pixel under its own middle.
    """
    left, upper, right, lower = box
    (first, last), (top, bottom) = _pixels_of(left, right, width), _pixels_of(upper, lower, height)
    # Sums over everything above and to the left, so that a cell is four look-ups however many pixels it has.
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int32)
    np.cumsum(mask, axis=0, out=sums[1:, 1:])
    np.cumsum(sums, axis=1, out=sums)
    rows = sums[bottom] - sums[top]
    return rows[:, last] > rows[:, first]


def _pixels_of(start: float, stop: float, cells: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first pixel of each cell between start and stop, and the one after its last."""
    edges = start + np.arange(cells + 1) * ((stop - start) / cells)
    borders = np.ceil(edges - 0.5).astype(np.int64)
    first, last = borders[:-1], borders[1:]
    under = np.floor((edges[:-1] + edges[1:]) / 2).astype(np.int64)
    return np.where(first < last, first, under), np.where(first < last, last, under + 1)


@dataclass(frozen=True, eq=False)
class Boxed(Placement):
    """An upright rectangle of the image fills an upright rectangle of the square."""

    box: tuple[float, float, float, float]  # left, upper, right, lower, in the image's pixels
    rows: slice  # where that lands in the square
    columns: slice

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of that part of the square."""
        return self.columns.stop - self.columns.start, self.rows.stop - self.rows.start

    def take(self, planes: Float) -> Float:
        if planes.shape[1:] == (self.size, self.size):
            return np.ascontiguousarray(planes)
        result = np.zeros((len(planes), self.size, self.size), dtype=np.float32)
        for target, plane in zip(result, planes, strict=True):
            source = Image.fromarray(np.ascontiguousarray(plane))
            resized = source.resize(self.resized, Image.Resampling.BILINEAR, self.box)
            target[self.rows, self.columns] = np.asarray(resized)
        return result

    def take_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        result = np.zeros((self.size, self.size), dtype=bool)
        result[self.rows, self.columns] = covered(mask, self.box, *self.resized)
        return result

    def original(self, row: int, column: int) -> tuple[int, int]:
        left, upper, right, lower = self.box
        x = left + (column - self.columns.start + 0.5) * (right - left) / self.resized[0]
        y = upper + (row - self.rows.start + 0.5) * (lower - upper) / self.resized[1]
        return self._pixel(min(max(y, upper), lower - 1), min(max(x, left), right - 1))

    def lay(self, map: Float, width: int, height: int) -> Float:
        drawn = (width / self.width, height / self.height) * 2
        left, upper, right, lower = (round(edge * scale) for edge, scale in zip(self.box, drawn, strict=True))
        seen = Image.fromarray(np.ascontiguousarray(map[self.rows, self.columns]))
        part = seen.resize((max(1, right - left), max(1, lower - upper)), Image.Resampling.BILINEAR)
        result = np.zeros((height, width), np.float32)
        result[upper : upper + part.height, left : left + part.width] = np.asarray(part)
        return result


@dataclass(frozen=True, eq=False)
class Turned(Placement):
    """A turned rectangle of the image fills the square; where it leaves the image, the border is repeated."""

    pose: Pose

    def take(self, planes: Float) -> Float:
        longest = max(float(np.linalg.norm(side)) for side in (self.pose.down, self.pose.right))
        # Means of whole blocks first: to sample every pixel of a large image would take ten times as long.
        block = max(1, int(longest / (FINEST * self.size)))
        finer = max(FINEST, math.ceil(longest / block / self.size))
        result = np.empty((len(planes), self.size, self.size), dtype=np.float32)
        for target, plane in zip(result, planes, strict=True):
            source = np.ascontiguousarray(plane)
            if block > 1:
                source = np.asarray(Image.fromarray(source).reduce(block))
            samples = self._sampled(source, self.size * finer, order=1, block=block)
            samples.reshape(self.size, finer, self.size, finer).mean(axis=(1, 3), out=target)
        return result

    def take_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        # The pixel under the middle of a cell where cells are finer than pixels; every marked pixel where they are not.
        result: NDArray[np.bool_] = self._sampled(mask.astype(np.uint8), self.size, order=0) > 0
        back = self.size * np.linalg.inv(np.stack([self.pose.down, self.pose.right], axis=1))
        some = 1 << 20  # pixels at a time, because a place takes 16 bytes
        marked = np.flatnonzero(mask)
        for start in range(0, len(marked), some):
            places = np.stack(np.unravel_index(marked[start : start + some], mask.shape), axis=1)
            cells = np.floor((places + 0.5 - self.pose.corner) @ back.T).astype(int)
            rows, columns = cells[((cells >= 0) & (cells < self.size)).all(axis=1)].T
            result[rows, columns] = True
        return result

    def original(self, row: int, column: int) -> tuple[int, int]:
        corner, down, right = self.pose
        y, x = corner + (row + 0.5) / self.size * down + (column + 0.5) / self.size * right
        return self._pixel(y, x)

    def lay(self, map: Float, width: int, height: int) -> Float:
        from scipy import ndimage  # as in pose

        # From pixels of the drawing to those of the image, and from there to those of the map.
        shrink = np.diag([self.height / height, self.width / width])
        back = self.size * np.linalg.inv(np.stack([self.pose.down, self.pose.right], axis=1))
        offset = back @ (shrink @ [0.5, 0.5] - self.pose.corner) - 0.5
        laid: Float = ndimage.affine_transform(
            map, back @ shrink, offset, (height, width), order=1, mode="grid-constant"
        )
        return laid

    def _sampled(self, plane: NDArray[Any], size: int, order: int, block: int = 1) -> NDArray[Any]:
        """[size, size] of the image's pixels, or of the means of its blocks of ``block`` x ``block``."""
        from scipy import ndimage  # as in pose

        corner, down, right = (vector / block for vector in self.pose)
        steps = np.stack([down, right], axis=1) / size
        offset = corner + steps @ [0.5, 0.5] - 0.5  # ndimage counts from the middle of the first pixel
        return ndimage.affine_transform(plane, steps, offset, (size, size), order=order, mode="nearest")
