"""A trained model as a library: images in any usual form go in, scores with their decisions come out.

    from raccgan import Detector

    detector = Detector.load("runs/scans")
    for result in detector.score(["a.png", "b.png"]):
        print(result.path, result.score, result.anomalous)

``python -m raccgan.detect`` is a thin layer over this.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raccgan.cli import options
from raccgan.config import Config
from raccgan.data.images.decode import Decoded, decode_placed, pixels_of
from raccgan.data.images.geometry import Float, Placement, place_in_square
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Checkpoint
from raccgan.scoring.scorer import MINIMUM, Scored, Scorer, threshold_at, threshold_of

One: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor"
"""One image: a file, a Pillow image, an array H x W or H x W x C (uint8, uint16, bool, or float in [0, 1]), or a tensor
[C, H, W] in [-1, 1]."""

Batch: TypeAlias = "One | Iterable[One]"
"""One image, several, or an array [N, H, W] or [N, H, W, C], or a tensor [N, C, H, W]. An array of three axes is one
image in colour where the last axis is at most 4, else N grey ones."""

Item = TypeVar("Item")
Value = TypeVar("Value")

CHUNK = 8
"""Images that one thread decodes at a time: handing over one small image costs as much as decoding it."""


@dataclass(frozen=True)
class Peak:
    """The maximum of an anomaly map, at the pixel of the original (upright) image where it lies."""

    value: float
    x: int
    y: int


@dataclass(frozen=True, eq=False)
class Result:
    """What is known about one image. Arrays are read-only, and None where they were not asked for."""

    score: float
    threshold: float
    nearest_class: str  # the normal class under which the image looks most normal
    residual: float  # the image term of the score alone
    feature: float  # the feature term alone, its weight kappa not applied
    density: float  # distance of the descriptor from those of normal images
    texture_density: float  # distance of the texture from that of normal images
    defect_density: float  # distance of the largest errors from those of normal images
    peak: Peak
    place: Placement  # of the original, upright, in the square that the model sees
    path: Path | None = None
    map: Float | None = None  # [size, size]: squared difference per pixel, mean over channels, smoothed
    image: Float | None = None  # [C, size, size] in [-1, 1]: what the model saw
    reconstruction: Float | None = None  # [C, size, size] in [-1, 1]

    @property
    def anomalous(self) -> bool:
        """True where the score is above the threshold."""
        return self.score > self.threshold


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the line that says why."""

    reason: str
    path: Path | None = None


class Detector:
    """A trained model and a threshold.

    Scoring changes nothing in the object, so several threads may score with one. An image's score is the same alone
    or in any batch, up to the rounding of the library's convolutions (see :class:`raccgan.scoring.scorer.Scorer`).
    """

    def __init__(self, scorer: Scorer, *, classes: Sequence[str], threshold: float, channels: int, config: Config):
        self.scorer = scorer
        self.classes = tuple(classes)
        self.threshold = threshold
        self.channels = channels
        self.config = config

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
        """Read a run's folder, or a checkpoint file.

        Args:
            path: the folder or the file.
            threshold: decides instead of the checkpoint's; at most one of this and the next two.
            quantile: of the scores of held-out normal images, see :func:`choose_threshold`.
            sensitivity: the share of held-out normal images to flag at most, see :func:`choose_threshold`.
            label_policy: ``minimum``, or the normal class that the images are known to belong to, if normal.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU where there is one.
            compiled: score through torch.compile, see :class:`raccgan.scoring.scorer.Scorer`.
            settings: settings of :class:`Config` that change how, not what: ``kernels``, ``score_batch``.

        Raises:
            InputError: no such checkpoint, device or class, or nothing to take the threshold from.
        """
        stored = checkpoints.load(Path(path))
        chosen = choose_threshold(stored, threshold=threshold, quantile=quantile, sensitivity=sensitivity)
        return cls.of(stored, chosen, label_policy=label_policy, device=device, compiled=compiled, **settings)

    @classmethod
    def of(
        cls,
        stored: Checkpoint,
        threshold: float,
        *,
        label_policy: str = MINIMUM,
        device: str = "auto",
        compiled: bool = False,
        **settings: Any,
    ) -> Detector:
        """The same from a checkpoint that is in memory."""
        place = options.pick_device(device)
        config = checkpoints.config_of(stored, **settings)
        options.require_kernels(config.kernels, place)
        networks = checkpoints.networks_of(stored, config, place)
        scorer = Scorer.of(config, networks, stored.classes, label_policy, compiled=compiled)
        return cls(scorer, classes=stored.classes, threshold=threshold, channels=stored.channels, config=config)

    @property
    def size(self) -> int:
        """The side of the square that images are resized to, in pixels."""
        return self.config.image_size

    def score(self, images: Batch, *, details: bool = True) -> list[Result]:
        """Score one image or several; one result each, in order.

        Args:
            images: see :data:`Batch`. Any size, grey or colour; they are resized as in training.
            details: keep map, image and reconstruction; they take (2 C + 1) size² floats an image.

        Raises:
            InputError: an image cannot be read, or its values have no defined scale; names it and the reason.
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
        workers = min(16, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            chunks = _chunks(self._each(images), self.scorer.batch)
            ahead = 2 * max(workers, -(-self.scorer.batch // CHUNK))
            for chunk in _regroup(_ahead(pool, self._decode, chunks, ahead), self.scorer.batch):
                yield self._score(chunk, details)

    def _each(self, images: Batch) -> Iterator[One]:
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
                yield from self._each(image)

    def _decode(self, chunk: Sequence[One]) -> list[_Read]:
        return [self._read(image) for image in chunk]

    def _read(self, image: One) -> _Read:
        path = Path(image) if isinstance(image, (str, Path)) else None
        try:
            return _Read(path, self._decode_one(path or image))
        except InputError as error:
            return _Read(path, Skipped(str(error), path))

    def _decode_one(self, image: One) -> Decoded:
        if isinstance(image, Tensor):
            if image.dim() != 3 or not image.is_floating_point():
                raise InputError(f"a tensor must be [C, H, W] in [-1, 1], got {tuple(image.shape)} of {image.dtype}")
            pixels = image.detach().to("cpu", torch.float32)
            by_pixel = pixels.movedim(0, -1).numpy()  # [H, W, C]
            as_seen = self.config.brightness == "keep" and self.config.fit != "align"
            if as_seen and tuple(pixels.shape) == (self.channels, self.size, self.size):
                return Decoded(pixels.numpy(), place_in_square(by_pixel, self.size, self.config.fit))
            image = (by_pixel + 1) / 2
        elif isinstance(image, Image.Image):
            image = pixels_of(image)
        source = Path(image) if isinstance(image, str) else image
        return decode_placed(
            source, size=self.size, channels=self.channels, fit=self.config.fit, brightness=self.config.brightness
        )

    def _score(self, batch: Sequence[_Read], details: bool) -> list[Result | Skipped]:
        readable = [(read.path, read.decoded) for read in batch if isinstance(read.decoded, Decoded)]
        pixels = np.empty((len(readable), self.channels, self.size, self.size), np.float32)
        for place, (_, decoded) in enumerate(readable):
            pixels[place] = decoded.pixels
        scored = self.scorer.score(torch.from_numpy(pixels), details=True)
        if not bool(scored.score.isfinite().all()):
            raise InputError("a score is not finite: the checkpoint is broken")
        results = self._results(readable, pixels, scored, details)
        return [read.decoded if isinstance(read.decoded, Skipped) else next(results) for read in batch]

    def _results(
        self, batch: Sequence[tuple[Path | None, Decoded]], pixels: Float, scored: Scored, details: bool
    ) -> Iterator[Result]:
        assert scored.map is not None
        assert scored.reconstruction is not None
        maps, reconstructions = scored.map.numpy(), scored.reconstruction.numpy()
        peaks = maps.reshape(len(maps), self.size**2).argmax(axis=1) if len(maps) else []
        for array in (maps, reconstructions, pixels):
            array.setflags(write=False)
        found = zip(batch, scored.score.tolist(), scored.condition.tolist(), scored.terms(), peaks, strict=True)
        for i, ((path, decoded), score, condition, terms, peak) in enumerate(found):
            row, column = divmod(int(peak), self.size)
            x, y = decoded.place.original(row, column)
            yield Result(
                score=score,
                threshold=self.threshold,
                nearest_class=self.classes[condition],
                **terms,
                peak=Peak(float(maps[i, row, column]), x, y),
                place=decoded.place,
                path=path,
                map=maps[i] if details else None,
                image=pixels[i] if details else None,
                reconstruction=reconstructions[i] if details else None,
            )


@dataclass(frozen=True)
class _Read:
    path: Path | None
    decoded: Decoded | Skipped


def choose_threshold(
    stored: Checkpoint,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    sensitivity: float | None = None,
) -> float:
    """The threshold to decide with.

    Args:
        stored: the checkpoint; with none of the others, its own threshold.
        threshold: this one.
        quantile: this quantile, 0 to 1, of the scores of the held-out normal images.
        sensitivity: the lowest threshold that at most this share of the held-out normal images exceeds.

    Raises:
        InputError: more than one is given, or the checkpoint has no threshold or no held-out scores to take it from.
    """
    if sum(value is not None for value in (threshold, quantile, sensitivity)) > 1:
        raise InputError("threshold, quantile and sensitivity exclude each other: give one")
    if threshold is not None:
        if not np.isfinite(threshold):
            raise InputError(f"the threshold must be a finite number, got {threshold}")
        return float(threshold)
    if quantile is None and sensitivity is None:
        if stored.threshold is None:
            raise InputError(
                "the checkpoint has no threshold: its encoder is not trained yet; or give one with --threshold"
            )
        return stored.threshold
    if not stored.held_out:
        raise InputError(
            "the checkpoint holds no scores of held-out normal images: "
            "python -m raccgan.calibrate CHECKPOINT FOLDER_OF_NORMAL_IMAGES adds them"
        )
    scores = stored.held_out["score"].numpy()
    if sensitivity is not None:
        return threshold_at(scores, sensitivity)
    assert quantile is not None
    if not 0 <= quantile <= 1:
        raise InputError(f"the quantile is {quantile}; it must be from 0 to 1")
    return threshold_of(scores, quantile)


def _chunks(items: Iterator[Item], batch: int) -> Iterator[list[Item]]:
    """Groups of at most CHUNK that no batch's border cuts."""
    while whole := list(islice(items, batch)):
        for start in range(0, len(whole), CHUNK):
            yield whole[start : start + CHUNK]


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Value], items: Iterator[Item], most: int
) -> Iterator[Value]:
    """``map`` in threads, in order, at most ``most`` items before what is asked for."""
    waiting: deque[Future[Value]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _regroup(groups: Iterable[list[Item]], batch: int) -> Iterator[list[Item]]:
    """Small groups joined into batches."""
    joined: list[Item] = []
    for group in groups:
        joined += group
        if len(joined) >= batch:
            yield joined
            joined = []
    if joined:
        yield joined
