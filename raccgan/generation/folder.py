"""A folder of generated images: the images, grids of them, and their distances to real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.generation import sampling
from raccgan.generation.distance import compare
from raccgan.generation.real import RealImages
from raccgan.models.generator import Generator
from raccgan.outputs.files import LOCK, prepare_out, write_json
from raccgan.outputs.pictures import sample_grid, write_image
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import tell

COLUMNS = 10
"""Images of a class on a grid, and steps of an interpolation."""

ROWS = 20
"""The most classes on a grid."""


def require_empty(out: Path) -> None:
    """Refuse a folder that holds anything, so that two sets of images are never mixed.

    Raises:
        InputError: it holds something.
    """
    if any(path.name != LOCK for path in out.iterdir()):
        raise InputError(f"{out} is not empty: name another --out, so that these images are not mixed with others")


@dataclass(frozen=True)
class ImageMaker:
    """A generator, and all that decides its images."""

    generator: Generator
    config: Config  # its seed decides the latents
    classes: Sequence[str]
    truncation: float | None

    def latents(self, indices: range) -> Tensor:
        """Latents [N, latent] of these images."""
        return sampling.latents(indices, self.config.latent_size, seed=self.config.seed, truncation=self.truncation)

    def images(self, name: str, indices: range) -> Tensor:
        """These images of a class: [N, C, S, S] in [-1, 1]."""
        return sampling.images(self.generator, self.latents(indices), self.classes.index(name))

    def write_images(self, out: Path, names: Sequence[str], count: int, batch: int = 64) -> None:
        """``count`` PNG files of each class in a folder of its own, and ``grid.png`` with the first ones of each."""
        rows: dict[str, Any] = {}
        with Progress("images", count * len(names), unit="image") as progress:
            for name, folder in zip(names, folder_names(names), strict=True):
                prepare_out(out / folder)
                for start in range(0, count, batch):
                    made = self.images(name, range(start, min(count, start + batch))).numpy()
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
        made = {
            name: sampling.images(self.generator, points, self.classes.index(name)).numpy() for name in names[:ROWS]
        }
        sample_grid(path, made, title="from latent 0 to latent 1, one class a row")

    def write_comparison(self, path: Path, real: Mapping[str, RealImages], against: str) -> None:
        """``metrics.json``, and a line a class on standard output.

        Args:
            path: the file.
            real: images to compare with, by class.
            against: where they come from, for the record.
        """
        found: dict[str, Any] = {}
        for name, images in real.items():
            generated = self.images(name, range(len(images.train)))  # as many as the baseline has, written or not
            distances = compare(generated, images.train, images.test)
            found[name] = {
                **{which: round(value, 6) for which, value in dataclasses.asdict(distances).items()},
                "images": {"generated": len(generated), "real_train": len(images.train), "real_test": len(images.test)},
            }
            tell(
                f"{name}: kernel distance to real test images {distances.generated:.3g}; real training images "
                f"{distances.real:.3g} (chance: below {distances.chance:.3g}), noise {distances.noise:.3g}"
            )
        made_with = {"against": against, "seed": self.config.seed, "truncation": self.truncation}
        write_json(path, {"kernel_distance": found, **made_with})


def folder_names(names: Sequence[str]) -> Iterator[str]:
    """A name for each class's folder: the class's own, without characters that lead elsewhere or are refused."""
    taken: set[str] = set()
    for name in names:
        plain = "".join(c if c.isalnum() or c in " ._-+" else "_" for c in name).strip(" .")[:100] or "_"
        folder = next(f for f in (plain, *(f"{plain}-{i}" for i in range(2, 10_000))) if f.casefold() not in taken)
        taken.add(folder.casefold())
        yield folder
