"""A trained model as a library: images in any usual form go in, scores with their decisions come out.

Threads decode the next images while earlier ones are scored.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raccgan.config import Config
from raccgan.data.images.decode import Decoded, decode_placed, pixels_of
from raccgan.data.images.geometry import Float, Placement, place_in_square
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Checkpoint
from raccgan.models.devices import pick_device, require_kernels
from raccgan.scoring.calibration import choose_threshold
from raccgan.scoring.record import ScoreRecord
from raccgan.scoring.scorer import MINIMUM, Scorer

One: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor"
"""One image: a file, a Pillow image, an array H x W or H x W x C (uint8, uint16, bool, or float in [0, 1]), or a tensor
[C, H, W] in [-1, 1]."""

Batch: TypeAlias = "One | Iterable[One]"
"""One image, several, or an array [N, H, W] or [N, H, W, C], or a tensor [N, C, H, W]. An array of three axes is one
image in colour where the last axis is at most 4, else N grey ones."""

CHUNK = 8  # images that a thread decodes at a time: handing over one small image costs as much as decoding it


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the line that says why."""

    reason: str
    path: Path | None = None


Read: TypeAlias = tuple[Path | None, Decoded]  # the file of an image, and the image as a model takes it


class Peak(NamedTuple):
    """The maximum of an anomaly map, and the pixel of the upright original at which it lies."""

    value: float
    x: int
    y: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Result(ScoreRecord):
    """The record of one image's score, and what it was scored from. Arrays are read-only, and None without details."""

    peak: Peak
    place: Placement  # of the original, upright, in the square that the model sees
    path: Path | None = None
    map: Float | None = None  # [size, size]: squared difference per pixel, mean over channels, smoothed
    image: Float | None = None  # [C, size, size] in [-1, 1]: what the model saw
    reconstruction: Float | None = None  # [C, size, size] in [-1, 1]


class Detector:
    """A checkpoint's networks on a device, and a threshold; :meth:`load` reads the checkpoint from a file.

    Scoring changes nothing in the object, so several threads may score with one. An image's score is the same alone
    or in any batch, up to the rounding of the library's convolutions (see :class:`raccgan.scoring.scorer.Scorer`).
    """

    def __init__(
        self,
        stored: Checkpoint,
        threshold: float,
        device: torch.device,
        *,
        label_policy: str = MINIMUM,
        compiled: bool = False,
        **settings: Any,
    ) -> None:
        self.config = checkpoints.config_of(stored, **settings)
        require_kernels(self.config.kernels, device)
        networks = checkpoints.networks_of(stored, self.config, device)
        self.scorer = Scorer(self.config, networks, stored.classes, label_policy, compiled=compiled)
        self.classes = tuple(stored.classes)
        self.threshold = threshold
        self.channels = stored.channels
        self.size = self.config.image_size  # the side of the square that images are resized to, in pixels

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threshold: float | None = None,
        quantile: float | None = None,
        sensitivity: float | None = None,
        label_policy: str = MINIMUM,
        device: str = "auto",
        compiled: bool = False,
        **settings: Any,
    ) -> Detector:
        """Read a run's folder, or a checkpoint file; an InputError if there is no such one, device or class.

        Args:
            threshold, quantile, sensitivity: at most one of them decides instead of the checkpoint's threshold, see
                :func:`raccgan.scoring.calibration.choose_threshold`.
            label_policy, compiled: see :class:`raccgan.scoring.scorer.Scorer`.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU where there is one.
            settings: settings of :class:`Config` that change how, not what: ``kernels``, ``score_batch``.
        """
        stored = checkpoints.load(Path(path))
        chosen = choose_threshold(stored, threshold=threshold, quantile=quantile, sensitivity=sensitivity)
        return cls(stored, chosen, pick_device(device), label_policy=label_policy, compiled=compiled, **settings)

    def score(self, images: Batch, *, details: bool = True) -> list[Result]:
        """Score one image or several (:data:`Batch`) of any size, grey or colour; one result each, in order.

        ``details`` keeps map, image and reconstruction: (2 C + 1) size² floats an image. An InputError names an image
        that cannot be read, or whose values have no defined scale, and the reason.
        """
        results: list[Result] = []
        for found in self.scan(images, details=details):
            if isinstance(found, Skipped):
                raise InputError(found.reason)
            results.append(found)
        return results

    def scan(self, images: Batch, *, details: bool = True) -> Iterator[Result | Skipped]:
        """:meth:`score` for as many images as you like: one by one in order, what cannot be read named in its place."""
        for batch in self.scan_batches(images, details=details):
            yield from batch

    def scan_batches(self, images: Batch, *, details: bool = True) -> Iterator[list[Result | Skipped]]:
        """:meth:`scan` in the batches that are scored together; the next ones are decoded meanwhile."""
        read_ahead = _read_ahead(_each(images), self.scorer.batch, self.config, self.channels)
        while batch := list(islice(read_ahead, self.scorer.batch)):
            results = self._results([read for read in batch if not isinstance(read, Skipped)], details)
            yield [read if isinstance(read, Skipped) else next(results) for read in batch]

    def _results(self, batch: Sequence[Read], details: bool) -> Iterator[Result]:
        pixels = np.empty((len(batch), self.channels, self.size, self.size), np.float32)
        for i, (_, decoded) in enumerate(batch):
            pixels[i] = decoded.pixels
        scored = self.scorer.score(torch.from_numpy(pixels), details=True)
        if not bool(scored.score.isfinite().all()):
            raise InputError("a score is not finite: the checkpoint is broken")
        maps, reconstructions = scored.details()
        for array in (maps, reconstructions, pixels):
            array.setflags(write=False)
        for i, ((path, decoded), row) in enumerate(zip(batch, scored.rows(self.classes), strict=True)):
            highest = divmod(int(maps[i].argmax()), self.size)
            peak = Peak(float(maps[i][highest]), *decoded.place.original(*highest))
            yield Result(
                **row,
                threshold=self.threshold,
                map_max=peak.value,
                map_x=peak.x,
                map_y=peak.y,
                peak=peak,
                place=decoded.place,
                path=path,
                map=maps[i] if details else None,
                image=pixels[i] if details else None,
                reconstruction=reconstructions[i] if details else None,
            )


def _read_ahead(images: Iterator[One], batch: int, config: Config, channels: int) -> Iterator[Read | Skipped]:
    """The images in order, as a model takes them, while threads decode at least the next two batches."""
    workers, chunk = min(16, len(os.sched_getaffinity(0))), min(CHUNK, batch)
    ahead = 2 * max(workers, -(-batch // chunk))
    waiting = deque[Future[list[Read | Skipped]]]()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while some := list(islice(images, chunk)):
                waiting.append(pool.submit(lambda few: [_read(image, config, channels) for image in few], some))
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
