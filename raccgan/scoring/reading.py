"""Images in any usual form, decoded for a model in threads while earlier ones are scored."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
from raccgan.data.images.decode import Decoded, decode_placed, pixels_of
from raccgan.data.images.geometry import place_in_square
from raccgan.errors import InputError

One: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor"
"""One image: a file, a Pillow image, an array H x W or H x W x C (uint8, uint16, bool, or float in [0, 1]), or a tensor
[C, H, W] in [-1, 1]."""

Batch: TypeAlias = "One | Iterable[One]"
"""One image, several, or an array [N, H, W] or [N, H, W, C], or a tensor [N, C, H, W]. An array of three axes is one
image in colour where the last axis is at most 4, else N grey ones."""

CHUNK = 8
"""Images that one thread decodes at a time: handing over one small image costs as much as decoding it."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the line that says why."""

    reason: str
    path: Path | None = None


@dataclass(frozen=True)
class Read:
    """An image as a model takes it, or why there is none."""

    path: Path | None
    decoded: Decoded | Skipped


class Reader:
    """Decodes images as the configuration of a model with this many channels says."""

    def __init__(self, config: Config, channels: int) -> None:
        self.config, self.channels = config, channels

    def batches(self, images: Batch, batch: int) -> Iterator[list[Read]]:
        """The images in their order, ``batch`` at a time; the next ones are decoded meanwhile."""
        workers, chunks = min(16, len(os.sched_getaffinity(0))), -(-batch // CHUNK)
        ahead = max(2, 2 * workers // chunks)
        each, waiting = _each(images), deque[list[Future[list[Read]]]]()
        with ThreadPoolExecutor(workers) as pool:
            try:
                while whole := list(islice(each, batch)):
                    parts = (whole[start : start + CHUNK] for start in range(0, len(whole), CHUNK))
                    waiting.append([pool.submit(self._decode, part) for part in parts])
                    if len(waiting) > ahead:
                        yield _joined(waiting.popleft())
                while waiting:
                    yield _joined(waiting.popleft())
            finally:
                for future in (future for futures in waiting for future in futures):
                    future.cancel()

    def _decode(self, chunk: Sequence[One]) -> list[Read]:
        return [self._read(image) for image in chunk]

    def _read(self, image: One) -> Read:
        path = Path(image) if isinstance(image, (str, Path)) else None
        try:
            return Read(path, self._decode_one(path or image))
        except InputError as error:
            return Read(path, Skipped(str(error), path))

    def _decode_one(self, image: One) -> Decoded:
        size, fit, brightness = self.config.image_size, self.config.fit, self.config.brightness
        if isinstance(image, Tensor):
            if image.dim() != 3 or not image.is_floating_point():
                raise InputError(f"a tensor must be [C, H, W] in [-1, 1], got {tuple(image.shape)} of {image.dtype}")
            planes = image.detach().cpu().float().numpy()
            by_pixel = np.moveaxis(planes, 0, -1)  # [H, W, C]
            as_seen = brightness == "keep" and fit != "align"
            if as_seen and planes.shape == (self.channels, size, size):
                return Decoded(planes, place_in_square(by_pixel, size, fit))
            image = (by_pixel + 1) / 2
        elif isinstance(image, Image.Image):
            image = pixels_of(image)
        source = Path(image) if isinstance(image, str) else image
        return decode_placed(source, size=size, channels=self.channels, fit=fit, brightness=brightness)


def _each(images: Batch) -> Iterator[One]:
    """Every single image of a batch, whatever form the batch has."""
    if isinstance(images, (str, Path, Image.Image)):
        yield images
    elif isinstance(images, Tensor):
        yield from (images if images.dim() == 4 else [images])
    elif isinstance(images, np.ndarray):
        several = images.ndim == 4 or (images.ndim == 3 and images.shape[-1] > 4)
        yield from (images if several else [images])
    else:
        for image in images:
            yield from _each(image)


def _joined(chunks: list[Future[list[Read]]]) -> list[Read]:
    return [read for chunk in chunks for read in chunk.result()]
