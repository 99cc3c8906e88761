"""Images in any usual form, decoded for a model in threads while earlier ones are scored."""

from __future__ import annotations

import os
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


Read: TypeAlias = tuple[Path | None, Decoded]
"""The file of an image, and the image as a model takes it."""


def read_batches(images: Batch, batch: int, config: Config, channels: int) -> Iterator[list[Read | Skipped]]:
    """The images in order, ``batch`` at a time, as a model of this configuration takes them."""
    read = _read_ahead(_each(images), batch, config, channels)
    while some := list(islice(read, batch)):
        yield some


def _read_ahead(images: Iterator[One], batch: int, config: Config, channels: int) -> Iterator[Read | Skipped]:
    """The images one by one, while threads decode at least the next two batches."""

    def read_chunk(chunk: list[One]) -> list[Read | Skipped]:
        return [_read(image, config, channels) for image in chunk]

    workers, chunk = min(16, len(os.sched_getaffinity(0))), min(CHUNK, batch)
    ahead = 2 * max(workers, -(-batch // chunk))
    waiting = deque[Future[list[Read | Skipped]]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while some := list(islice(images, chunk)):
                waiting.append(pool.submit(read_chunk, some))
                if len(waiting) > ahead:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read(image: One, config: Config, channels: int) -> Read | Skipped:
    source = Path(image) if isinstance(image, str) else image
    path = source if isinstance(source, Path) else None
    try:
        return path, _decode(source, config, channels)
    except InputError as error:
        return Skipped(str(error), path)


def _decode(image: Path | Image.Image | NDArray[Any] | Tensor, config: Config, channels: int) -> Decoded:
    size, fit, brightness = config.image_size, config.fit, config.brightness
    if isinstance(image, Tensor):
        if image.dim() != 3 or not image.is_floating_point():
            raise InputError(f"a tensor must be [C, H, W] in [-1, 1], got {tuple(image.shape)} of {image.dtype}")
        planes = image.detach().cpu().float().numpy()
        by_pixel = np.moveaxis(planes, 0, -1)  # [H, W, C]
        as_seen = brightness == "keep" and fit != "align"
        if as_seen and planes.shape == (channels, size, size):
            return Decoded(planes, place_in_square(by_pixel, size, fit))
        image = (by_pixel + 1) / 2
    elif isinstance(image, Image.Image):
        image = pixels_of(image)
    return decode_placed(image, size=size, channels=channels, fit=fit, brightness=brightness)


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
