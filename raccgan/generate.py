"""``python -m raccgan.generate``: images of a class from a trained generator, and how near they come to real ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raccgan.cli import options
from raccgan.errors import InputError
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from torch import Tensor

    from raccgan.config import Config
    from raccgan.data.samples import Sample
    from raccgan.models.generator import Generator

EXAMPLES = """\
  python -m raccgan.generate runs/digits --class 3 --count 100 --out threes
      threes/3/0000.png and 99 more, a grid, and metrics.json: how near they come to real threes
  python -m raccgan.generate runs/digits --between 0,3
      the same for 0 and 3, and a picture on which one turns into the other
  python -m raccgan.generate runs/digits --between-latents --truncation 0.7 --seed 1
      every class, more typical images, and a picture from one latent to another
  python -m raccgan.generate runs/scans --class healthy --against ~/more-scans/healthy
      compared with the images of another folder
"""

MOST_IMAGES = 10_000
COLUMNS = 10
"""Images of a class on the grid, and steps of an interpolation."""


@dataclass(frozen=True)
class Real:
    """Real images of one class, [N, C, S, S] in [-1, 1]."""

    train: Tensor
    test: Tensor


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    _check_numbers(given)
    device = options.pick_device(given.device)

    import torch

    from raccgan.models import checkpoint as checkpoints
    from raccgan.models.devices import require_kernels
    from raccgan.outputs.files import own_folder

    stored = checkpoints.load(given.run)
    config = checkpoints.config_of(stored, **options.settings_of(given))
    require_kernels(config.kernels, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    pair = _pair(given.between, stored.classes)
    names = _named(given.names, stored.classes) if given.names else pair or stored.classes
    real = _real_or_why_not(given, config, stored.channels, names)
    generator = checkpoints.networks_of(stored, config, device).average
    making = _Making(generator, config, stored.classes, given.truncation)
    with own_folder(given.out) as out:
        _check_empty(out)
        making.write_images(out, names, given.count)
        if pair:
            making.write_between_classes(out / "between-classes.png", pair)
        if given.between_latents:
            making.write_between_latents(out / "between-latents.png", names)
        if real:
            _compare(out, making, real, given)
        tell(f"{given.count} images of each of {', '.join(names)} are in {out}, the first ones in {out / 'grid.png'}")
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "Make images of the normal classes with the averaged generator of a trained run, and say how far they are "
        "from real images: the kernel distance on fixed random features, 0 for real images in the mean.",
        EXAMPLES,
        prog="python -m raccgan.generate",
        usage="python -m raccgan.generate RUN [option ...]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument(
        "--class", dest="names", default="", metavar="NAME", help="normal classes, comma-separated (default: all)"
    )
    parser.add_argument(
        "--count", type=int, default=16, metavar="N", help=f"images a class, 1 to {MOST_IMAGES} (default: 16)"
    )
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="draw every coordinate of a latent outside [-T, T] again: more typical images, less different from each "
        "other; 0.1 or more (default: none)",
    )
    parser.add_argument(
        "--between", default="", metavar="A,B", help="also a picture from class A to class B, the latent fixed in a row"
    )
    parser.add_argument(
        "--between-latents", action="store_true", help="also a picture from one latent to another, one row a class"
    )
    parser.add_argument(
        "--against",
        default="",
        metavar="DATA",
        help="real images to compare with: a data set by name, a folder or a .csv list (default: what the run was "
        "trained on; where that is not there, nothing is compared)",
    )
    options.add_places(parser, out="generated")
    options.add_settings(parser, ("kernels", "threads", "seed"))
    return parser


def _check_numbers(given: argparse.Namespace) -> None:
    if not 1 <= given.count <= MOST_IMAGES:
        raise InputError(f"--count {given.count} is out of range: give a number of images from 1 to {MOST_IMAGES}")
    if given.truncation is not None and not given.truncation >= 0.1:
        raise InputError(f"--truncation {given.truncation:g} is out of range: it must be at least 0.1, such as 0.7")


def _named(names: str, classes: Sequence[str]) -> list[str]:
    """The normal classes of a comma-separated list."""
    from raccgan.data.splits import closest

    wanted = [names] if names in classes else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in classes:
            raise InputError(f"the run has no normal class {name!r}{closest(name, classes)}")
    return list(dict.fromkeys(wanted))


def _pair(between: str, classes: Sequence[str]) -> list[str]:
    pair = _named(between, classes) if between else []
    if between and len(pair) != 2:
        raise InputError(f"--between {between!r} must name two different normal classes, such as --between A,B")
    return pair


def _check_empty(out: Path) -> None:
    """One that holds anything is refused, so that no two sets are ever mixed."""
    from raccgan.outputs.files import LOCK

    if any(path.name != LOCK for path in out.iterdir()):
        raise InputError(f"{out} is not empty: name another --out, so that these images are not mixed with others")


def _real_or_why_not(given: argparse.Namespace, config: Config, channels: int, names: Sequence[str]) -> dict[str, Real]:
    """Real images by class. Where the run's own data are not there, none, and a line that says why."""
    from raccgan.data.dataset import ImageDataset
    from raccgan.data.samples import spread
    from raccgan.generation.sampling import MOST

    def read(samples: Sequence[Sample]) -> Tensor:
        chosen = spread(samples, MOST)
        data = ImageDataset(
            chosen, classes=(), size=config.image_size, channels=channels, fit=config.fit, brightness=config.brightness
        )
        return data.images(range(len(chosen)))

    try:
        parts = _samples(given, config, names)
        return {name: Real(read(train), read(test)) for name, (train, test) in parts.items()}
    except InputError as error:
        if given.against:
            raise
        say(f"no comparison with real images: {error}; or name some with --against")
        return {}


def _samples(
    given: argparse.Namespace, config: Config, names: Sequence[str]
) -> dict[str, tuple[list[Sample], list[Sample]]]:
    """The training and test samples of each class."""
    from raccgan.data.splits import closest

    against = given.against or config.dataset
    found = _load(against, given.data_root, config, names)
    parts = {}
    for name in names:
        members = [sample for sample in found if sample.label == name]
        if not members:
            raise InputError(f"{against} has no class {name!r}{closest(name, dict.fromkeys(s.label for s in found))}")
        train, test = ([sample for sample in members if sample.split == split] for split in ("train", "test"))
        if min(len(train), len(test)) < 2:
            raise InputError(
                f"{against} has {len(train)} training and {len(test)} test images of {name!r}: a comparison needs two "
                "of either"
            )
        parts[name] = train, test
    return parts


def _load(against: str, data_root: Path, config: Config, names: Sequence[str]) -> Sequence[Sample]:
    from raccgan.data.listing import list_images, subfolders
    from raccgan.data.samples import Sample, printable
    from raccgan.data.sources.registry import SOURCES, load_source
    from raccgan.data.splits import split_by_class

    folder = Path(against)
    if against in SOURCES or not folder.is_dir() or subfolders(folder):
        category = config.category if against == config.dataset else ""
        return load_source(against, data_root, category=category or None).samples
    if len(names) > 1:
        raise InputError(f"{against} has no class folders: name the one class that its images are of with --class")
    return split_by_class([Sample(printable(path), names[0], "train", path) for path in list_images(folder).images])


@dataclass(frozen=True)
class _Making:
    """A generator and what decides its latents."""

    generator: Generator
    config: Config
    classes: Sequence[str]
    truncation: float | None

    def latents(self, indices: range) -> Tensor:
        from raccgan.generation.sampling import latents

        return latents(indices, self.config.latent_size, seed=self.config.seed, truncation=self.truncation)

    def images(self, name: str, indices: range) -> Tensor:
        from raccgan.generation import sampling

        return sampling.images(self.generator, self.latents(indices), self.classes.index(name))

    def write_images(self, out: Path, names: Sequence[str], count: int, batch: int = 64) -> None:
        """A folder of PNG files a class, and the first ones of each on a grid."""
        from raccgan.outputs import pictures
        from raccgan.outputs.files import prepare_out
        from raccgan.outputs.progress import Progress

        rows: dict[str, Any] = {}
        with Progress("images", count * len(names), unit="image") as progress:
            for name, folder in zip(names, _folder_names(names), strict=True):
                prepare_out(out / folder)
                for start in range(0, count, batch):
                    made = self.images(name, range(start, min(count, start + batch))).numpy()
                    rows.setdefault(name, made[:COLUMNS])
                    for i, pixels in enumerate(made, start):
                        pictures.image(out / folder / f"{i:04}.png", pixels)
                    progress.update(len(made))
        shown = dict(list(rows.items())[:20])
        pictures.sample_grid(out / "grid.png", shown, title="generated, one row a normal class")

    def write_between_classes(self, path: Path, pair: Sequence[str], rows: int = 5) -> None:
        from raccgan.generation.sampling import between_classes
        from raccgan.outputs import pictures

        first, last = (self.classes.index(name) for name in pair)
        made = {
            f"latent {i}": between_classes(self.generator, z, first, last, COLUMNS).numpy()
            for i, z in enumerate(self.latents(range(rows)))
        }
        pictures.sample_grid(path, made, title=f"from {pair[0]} to {pair[1]}, one latent a row")

    def write_between_latents(self, path: Path, names: Sequence[str]) -> None:
        from raccgan.generation.sampling import between_latents, images
        from raccgan.outputs import pictures

        first, last = self.latents(range(2))
        points = between_latents(first, last, COLUMNS)
        made = {name: images(self.generator, points, self.classes.index(name)).numpy() for name in names[:20]}
        pictures.sample_grid(path, made, title="from latent 0 to latent 1, one class a row")


def _folder_names(names: Sequence[str]) -> Iterator[str]:
    """A folder's name for each class: the class's own, but for what leads elsewhere or is refused by some systems."""
    taken: set[str] = set()
    for name in names:
        plain = "".join(c if c.isalnum() or c in " ._-+" else "_" for c in name).strip(" .")[:100] or "_"
        folder = next(f for f in (plain, *(f"{plain}-{i}" for i in range(2, 10_000))) if f.casefold() not in taken)
        taken.add(folder.casefold())
        yield folder


def _compare(out: Path, making: _Making, real: dict[str, Real], given: argparse.Namespace) -> None:
    """``metrics.json``, and a line a class."""
    from raccgan.generation.sampling import compare
    from raccgan.outputs.files import write_json

    found: dict[str, Any] = {}
    for name, images in real.items():
        generated = making.images(name, range(len(images.train)))  # as many as the baseline has, written or not
        distances = compare(generated, images.train, images.test)
        found[name] = {
            **{which: round(value, 6) for which, value in dataclasses.asdict(distances).items()},
            "images": {"generated": len(generated), "real_train": len(images.train), "real_test": len(images.test)},
        }
        tell(
            f"{name}: kernel distance to real test images {distances.generated:.3g}; real training images "
            f"{distances.real:.3g} (chance: below {distances.chance:.3g}), noise {distances.noise:.3g}"
        )
    write_json(
        out / "metrics.json",
        {
            "kernel_distance": found,
            "against": given.against or making.config.dataset,
            "seed": making.config.seed,
            "truncation": given.truncation,
        },
    )


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
