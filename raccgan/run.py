"""What a command works on: the configuration, the data split by its protocol, and the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.protocol import Split, make_split
from raccgan.data.registry import load_source
from raccgan.data.samples import Sample
from raccgan.errors import InputError
from raccgan.networks import Networks
from raccgan.progress import Progress
from raccgan.scoring import MINIMUM, Scorer
from raccgan.terminal import say


@dataclass(frozen=True)
class Run:
    """A configuration made concrete on one data set and one device."""

    config: Config
    split: Split
    channels: int
    device: torch.device

    @property
    def classes(self) -> list[str]:
        """The normal classes; the position is the condition's index."""
        return list(self.split.normal_classes)

    def dataset(self, samples: Sequence[Sample]) -> ImageDataset:
        """``samples`` as tensors of this run's size and channels."""
        return ImageDataset(
            samples, classes=self.classes, size=self.config.image_size, channels=self.channels, fit=self.config.fit
        )

    def scorer(self, networks: Networks, label_policy: str = MINIMUM) -> Scorer:
        """A scorer with this run's settings."""
        return Scorer.of(self.config, networks, self.classes, label_policy)


def prepare(config: Config, data_root: Path, device: torch.device) -> Run:
    """Load the data set and split it, and set the number of threads.

    Raises:
        InputError: whatever is wrong with the data, the protocol or the classes.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    problems: list[str] | None = [] if config.unreadable == "skip" else None
    source = load_source(config.dataset, data_root, category=config.category or None, problems=problems)
    for problem in problems or ():
        say(f"skipped: {problem}")
    normal = [name.strip() for name in config.normal.split(",") if name.strip()]
    split = make_split(source, config.protocol or None, normal, held_out=config.held_out, seed=config.seed)
    resolved = replace(
        config, protocol=config.protocol or source.default_protocol, normal=",".join(split.normal_classes)
    )
    return Run(resolved, split, config.channels or source.channels, device)


def readable(run: Run) -> tuple[Run, ImageDataset]:
    """Read every image of the split once, so that a broken one is named now and not in the middle.

    Returns:
        The run, without the broken ones where its configuration skips them; and the images to train on.

    Raises:
        InputError: the first broken file, where it refuses them; or none is left of a part.
    """
    training: ImageDataset | None = None
    for part in ("train", "held_out", "test"):
        data = run.dataset(getattr(run.split, part))
        with Progress("reading images", len(data), unit="image") as progress:
            if run.config.unreadable == "refuse":
                data.verify(lambda done, total: progress.update())
                bad = {}
            else:
                bad = data.problems(lambda done, total: progress.update())
        for problem in bad.values():
            say(f"skipped: {problem}")
        if bad:
            kept = tuple(sample for index, sample in enumerate(data.samples) if index not in bad)
            if not kept:
                raise InputError(f"none of the {len(bad)} images can be read that are needed here: {bad[0]}")
            less: dict[str, Any] = {part: kept}
            run = replace(run, split=replace(run.split, **less))
            data = run.dataset(kept)
        training = data if training is None else training
    assert training is not None
    return run, training
