"""What a command works on: the configuration, the data split by its protocol, and the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raccgan import ranks
from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.protocol import Split, make_split
from raccgan.data.registry import load_source
from raccgan.data.samples import Sample
from raccgan.networks import Networks
from raccgan.progress import Progress
from raccgan.scoring import MINIMUM, Scorer

CACHE_BYTES = 2 << 30
"""The most memory that decoded images may take on a machine."""


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
            samples,
            classes=self.classes,
            size=self.config.image_size,
            channels=self.channels,
            fit=self.config.fit,
            cache_bytes=CACHE_BYTES // ranks.local_world(),
        )

    def scorer(self, networks: Networks, label_policy: str = MINIMUM) -> Scorer:
        """A scorer with this run's settings."""
        return Scorer.of(self.config, networks, self.classes, label_policy)


def prepare(config: Config, data_root: Path, device: torch.device) -> Run:
    """Load the data set and split it, and set the number of threads.

    Raises:
        InputError: whatever is wrong with the data, the protocol or the classes; another rank found other images.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    source = load_source(config.dataset, data_root, category=config.category or None)
    normal = [name.strip() for name in config.normal.split(",") if name.strip()]
    split = make_split(source, config.protocol or None, normal, held_out=config.held_out, seed=config.seed)
    ranks.require_alike(f"the images of {config.dataset}", lambda: _digest(split))
    resolved = replace(
        config, protocol=config.protocol or source.default_protocol, normal=",".join(split.normal_classes)
    )
    return Run(resolved, split, config.channels or source.channels, device)


def verify(data: ImageDataset, title: str) -> None:
    """Read every image once, so that a broken one is named now and not in the middle of the run; each rank its share.

    Raises:
        InputError: the first broken file.
    """
    share = range(ranks.rank(), len(data), ranks.world())
    with Progress(title, len(share), unit="image") as progress:
        data.verify(lambda done, total: progress.update(), share)


def _digest(split: Split) -> str:
    """Which images are for what, in their order."""
    parts = (split.train, split.held_out, split.test)
    names = [[(sample.key, sample.label) for sample in part] for part in parts]
    return hashlib.blake2b(repr(names).encode(errors="surrogatepass"), digest_size=16).hexdigest()
