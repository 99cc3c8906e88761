"""Training and scoring as one object, by the conventions of scikit-learn and PyOD."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from raccgan.config import Config, make_config
from raccgan.data.images.decode import count_channels
from raccgan.data.listing import images_in, list_images
from raccgan.data.samples import Sample, Source, printable
from raccgan.data.sources.registry import SOURCES, load_source
from raccgan.data.splits import Split, hold_out, make_split, names_of, text_of
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.devices import pick_device, require_kernels, settle
from raccgan.outputs.files import prepare_out
from raccgan.scoring.calibration import calibrate, fitted_scorer
from raccgan.scoring.detector import Detector
from raccgan.scoring.reading import Batch, Reader
from raccgan.training.loop import PHASES, Training
from raccgan.training.run import Run, fewer_a_batch, readable

# What the preset mnist-small is changed by where no preset is named: a few minutes on a CPU.
SMALL = {"image_size": 32, "score": "both", "threads": 0}
NORMAL = "normal"  # the class of images that come without one
_NAMED = ("image_size", "gan_steps", "encoder_steps")  # settings that have an argument each
_OURS = frozenset({"dataset", "quantile", "seed"})  # settings that other arguments decide

Floats = NDArray[np.float64]


class RACCGAN(BaseEstimator):  # type: ignore[misc]  # scikit-learn brings no annotations
    """An anomaly detector that is trained on normal images.

    Conventions: constructor arguments are kept as they are, and ``get_params``, ``set_params`` and ``clone`` work as
    scikit-learn has it; what training finds ends with ``_``. Labels and signs are PyOD's: a higher
    :meth:`decision_function` is more anomalous, and :meth:`predict` gives 1 where it is above ``threshold_``, else 0.
    :meth:`score_samples` has scikit-learn's sign: higher is more normal.

    It can be pickled once it is trained. Training uses the random numbers of ``random_state`` alone.

    Args:
        preset: settings to start from, see :data:`raccgan.config.PRESETS`; None for 32 px and a few minutes on a CPU.
        image_size: side of the square that images are resized to, in pixels; None for the preset's.
        gan_steps, encoder_steps: steps of training; None for the preset's.
        contamination: the share of normal images, above 0 and below 1, that may be judged anomalous; the threshold is
            this quantile, from above, of the scores of images held out of training.
        random_state: seed of everything random.
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU where there is one.
        settings: any other fields of :class:`raccgan.config.Config`, such as ``{"fit": "align"}``.

    Attributes:
        detector_: the :class:`raccgan.scoring.detector.Detector`, whose ``score`` has maps, masks and boxes too.
        threshold_: above it an image is anomalous. It may be replaced, which leaves that of ``detector_`` as it is.
        decision_scores_: float64 [N], the scores of the images of ``fit``, those held out among them.
        labels_: int64 [N], what ``predict`` says of them.
    """

    def __init__(
        self,
        preset: str | None = None,
        image_size: int | None = None,
        gan_steps: int | None = None,
        encoder_steps: int | None = None,
        contamination: float = 0.05,
        random_state: int = 0,
        device: str = "auto",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.preset = preset
        self.image_size = image_size
        self.gan_steps = gan_steps
        self.encoder_steps = encoder_steps
        self.contamination = contamination
        self.random_state = random_state
        self.device = device
        self.settings = settings

    def fit(self, X: Batch, y: object = None) -> RACCGAN:
        """Train on normal images.

        Args:
            X: normal images in any form of :data:`raccgan.scoring.reading.Batch`; or a folder of them; or a data set
                that :func:`raccgan.data.sources.registry.load_source` knows by name or by its layout, of which the
                normal images of the training part count, ``settings={"normal": ...}`` naming the normal classes.
            y: ignored, since nothing anomalous is trained on.

        Raises:
            InputError: fewer than two images, one that cannot be read, or a setting out of range.
        """
        device = pick_device(self.device)
        settle(device)
        if not 0 < self.contamination < 1:
            raise InputError(f"contamination={self.contamination}; it is a share, above 0 and below 1")
        run, order = _run_of(self._config(X), X, device)
        run, data = readable(run)
        run = fewer_a_batch(run, len(data))
        with tempfile.TemporaryDirectory(prefix="raccgan-") as folder:
            file = Path(folder) / checkpoints.NAME
            training = Training(run, data, file)
            for phase in PHASES:
                training.run(phase)
            held_out = run.dataset(run.split.held_out)
            scorer = fitted_scorer(run.config, training.networks, run.classes, training.data, held_out)
            training.calibration = calibrate(scorer, held_out, quantile=run.config.quantile)
            training.save(PHASES[-1])
            stored = checkpoints.load(file)
        self.detector_ = Detector(stored, training.calibration.threshold, device)
        self.threshold_ = self.detector_.threshold
        seen = sorted((*run.split.train, *run.split.held_out), key=lambda sample: order[sample.key])
        self.decision_scores_ = self.decision_function([sample.image for sample in seen])
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(np.int64)
        return self

    def decision_function(self, X: Batch) -> Floats:
        """Anomaly scores, float64 [N], of images in any form of :data:`raccgan.scoring.reading.Batch`, or of a folder.

        Raises:
            InputError: an image cannot be read.
            sklearn.exceptions.NotFittedError: before :meth:`fit`.
        """
        check_is_fitted(self, "detector_")
        images = list_images(Path(X)) if isinstance(X, (str, Path)) and Path(X).is_dir() else X
        return np.array([result.score for result in self.detector_.score(images, details=False)], dtype=np.float64)

    def score_samples(self, X: Batch) -> Floats:
        """The negative of :meth:`decision_function`: higher is more normal."""
        return -self.decision_function(X)

    def predict(self, X: Batch) -> NDArray[np.int64]:
        """int64 [N]: 1 for an anomalous image, 0 for a normal one."""
        return (self.decision_function(X) > self.threshold_).astype(np.int64)

    def fit_predict(self, X: Batch, y: object = None) -> NDArray[np.int64]:
        """:meth:`fit`, and ``labels_``."""
        return self.fit(X, y).labels_

    def save(self, path: str | Path) -> None:
        """Write the trained model into a folder, which is made, for :meth:`load` and the commands.

        Raises:
            InputError: the folder cannot be written.
        """
        check_is_fitted(self, "detector_")
        folder = prepare_out(path)
        stored = replace(self.detector_.stored, threshold=float(self.threshold_))
        checkpoints.save(folder / checkpoints.NAME, stored)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> RACCGAN:
        """A trained model from what :meth:`save` wrote, or from the folder of a run of ``raccgan train``.

        Raises:
            InputError: no such checkpoint or device, or its training is not finished.
        """
        detector = Detector.load(path, device=device)
        settings = detector.config.to_dict()
        made = cls(contamination=round(1 - settings["quantile"], 12), random_state=settings["seed"], device=device)
        made.set_params(**{name: settings[name] for name in _NAMED})
        made.settings = {name: value for name, value in settings.items() if name not in (*_NAMED, *_OURS)}
        made.detector_, made.threshold_ = detector, detector.threshold
        return made

    def _config(self, X: Batch) -> Config:
        given = {name: value for name in _NAMED if (value := getattr(self, name)) is not None}
        given |= self.settings or {}
        if taken := sorted(given.keys() & _OURS):
            raise InputError(f"settings cannot hold {', '.join(taken)}: fit, contamination and random_state say that")
        given |= {"quantile": round(1 - self.contamination, 12), "seed": int(self.random_state)}
        given["dataset"] = str(X) if isinstance(X, (str, Path)) else "images given to RACCGAN.fit"
        return make_config(self.preset or "mnist-small", given if self.preset else SMALL | given)


def _run_of(config: Config, X: Batch, device: Any) -> tuple[Run, dict[str, int]]:
    """The normal images to train on and those held out for the threshold, and the place of each by its key."""
    require_kernels(config.kernels, device)
    images: Any = X
    if isinstance(X, (str, Path)) and str(X) not in SOURCES and Path(X).is_dir() and images_in(Path(X)):
        images = list_images(Path(X))  # a folder of normal images, and not of classes alone
    if isinstance(images, (str, Path)):
        source = load_source(str(X), Path(os.environ.get("RACCGAN_DATA") or "data"), category=config.category or None)
        normal = names_of(config.normal, source.classes)
        split = make_split(source, config.protocol or None, normal, held_out=config.held_out, seed=config.seed)
        split = replace(split, test=(), spare=())
        config = replace(config, protocol=config.protocol or source.default_protocol)
    else:
        samples = _samples(images, Reader(config, config.channels or 3))
        train, held_out = hold_out(samples, config.held_out, config.seed)
        split = Split((NORMAL,), tuple(train), tuple(held_out), ())
        source = Source("images", samples, (NORMAL,), count_channels(samples), (NORMAL,), config.protocol)
    config = replace(config, normal=text_of(split.normal_classes))
    order = {sample.key: place for place, sample in enumerate(source.samples)}
    return Run(config, split, source, config.channels or source.channels, device), order


def _samples(images: Batch, reader: Reader) -> tuple[Sample, ...]:
    pixels = [reader.pixels(image) for image in reader.each(images)]
    if len(pixels) < 2:
        raise InputError(f"{len(pixels)} images to train on: at least two are needed, one of them for the threshold")
    keys = [f"{i} {printable(image)}" if isinstance(image, Path) else str(i) for i, image in enumerate(pixels)]
    return tuple(Sample(key, NORMAL, "train", image) for key, image in zip(keys, pixels, strict=True))
