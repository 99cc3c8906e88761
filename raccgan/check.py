"""``python -m raccgan.check``: says what training would understand of a data set, reads every image, and stops."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from raccgan.cli import options
from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.outputs.terminal import say, tell

EXAMPLES = """\
  python -m raccgan.check scans --normal healthy
      which images train, which are tested, which masks were found, what is left out
  python -m raccgan.check list.csv
      the same of a list
  python -m raccgan.check mvtec --category screw --data-root ~/data
      of one category of MVTec AD

exit status:
  0  the data can be trained on
  1  some images, their masks, or lines of a list cannot be used; they are named
  2  nothing can be trained on: a line says why
"""


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)

    from raccgan.data.inventory import lines_of
    from raccgan.data.sources.registry import load_source
    from raccgan.data.splits import make_split, names_of
    from raccgan.models.devices import pick_device
    from raccgan.training.run import Run, readable

    config = Config(**{"dataset": given.dataset, "unreadable": "skip"} | options.settings_of(given, but=("dataset",)))
    problems: list[str] = []
    source = load_source(config.dataset, given.data_root, category=config.category or None, problems=problems)
    for problem in problems:
        say(f"skipped: {problem}")
    try:
        normal = names_of(config.normal, source.classes)
        split = make_split(source, config.protocol or None, normal, held_out=config.held_out, seed=config.seed)
    except InputError:
        for line in lines_of(source, None, config.brightness):
            tell(line)
        raise
    for line in lines_of(source, split, config.brightness):
        tell(line)
    run = Run(replace(config, image_size=8), split, source, source.channels, pick_device("cpu"))
    read, _ = readable(run)
    lost = sum(len(getattr(split, part)) - len(getattr(read.split, part)) for part in ("train", "held_out", "test"))
    spare = run.dataset(split.spare).problems()  # which training leaves alone, and `experiment` scores
    for problem in spare.values():
        say(f"skipped: {problem}")
    lost += len(problems) + len(spare)
    tell(f"{lost} cannot be used: see the lines on what was skipped" if lost else "every image can be read")
    return 1 if lost else 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "check", "Say what training would understand of a data set, and read every image.", EXAMPLES, "DATASET"
    )
    parser.add_argument("dataset", metavar="DATASET", help="a folder, a .csv list, or a name, as --dataset of train")
    options.add_places(parser, device=False, out=None)
    options.add_settings(parser, ("category", "protocol", "normal", "held_out", "fit", "brightness"))
    return parser


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
