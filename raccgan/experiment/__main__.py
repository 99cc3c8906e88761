"""``python -m raccgan.experiment``: runs a table of experiments row by row; several machines may share the table."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raccgan.cli import options
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.experiment.tables import BENCHMARKS, DEFAULT, SEEDS, VARIANTS, Trial, trials
from raccgan.outputs.files import own_folder, prepare_out
from raccgan.outputs.terminal import say

if TYPE_CHECKING:
    import torch

    from raccgan.experiment.results import Figures, Results

EXAMPLES = f"""\
  python -m raccgan.experiment digits
      ten digits, each normal once, three seeds: thirty runs of a few minutes; Ctrl-C, and the same command goes on
  python -m raccgan.experiment mnist --normal 3,5 --seeds 0 --limit 1
      one run, and no more
  python -m raccgan.experiment mnist --variants default,no-attention,dense-convolution
      ablations: one change at a time
  python -m raccgan.experiment mnist --list
      which rows there are, and which are done
  python -m raccgan.experiment mnist --summary
      means and deviations beside the controls and what others published; and the picture
  torchrun --standalone --nproc-per-node gpu -m raccgan.experiment mnist
      the same rows, each on one GPU of this machine

tables:    {", ".join(BENCHMARKS)}
variants:  {", ".join(VARIANTS)}

Results are lines of OUT/results.csv; another machine continues with a copy of that file. A row is run again only where
a setting that it depends on has changed. The run's folder is removed when its line is there, unless --keep is given.
"""


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    settings = options.settings_of(given, but=("normal", "seed"))
    variants = _names(given.variants) or (list(VARIANTS) if given.summary else [DEFAULT])
    seeds = _names(given.seeds)
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise InputError(f"--seeds {given.seeds!r} are not numbers such as 0,1,2")
    normal = _names(given.normal)
    wanted = trials(given.table, variants=variants, normal=normal, seeds=[*map(int, seeds)], settings=settings)
    device = options.pick_device(given.device)

    from raccgan.experiment.results import Results
    from raccgan.models.devices import require_kernels

    out = given.out or Path("runs") / "experiments" / given.table
    results = Results(out / "results.csv")
    done = results.of(wanted)
    if given.list:
        for row in wanted:
            state = f"AUROC {done[row]['auroc']}" if row in done else "to run"
            print(f"{row.variant:24} normal {row.normal:12} seed {row.seed:<3} {state}")
        print(f"{len(done)} of {len(wanted)} rows are done")
        return 0
    if given.summary:
        _summarise(given.table, variants, done, results)
        return 0
    prepare_out(out)
    require_kernels(wanted[0].config.kernels, device)
    options.note_missing_library(wanted[0].config.kernels)
    place = ranks.place_in()  # ranks deal out the rows, and need nothing else of one another
    wanted = wanted[place.rank :: place.world]
    left = [row for row in wanted if row not in done]
    now = left[: given.limit]
    say(
        f"{given.table}: {len(wanted) - len(left)} of {len(wanted)} rows are done, {len(now)} to run now; "
        f"results in {results.path}"
    )
    for number, row in enumerate(now, 1):
        say(f"row {number} of {len(now)}: {row.variant}, normal {row.normal}, seed {row.seed}")
        try:
            _run(row, out, device, given, results)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in row {number} of {len(now)}; the same command goes on there") from None
    return 0


def _run(row: Trial, out: Path, device: torch.device, given: argparse.Namespace, results: Results) -> None:
    """Run one row, and write its line before its folder goes."""
    from raccgan.experiment.execute import execute

    with own_folder(out / row.folder) as folder:
        result = execute(row, folder, device, given.data_root)
        results.add(result)
    if not given.keep:
        shutil.rmtree(folder)
    beside = f"autoencoder {result['autoencoder']}, nearest neighbour {result['nearest_neighbour']}"
    print(f"{row.variant}, normal {row.normal}, seed {row.seed}: AUROC {result['auroc']} ({beside})", flush=True)


def _summarise(name: str, variants: Sequence[str], done: Mapping[Trial, Figures], results: Results) -> None:
    from raccgan.experiment.results import draw, summary

    found = {variant: {row: line for row, line in done.items() if row.variant == variant} for variant in variants}
    by_variant = {variant: lines for variant, lines in found.items() if lines or variant == DEFAULT}
    print(summary(name, BENCHMARKS[name], by_variant))
    if done:
        picture = results.path.with_name("summary.png")
        draw(picture, name, BENCHMARKS[name], by_variant)
        say(f"the picture is {picture}")
    stale = len(results.read()) - len(done)
    if stale:
        say(f"{stale} lines of {results.path} are of other settings, classes, seeds or variants, and not shown")


def _parser() -> options.Parser:
    parser = options.Parser(
        "experiment",
        "Train and test one model a row: every normal class, every seed, every variant of a table.",
        EXAMPLES,
        "TABLE",
    )
    parser.add_argument("table", metavar="TABLE", help=", ".join(BENCHMARKS))
    which = parser.add_argument_group("which rows")
    which.add_argument("--variants", default="", metavar="NAMES", help="comma-separated (default: default)")
    which.add_argument("--normal", default="", metavar="NAMES", help="only these normal classes (default: all)")
    which.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="comma-separated (default: 0,1,2)"
    )
    which.add_argument("--limit", type=int, metavar="N", help="run N rows and stop")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument("--summary", action="store_true", help="show what is known and stop")
    parser.add_argument("--keep", action="store_true", help="keep the folder of each run")
    options.add_places(parser, out="")
    options.add_settings(parser, _SETTINGS)
    return parser


_SETTINGS = (  # that may replace the table's own; such rows are others than the table's
    "fit", "brightness", "image_size", "base_width", "multipliers", "gan_steps", "batch_size", "critic_steps",
    "penalty", "generator_lr", "discriminator_lr", "ema", "encoder_steps", "encoder_lr", "generator_tuning", "kappa",
    "pathology_steps", "pathology_width", "score", "control_steps", "score_batch", "kernels", "precision", "threads",
    "checkpoint_every",
)  # fmt: skip


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
