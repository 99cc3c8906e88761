"""``python -m raccgan.generate``: makes images of a class, and measures their distance from real ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from raccgan.cli import options
from raccgan.data.splits import closest
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder
from raccgan.outputs.terminal import say, tell

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


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    if not 1 <= given.count <= MOST_IMAGES:
        raise InputError(f"--count {given.count} is out of range: give a number of images from 1 to {MOST_IMAGES}")
    if given.truncation is not None and not given.truncation >= 0.1:
        raise InputError(f"--truncation {given.truncation:g} is out of range: it must be at least 0.1, such as 0.7")
    device = options.pick_device(given.device)

    import torch

    from raccgan.generation.folder import ImageMaker, real_images, require_empty
    from raccgan.models import checkpoint as checkpoints
    from raccgan.models.devices import require_kernels

    stored = checkpoints.load(given.run)
    config = checkpoints.config_of(stored, **options.settings_of(given))
    require_kernels(config.kernels, device)
    options.note_missing_library(config.kernels)
    if config.threads:
        torch.set_num_threads(config.threads)
    pair = _named(given.between, stored.classes) if given.between else []
    if given.between and len(pair) != 2:
        raise InputError(f"--between {given.between!r} must name two different normal classes, such as --between A,B")
    names = _named(given.names, stored.classes) if given.names else pair or stored.classes
    against = given.against or config.dataset
    try:
        real = real_images(config, stored.channels, names, against=against, data_root=given.data_root)
    except InputError as error:
        if given.against:
            raise
        real = {}
        say(f"no comparison with real images: {error}; or name some with --against")
    generator = checkpoints.networks_of(stored, config, device).average
    maker = ImageMaker(generator, config, stored.classes, given.truncation)
    with own_folder(given.out) as out:
        require_empty(out)
        maker.write_images(out, names, given.count)
        if pair:
            maker.write_between_classes(out / "between-classes.png", pair)
        if given.between_latents:
            maker.write_between_latents(out / "between-latents.png", names)
        if real:
            maker.write_comparison(out / "metrics.json", real, against)
        tell(f"{given.count} images of each of {', '.join(names)} are in {out}, the first ones in {out / 'grid.png'}")
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "generate",
        "Make images of the normal classes with the averaged generator of a trained run, and say how far they are "
        "from real images: the kernel distance on fixed random features, 0 for real images in the mean.",
        EXAMPLES,
        "RUN",
    )
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


def _named(names: str, classes: Sequence[str]) -> list[str]:
    """The normal classes of a comma-separated list."""
    wanted = [names] if names in classes else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in classes:
            raise InputError(f"the run has no normal class {name!r}{closest(name, classes)}")
    return list(dict.fromkeys(wanted))


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
