"""Images as callers have them, in files, arrays, Pillow images or tensors, as a model takes them.

Threads decode the next images while earlier ones are scored.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raccgan.config import Config
from raccgan.data.cpus import usable_cpus
from raccgan.data.images.decode import Decoded, decode_placed, pixels_of
from raccgan.data.images.geometry import Float, place_in_square
from raccgan.errors import InputError

One: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor"
"""One image: a file, a Pillow image, an array H x W or H x W x C (uint8, uint16, bool, or float in [0, 1]; C is 1 to 4:
grey or red, green, blue, then alpha), or a float tensor [C, H, W] in [-1, 1], C being 1 or 3."""

Batch: TypeAlias = "One | Iterable[One]"
"""One image, several, or an array [N, H, W] or [N, H, W, C], or a tensor [N, C, H, W]. An array of three axes is one
image in colour where the last axis is at most 4, else N grey ones. Three grey ones could be the planes of one in
colour, so an array [3, H, W] is refused: such images come as a list or as [3, H, W, 1]."""

CHUNK = 8  # images that one thread decodes at a time: handing over a small image costs as much as decoding it
SIGNED = (-1.0, 1.0)  # the range of a tensor's values unless the caller says otherwise


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the line that says why."""

    reason: str
    path: Path | None = None


Read: TypeAlias = tuple[Path | None, Decoded]
"""The file of an image, and the image as a model takes it."""


@dataclass
class Reader:
    """Reads images for a model of this configuration and number of channels.

    Args:
        config: size, fit and brightness.
        channels: 1 or 3.
        range: the values of black and white in tensors; None for [-1, 1], with one warning where a tensor has no value
            below 0, as those in [0, 1] have none.
        bgr: colours of arrays and tensors come as blue, green, red, as OpenCV has them; files and Pillow images know
            their own order.
        warned: that warning is out already.
    """

    config: Config
    channels: int
    range: tuple[float, float] | None = None
    bgr: bool = False
    warned: bool = False

    def __post_init__(self) -> None:
        low, high = self.range or SIGNED
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise InputError(f"range={self.range}: black has to be a lower number than white, as in (0, 1)")

    def batches(self, images: Batch, batch: int) -> Iterator[list[Read | Skipped]]:
        """The images in order, ``batch`` at a time."""
        read = self._ahead(self.each(images), batch)
        while some := list(islice(read, batch)):
            yield some

    def _ahead(self, images: Iterator[One], batch: int) -> Iterator[Read | Skipped]:
        """The images one by one, while threads decode at least the next two batches."""
        workers, chunk = min(16, usable_cpus()), min(CHUNK, batch)
        ahead = 2 * max(workers, -(-batch // chunk))
        waiting = deque[Future[list[Read | Skipped]]]()
        with ThreadPoolExecutor(workers) as pool:
            try:
                while some := list(islice(images, chunk)):
                    waiting.append(pool.submit(list, map(self._read, some)))
                    if len(waiting) > ahead:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def each(self, images: Batch) -> Iterator[One]:
        """Every single image of a batch, whatever form the batch has."""
        if isinstance(images, (str, Path, Image.Image)):
            yield images
        elif isinstance(images, Tensor):
            yield from map(self._looked_at, images if images.dim() == 4 else [images])
        elif isinstance(images, np.ndarray):
            colours = (3, 4) if self.channels == 3 else (3,)  # the first axis may be theirs: that is refused later
            grey = images.ndim == 3 and images.shape[-1] > 4 and len(images) not in colours
            yield from (images if images.ndim == 4 or grey else [images])
        else:
            for image in images:
                yield from self.each(image)

    def _looked_at(self, image: Tensor) -> Tensor:
        """The image, after the one warning that a tensor in [0, 1] calls for."""
        if self.range is None and not self.warned and image.numel() and image.min() >= 0:
            self.warned = True
            warnings.warn(
                "a tensor without a value below 0 was taken as [-1, 1]: give range=(0, 1) for tensors in [0, 1], or "
                "range=(-1, 1) to say that this is meant",
                stacklevel=2,
            )
        return image

    def _read(self, image: One) -> Read | Skipped:
        source = Path(image) if isinstance(image, str) else image
        path = source if isinstance(source, Path) else None
        try:
            return path, self._decode(source)
        except InputError as error:
            return Skipped(str(error), path)

    def _decode(self, image: Path | Image.Image | NDArray[Any] | Tensor) -> Decoded:
        size, fit, brightness = self.config.image_size, self.config.fit, self.config.brightness
        if isinstance(image, Tensor) and brightness == "keep" and fit != "align":
            planes = self._planes(image)
            if planes.shape == (self.channels, size, size):  # as the model sees it
                return Decoded(planes, place_in_square(np.moveaxis(planes, 0, -1), size, fit))
        pixels = self.pixels(image)
        return decode_placed(pixels, size=size, channels=self.channels, fit=fit, brightness=brightness)

    def pixels(self, image: One) -> Path | NDArray[Any]:
        """One image as :func:`raccgan.data.images.decode.decode` takes it: a file, or H x W or H x W x C.

        Raises:
            InputError: the shape or dtype of an array or a tensor is not that of an image.
        """
        if isinstance(image, Tensor):
            return (np.moveaxis(self._planes(image), 0, -1) + 1) / 2
        if isinstance(image, Image.Image):
            return pixels_of(image)
        return self._by_pixel(image) if isinstance(image, np.ndarray) else Path(image)

    def _planes(self, image: Tensor) -> Float:
        """A tensor as [C, H, W] in [-1, 1]."""
        if image.dim() != 3 or not image.is_floating_point():
            raise InputError(f"a tensor must be [C, H, W] in [-1, 1], got {tuple(image.shape)} of {image.dtype}")
        planes: Float = image.detach().cpu().float().numpy()
        low, high = self.range or SIGNED
        if (low, high) != SIGNED:
            planes = ((planes.astype(np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
        return np.ascontiguousarray(planes[::-1]) if self.bgr and len(planes) == 3 else planes

    def _by_pixel(self, image: NDArray[Any]) -> NDArray[Any]:
        """An array H x W or H x W x C, its colours as red, green, blue."""
        if image.ndim == 3 and image.shape[-1] > 4 and image.shape[0] <= 4:
            grey = "; three grey images come as a list or as [3, H, W, 1]" if image.shape[0] == 3 else ""
            raise InputError(
                f"an array of shape {image.shape} has its channels first: an image is H x W x C, which "
                f"np.moveaxis(array, -3, -1) makes of it{grey}"
            )
        if self.bgr and image.ndim == 3 and image.shape[-1] in (3, 4):
            return image[..., [2, 1, 0, 3][: image.shape[-1]]]
        return image
