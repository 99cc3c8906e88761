"""A trained model as a library: images in any usual form go in, scores with their decisions come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raccgan.data.images.geometry import Float, Placement
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Checkpoint
from raccgan.models.devices import pick_device, require_kernels, settle
from raccgan.scoring import regions
from raccgan.scoring.calibration import choose_pixel_threshold, choose_threshold
from raccgan.scoring.reading import Batch, Read, Reader, Skipped
from raccgan.scoring.record import ScoreRecord
from raccgan.scoring.regions import Box, Marked
from raccgan.scoring.scorer import MINIMUM, Scorer


class Peak(NamedTuple):
    """The maximum of an anomaly map, and the pixel of the upright original at which it lies."""

    value: float
    x: int
    y: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Result(ScoreRecord):
    """The record of one image's score, and what it was scored from. Arrays are read-only, and None without details.

    ``mask`` and ``boxes`` are worked out when they are first asked for, and are None without details too.
    """

    peak: Peak
    place: Placement  # of the original, upright, in the square that the model sees
    path: Path | None = None
    map: Float | None = None  # [size, size]: squared difference per pixel, mean over channels, smoothed
    image: Float | None = None  # [C, size, size] in [-1, 1]: what the model saw
    reconstruction: Float | None = None  # [C, size, size] in [-1, 1]
    pixel_threshold: float | None = None  # None where the checkpoint has none

    @cached_property
    def marked(self) -> Marked | None:
        """Mask and boxes; None without details, or without a threshold of pixels."""
        if self.map is None or self.pixel_threshold is None:
            return None
        found = regions.mark(self.map, self.place, self.pixel_threshold)
        found.mask.setflags(write=False)
        return found

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """The anomalous pixels [height, width] of the upright original: its map is above the threshold of pixels."""
        return None if self.marked is None else self.marked.mask

    @property
    def boxes(self) -> tuple[Box, ...] | None:
        """The regions of the mask, that with the largest peak first; empty where no pixel is anomalous."""
        return None if self.marked is None else self.marked.boxes


class Detector:
    """A checkpoint's networks on a device, and a threshold; :meth:`load` reads the checkpoint from a file.

    Scoring changes nothing in the object, so several threads may score with one. It can be pickled and copied, and then
    holds its checkpoint; a forked child of its process scores in one thread. An image's score is the same alone or in
    any batch, up to the rounding of the library's convolutions (see :class:`raccgan.scoring.scorer.Scorer`).
    """

    def __init__(
        self,
        stored: Checkpoint,
        threshold: float,
        device: torch.device,
        *,
        label_policy: str = MINIMUM,
        compiled: bool = False,
        pixel_threshold: float | None = None,
        **settings: Any,
    ) -> None:
        """``pixel_threshold`` decides instead of the checkpoint's; the rest is as in :meth:`load`."""
        settle(device, compiled=compiled)
        self.config = checkpoints.config_of(stored, **settings)
        require_kernels(self.config.kernels, device)
        networks = checkpoints.networks_of(stored, self.config, device)
        self.scorer = Scorer(self.config, networks, stored.classes, label_policy, compiled=compiled)
        self.classes = tuple(stored.classes)
        self.threshold = threshold
        self.pixel_threshold = choose_pixel_threshold(stored, threshold=pixel_threshold)
        self.stored = dataclasses.replace(stored, optimisers={}, history={})
        self._options = {"label_policy": label_policy, "compiled": compiled, **settings}
        self._warned = False  # of tensors in [0, 1]
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
        pixel_threshold: float | None = None,
        label_policy: str = MINIMUM,
        device: str = "auto",
        **settings: Any,
    ) -> Detector:
        """Read a run's folder, or a checkpoint file; an InputError if there is no such one, device or class.

        Args:
            threshold, quantile, sensitivity: at most one of them decides instead of the checkpoint's threshold, see
                :func:`raccgan.scoring.calibration.choose_threshold`.
            pixel_threshold: decides about pixels instead of the checkpoint's, see
                :func:`raccgan.scoring.calibration.choose_pixel_threshold`.
            label_policy: see :class:`raccgan.scoring.scorer.Scorer`.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU where there is one.
            settings: ``compiled``, see :class:`raccgan.scoring.scorer.Scorer`; and settings of :class:`Config` that
                change how, not what: ``kernels``, ``score_batch``.
        """
        stored = checkpoints.load(Path(path))
        how: dict[str, Any] = {"quantile": quantile, "sensitivity": sensitivity}
        chosen = choose_threshold(stored, threshold=threshold, **how)
        if threshold is None:
            pixel_threshold = choose_pixel_threshold(stored, threshold=pixel_threshold, **how)
        settings |= {"label_policy": label_policy, "pixel_threshold": pixel_threshold}
        return cls(stored, chosen, pick_device(device), **settings)

    def __reduce__(self) -> tuple[Any, ...]:
        options = self._options | {"pixel_threshold": self.pixel_threshold}
        return _remade, (vars(self.stored), self.threshold, str(self.scorer.device), options)

    def score(
        self,
        images: Batch,
        *,
        details: bool = True,
        range: tuple[float, float] | None = None,
        bgr: bool = False,
    ) -> list[Result]:
        """Score one image or several (:data:`raccgan.scoring.reading.Batch`) of any size; one result each, in order.

        An InputError names an image that cannot be read, or whose values have no defined scale, and the reason.

        Args:
            details: keep map, image and reconstruction; they take (2 C + 1) size² floats an image. Without them there
                are no mask and no boxes.
            range, bgr: the values of black and white in tensors, (-1, 1) where None; colours of arrays and tensors are
                in OpenCV's order, blue first. See :class:`raccgan.scoring.reading.Reader`.
        """
        results: list[Result] = []
        for found in self.scan(images, details=details, range=range, bgr=bgr):
            if isinstance(found, Skipped):
                raise InputError(found.reason)
            results.append(found)
        return results

    def scan(self, images: Batch, *, details: bool = True, **form: Any) -> Iterator[Result | Skipped]:
        """:meth:`score` for as many images as you like: one by one in order, what cannot be read named in its place.

        ``form`` is ``range`` and ``bgr`` as there.
        """
        for batch in self.scan_batches(images, details=details, **form):
            yield from batch

    def scan_batches(self, images: Batch, *, details: bool = True, **form: Any) -> Iterator[list[Result | Skipped]]:
        """:meth:`scan` in the batches that are scored together; the next ones are decoded meanwhile."""
        reader = Reader(self.config, self.channels, **form, warned=self._warned)
        for batch in reader.batches(images, self.scorer.batch):
            results = self._results([read for read in batch if not isinstance(read, Skipped)], details)
            yield [read if isinstance(read, Skipped) else next(results) for read in batch]
            self._warned |= reader.warned

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
                pixel_threshold=self.pixel_threshold,
            )


def _remade(fields: dict[str, Any], threshold: float, device: str, options: dict[str, Any]) -> Detector:
    """The detector that was pickled or copied, on the same device; an InputError if that is not there."""
    return Detector(Checkpoint(**fields), threshold, pick_device(device), **options)
