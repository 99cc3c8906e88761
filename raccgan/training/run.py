"""A run: the configuration, the split data, and the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.inventory import lines_of
from raccgan.data.samples import Sample, Source
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import Split, make_split, names_of, text_of
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.errors import InputError
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say

CACHE_BYTES = 2 << 30  # the most memory that decoded images may take on a machine


@dataclass(frozen=True)
class Run:
    """A configuration made concrete on one data set and one device."""

    config: Config
    split: Split
    source: Source  # what the split is of
    channels: int
    device: torch.device
    job: Collectives = SINGLE

    @property
    def classes(self) -> list[str]:
        """The normal classes; the position is the condition's index."""
        return list(self.split.normal_classes)

    def dataset(self, samples: Sequence[Sample]) -> ImageDataset:
        """``samples`` as tensors of this run's size and channels."""
        return ImageDataset(
            samples,
            classes=self.classes,
            size=self.config.image_size,
            channels=self.channels,
            fit=self.config.fit,
            brightness=self.config.brightness,
            cache_bytes=CACHE_BYTES // self.job.local_world,
        )


def prepare(config: Config, data_root: Path, device: torch.device, job: Collectives = SINGLE) -> Run:
    """Load and split the data, set the threads; an InputError for bad data, protocol or classes, or if ranks differ."""
    settle_threads(config)
    problems: list[str] | None = [] if config.unreadable == "skip" else None
    source = load_source(config.dataset, data_root, category=config.category or None, problems=problems)
    _say_skipped(job, problems or ())
    normal = names_of(config.normal, source.classes)
    split = make_split(source, config.protocol or None, normal, held_out=config.held_out, seed=config.seed)
    job.require_alike(f"the images of {config.dataset}", lambda: _digest(split))
    protocol = config.protocol or source.default_protocol
    resolved = replace(config, protocol=protocol, normal=text_of(split.normal_classes))
    return Run(resolved, split, source, config.channels or source.channels, device, job)


def settle_threads(config: Config) -> None:
    """Set the threads of PyTorch on a CPU where the configuration has a number."""
    if config.threads:
        torch.set_num_threads(config.threads)


def readable(run: Run) -> tuple[Run, ImageDataset]:
    """The run without broken images, or an InputError that names the first; and the images to train on.

    Every image is read once, before training starts. ``config.unreadable`` says whether broken ones are refused.
    """
    read: list[ImageDataset] = []
    for part in ("train", "held_out", "test"):
        data = run.dataset(getattr(run.split, part))
        share = range(run.job.rank, len(data), run.job.world)  # each rank reads its own
        with Progress("reading images", len(share), unit="image", shown=run.job.first) as progress:
            found = data.problems(lambda done, total: progress.update(), share)
            bad = dict(sorted(item for one in run.job.exchanged(found) for item in one.items()))
        if bad and run.config.unreadable == "refuse":
            raise data.refusal(bad)
        _say_skipped(run.job, bad.values())
        if bad:
            kept = tuple(sample for index, sample in enumerate(data.samples) if index not in bad)
            if not kept:
                raise InputError(f"none of the {len(bad)} images can be read that are needed here: {bad[0]}")
            less: dict[str, Any] = {part: kept}
            run = replace(run, split=replace(run.split, **less))
            data = run.dataset(kept)
        read.append(data)
    return run, read[0]


def say_understood(run: Run) -> None:
    """Say what was understood of the data; on rank 0 alone."""
    if run.job.first:
        for line in lines_of(run.source, run.split, run.config.brightness):
            say(line)


def fewer_a_batch(run: Run, images: int) -> Run:
    """The run with a batch of no more than the images there are to train on, as ranks share it; a line if it is less.

    Raises:
        InputError: there are fewer images than ranks.
    """
    wanted, ranks = run.config.batch_size, run.job.world
    batch = min(wanted, images // ranks * ranks)
    if batch == wanted:
        return run
    if batch == 0:
        raise InputError(
            f"{images} images to train on cannot be dealt out to {ranks} ranks: start fewer, or add images"
        )
    if run.job.first:
        parts = f"beside {len(run.split.held_out)} held out for the threshold and {len(run.split.test)} to test"
        say(f"note: there are {images} images to train on, {parts}, so a batch has {batch} instead of {wanted}")
    return replace(run, config=replace(run.config, batch_size=batch))


def _say_skipped(job: Collectives, problems: Iterable[str]) -> None:
    if job.first:
        for problem in problems:
            say(f"skipped: {problem}")


def _digest(split: Split) -> str:
    names = [[(sample.key, sample.label) for sample in part] for part in (split.train, split.held_out, split.test)]
    return hashlib.blake2b(repr(names).encode(errors="surrogatepass"), digest_size=16).hexdigest()
