"""A folder of generated images: the images, grids of them, and their distances to real images of the same classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset
from raccgan.data.listing import list_images, subfolders
from raccgan.data.samples import Sample, printable, spread
from raccgan.data.sources.registry import SOURCES, load_source
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError
from raccgan.generation import sampling
from raccgan.generation.distance import MOST, compare
from raccgan.models.generator import Generator
from raccgan.outputs.files import LOCK, prepare_out, write_json
from raccgan.outputs.pictures import sample_grid, write_image
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import tell

COLUMNS = 10  # images of a class on a grid, and steps of an interpolation
ROWS = 20  # the most classes on a grid


def require_empty(out: Path) -> None:
    """Raise InputError if the folder holds anything but our lock."""
    if any(path.name != LOCK for path in out.iterdir()):
        raise InputError(f"{out} is not empty: name another --out, so that these images are not mixed with others")


# Real images of one class, of the training and of the test part: [N, C, S, S] in [-1, 1].
RealImages: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageMaker:
    """A generator, and all that decides its images."""

    generator: Generator
    config: Config  # its seed decides the latents
    classes: Sequence[str]
    truncation: float | None

    def latents(self, indices: range) -> Tensor:
        return sampling.latents(indices, self.config.latent_size, seed=self.config.seed, truncation=self.truncation)

    def images(self, name: str, z: Tensor) -> Tensor:
        """The images of a class from latents z [N, latent]: [N, C, S, S] in [-1, 1]."""
        return sampling.images(self.generator, z, self.classes.index(name))

    def write_images(self, out: Path, names: Sequence[str], count: int, batch: int = 64) -> None:
        """``count`` PNG files of each class in a folder of its own, and ``grid.png`` with the first ones of each."""
        rows: dict[str, Any] = {}
        with Progress("images", count * len(names), unit="image") as progress:
            for name, folder in zip(names, folder_names(names), strict=True):
                prepare_out(out / folder)
                for start in range(0, count, batch):
                    made = self.images(name, self.latents(range(start, min(count, start + batch)))).numpy()
                    rows.setdefault(name, made[:COLUMNS])
                    for i, pixels in enumerate(made, start):
                        write_image(out / folder / f"{i:04}.png", pixels)
                    progress.update(len(made))
        sample_grid(out / "grid.png", dict(list(rows.items())[:ROWS]), title="generated, one row a normal class")

    def write_between_classes(self, path: Path, pair: Sequence[str], rows: int = 5) -> None:
        """A picture on which one class turns into the other, for several latents."""
        first, last = (self.classes.index(name) for name in pair)
        made = {
            f"latent {i}": sampling.between_classes(self.generator, z, first, last, COLUMNS).numpy()
            for i, z in enumerate(self.latents(range(rows)))
        }
        sample_grid(path, made, title=f"from {pair[0]} to {pair[1]}, one latent a row")

    def write_between_latents(self, path: Path, names: Sequence[str]) -> None:
        """A picture on which one latent turns into another, for several classes."""
        first, last = self.latents(range(2))
        points = sampling.between_latents(first, last, COLUMNS)
        made = {name: self.images(name, points).numpy() for name in names[:ROWS]}
        sample_grid(path, made, title="from latent 0 to latent 1, one class a row")

    def write_comparison(self, path: Path, real: Mapping[str, RealImages], against: str) -> None:
        """``metrics.json``, and a line a class on standard output; the file says ``against`` what it was compared."""
        found: dict[str, Any] = {}
        for name, (train, test) in real.items():
            # As many as the baseline has, written or not.
            generated = self.images(name, self.latents(range(len(train))))
            distances = compare(generated, train, test)
            found[name] = {
                **{which: round(value, 6) for which, value in distances._asdict().items()},
                "images": {"generated": len(generated), "real_train": len(train), "real_test": len(test)},
            }
            tell(
                f"{name}: kernel distance to real test images {distances.generated:.3g}; real training images "
                f"{distances.real:.3g} (chance: below {distances.chance:.3g}), noise {distances.noise:.3g}"
            )
        made_with = {"against": against, "seed": self.config.seed, "truncation": self.truncation}
        write_json(path, {"kernel_distance": found} | made_with)


def folder_names(names: Sequence[str]) -> Iterator[str]:
    """A name for each class's folder: the class's own, without characters that lead elsewhere or are refused."""
    taken: set[str] = set()
    for name in names:
        plain = "".join(c if c.isalnum() or c in " ._-+" else "_" for c in name).strip(" .")[:100] or "_"
        folder = next(f for f in (plain, *(f"{plain}-{i}" for i in range(2, 10_000))) if f.casefold() not in taken)
        taken.add(folder.casefold())
        yield folder


def real_images(
    config: Config, channels: int, names: Sequence[str], *, against: str, data_root: Path
) -> dict[str, RealImages]:
    """At most :data:`MOST` training and as many test images of each class, as the run's model takes them.

    ``against`` is a data set by name, a list, or a folder; one without class folders is of one class, ``names[0]``. An
    InputError if there are no such images, or fewer than two of a part.
    """
    samples = _load(config, names, against, data_root)
    found = {}
    for name in names:
        members = [sample for sample in samples if sample.label == name]
        if not members:
            raise InputError(f"{against} has no class {name!r}{closest(name, dict.fromkeys(s.label for s in samples))}")
        train, test = ([sample for sample in members if sample.split == split] for split in ("train", "test"))
        if min(len(train), len(test)) < 2:
            raise InputError(
                f"{against} has {len(train)} training and {len(test)} test images of {name!r}: a comparison needs two "
                "of either"
            )
        found[name] = spread(train, MOST), spread(test, MOST)
    return {
        name: (_read(train, config, channels), _read(test, config, channels)) for name, (train, test) in found.items()
    }


def _load(config: Config, names: Sequence[str], against: str, data_root: Path) -> Sequence[Sample]:
    folder = Path(against)
    if against in SOURCES or not folder.is_dir() or subfolders(folder):
        category = config.category if against == config.dataset else ""
        return load_source(against, data_root, category=category or None).samples
    if len(names) > 1:
        raise InputError(f"{against} has no class folders: name the one class that its images are of with --class")
    return split_by_class([Sample(printable(path), names[0], "train", path) for path in list_images(folder)])


def _read(samples: Sequence[Sample], config: Config, channels: int) -> Tensor:
    data = ImageDataset(
        samples, classes=(), size=config.image_size, channels=channels, fit=config.fit, brightness=config.brightness
    )
    return data.images(range(len(samples)))
