"""Real images to compare generated images with, from the run's own data or from data that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.listing import list_images, subfolders
from raccgan.data.samples import Sample, printable, spread
from raccgan.data.sources.registry import SOURCES, load_source
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError
from raccgan.generation.distance import MOST


@dataclass(frozen=True)
class RealImages:
    """Real images of one class, [N, C, S, S] in [-1, 1]."""

    train: Tensor
    test: Tensor


def real_images(
    config: Config, channels: int, names: Sequence[str], *, against: str, data_root: Path
) -> dict[str, RealImages]:
    """At most :data:`MOST` training and as many test images of each class.

    Args:
        config: of the run; it says how an image is brought into the model's square.
        channels: of the run.
        names: the classes.
        against: a data set by name, a folder or a list. A folder without class folders is of one class, ``names[0]``.
        data_root: where data sets by name lie.

    Raises:
        InputError: there are no such images, or fewer than two of a part.
    """

    def read(samples: Sequence[Sample]) -> Tensor:
        chosen = spread(samples, MOST)
        data = ImageDataset(
            chosen, classes=(), size=config.image_size, channels=channels, fit=config.fit, brightness=config.brightness
        )
        return data.images(range(len(chosen)))

    samples = _load(config, names, against, data_root)
    parts = {name: _parts(samples, name, against) for name in names}
    return {name: RealImages(read(train), read(test)) for name, (train, test) in parts.items()}


def _load(config: Config, names: Sequence[str], against: str, data_root: Path) -> Sequence[Sample]:
    folder = Path(against)
    if against in SOURCES or not folder.is_dir() or subfolders(folder):
        category = config.category if against == config.dataset else ""
        return load_source(against, data_root, category=category or None).samples
    if len(names) > 1:
        raise InputError(f"{against} has no class folders: name the one class that its images are of with --class")
    return split_by_class([Sample(printable(path), names[0], "train", path) for path in list_images(folder)])


def _parts(samples: Sequence[Sample], name: str, against: str) -> tuple[list[Sample], list[Sample]]:
    """The training and test samples of a class."""
    members = [sample for sample in samples if sample.label == name]
    if not members:
        raise InputError(f"{against} has no class {name!r}{closest(name, dict.fromkeys(s.label for s in samples))}")
    train, test = ([sample for sample in members if sample.split == split] for split in ("train", "test"))
    if min(len(train), len(test)) < 2:
        raise InputError(
            f"{against} has {len(train)} training and {len(test)} test images of {name!r}: a comparison needs two of "
            "either"
        )
    return train, test
