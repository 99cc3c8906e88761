"""A trained model as a library: images in any usual form go in, scores with their decisions come out.

    from raccgan import Detector

    detector = Detector.load("runs/scans")
    for result in detector.score(["a.png", "b.png"]):
        print(result.path, result.score, result.anomalous)

``python -m raccgan.detect`` is a thin layer over this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raccgan.config import Config
from raccgan.data.images.decode import Decoded
from raccgan.data.images.geometry import Float, Placement
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Checkpoint
from raccgan.models.devices import pick_device, require_kernels
from raccgan.scoring.reading import Batch, Read, Reader, Skipped
from raccgan.scoring.record import ScoreRecord
from raccgan.scoring.scorer import MINIMUM, Scored, Scorer
from raccgan.scoring.threshold import choose_threshold


@dataclass(frozen=True, eq=False, kw_only=True)
class Result(ScoreRecord):
    """The record of one image's score, and what it was scored from. Arrays are read-only, and None without details."""

    place: Placement  # of the original, upright, in the square that the model sees
    path: Path | None = None
    map: Float | None = None  # [size, size]: squared difference per pixel, mean over channels, smoothed
    image: Float | None = None  # [C, size, size] in [-1, 1]: what the model saw
    reconstruction: Float | None = None  # [C, size, size] in [-1, 1]


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
            threshold, quantile, sensitivity: at most one of them decides instead of the checkpoint's threshold, see
                :func:`raccgan.scoring.threshold.choose_threshold`.
            label_policy: ``minimum``, or the normal class that the images are known to belong to, if normal.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU where there is one.
            compiled: score through torch.compile, see :class:`raccgan.scoring.scorer.Scorer`.
            settings: settings of :class:`Config` that change how, not what: ``kernels``, ``score_batch``.

        Raises:
            InputError: no such checkpoint, device or class, or nothing to take the threshold from.
        """
        stored = checkpoints.load(Path(path))
        chosen = choose_threshold(stored, threshold=threshold, quantile=quantile, sensitivity=sensitivity)
        place = pick_device(device)
        return cls.of(stored, chosen, place, label_policy=label_policy, compiled=compiled, **settings)

    @classmethod
    def of(
        cls,
        stored: Checkpoint,
        threshold: float,
        device: torch.device,
        *,
        label_policy: str = MINIMUM,
        compiled: bool = False,
        **settings: Any,
    ) -> Detector:
        """The same from a checkpoint that is in memory."""
        config = checkpoints.config_of(stored, **settings)
        require_kernels(config.kernels, device)
        networks = checkpoints.networks_of(stored, config, device)
        scorer = Scorer(config, networks, stored.classes, label_policy, compiled=compiled)
        return cls(scorer, classes=stored.classes, threshold=threshold, channels=stored.channels, config=config)

    @property
    def size(self) -> int:
        """The side of the square that images are resized to, in pixels."""
        return self.config.image_size

    def score(self, images: Batch, *, details: bool = True) -> list[Result]:
        """Score one image or several; one result each, in order.

        Args:
            images: see :data:`raccgan.scoring.reading.Batch`. Any size, grey or colour; resized as in training.
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
        for batch in Reader(self.config, self.channels).batches(images, self.scorer.batch):
            yield self._score(batch, details)

    def _score(self, batch: Sequence[Read], details: bool) -> list[Result | Skipped]:
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
        for array in (maps, reconstructions, pixels):
            array.setflags(write=False)
        for i, ((path, decoded), row) in enumerate(zip(batch, scored.rows(self.classes), strict=True)):
            peak = divmod(int(maps[i].argmax()), self.size)
            x, y = decoded.place.original(*peak)
            yield Result(
                **row,
                threshold=self.threshold,
                map_max=float(maps[i][peak]),
                map_x=x,
                map_y=y,
                place=decoded.place,
                path=path,
                map=maps[i] if details else None,
                image=pixels[i] if details else None,
                reconstruction=reconstructions[i] if details else None,
            )
