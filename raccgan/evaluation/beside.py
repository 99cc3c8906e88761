"""What a run is compared with: every control, on the same split, in the same harness."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.evaluation import controls
from raccgan.evaluation.plain import PLAIN
from raccgan.models.networks import build
from raccgan.outputs.progress import Progress
from raccgan.scoring.calibration import fitted_scorer, score_dataset
from raccgan.scoring.scorer import Scored
from raccgan.training.run import Run

MAPPED = ("autoencoder", "nearest_neighbour")  # have an anomaly map too
CONTROLS = (*MAPPED, *PLAIN, "untrained")
MOST_BYTES = 1 << 30  # of training pixels, as float32, that the controls see


class Control(NamedTuple):
    """A control on N test images."""

    scores: NDArray[np.float64]  # [N], higher is more anomalous
    maps: Tensor | None = None  # [N, S, S], not smoothed


def untrained(run: Run, test: ImageDataset) -> Scored | None:
    """Test scores of the run's own kind behind networks as they were drawn; all ranks call it, and rank 0 has them."""
    networks = build(run.config, channels=run.channels, classes=len(run.classes), device=run.device)
    train, held_out = (run.dataset(part) for part in (run.split.train, run.split.held_out))
    scorer = fitted_scorer(run.config, networks, run.classes, train, held_out)
    return score_dataset(scorer, test, "control: untrained networks")


def trained_on_nothing_else(run: Run, test: ImageDataset) -> dict[str, Control]:
    """The controls that see training images alone, by their names."""
    train = run.dataset(run.split.train)
    most = max(1, MOST_BYTES // (4 * run.channels * run.config.image_size**2))
    known = train.images(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int).tolist())
    asked = test.images(range(len(test)))
    with Progress("control: autoencoder", run.config.control_steps) as progress:
        errors = controls.autoencoder(
            known,
            asked,
            seed=run.config.seed,
            steps=run.config.control_steps,
            device=run.device,
            progress=lambda step, steps: progress.update(),
        )
    maps = {"autoencoder": errors, "nearest_neighbour": controls.nearest_neighbour(known, asked)}
    found = {name: Control(each.double().mean(dim=(1, 2)).numpy(), each) for name, each in maps.items()}
    # One thread, or the last digits would depend on how many there are.
    with Progress("control: no network", len(PLAIN)) as progress, threadpool_limits(1):
        for name, method in PLAIN.items():
            found[name] = Control(method(known, asked))
            progress.update()
    return found
