"""``python -m raccgan.detect``: scores images and writes a table of scores and decisions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raccgan.cli import options
from raccgan.config import Config
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder
from raccgan.outputs.journal import Journal
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from raccgan.models.checkpoint import Checkpoint
    from raccgan.outputs.journal import Row
    from raccgan.scoring.detector import Detector
    from raccgan.scoring.score_files import Found, Wanted

EXAMPLES = """\
  python -m raccgan.detect runs/digits new/*.png
      scores and decisions in detected/scores.csv and .json
  python -m raccgan.detect runs/scans incoming/ 'old/**/*.tif' --out results --report
      every image below incoming/ and those that match; results/report.html shows them, the worst first
  python -m raccgan.detect runs/scans incoming/ --sensitivity 0.01
      flags what at most 1 in 100 of the held-out normal images exceeds
  python -m raccgan.detect runs/scans incoming/ --fail-on-anomaly --overlays || echo look into detected/overlays
      for scripts
  python -m raccgan.detect runs/scans --follow incoming/ --out results
      scores what arrives until Ctrl-C; the same command goes on later
  find incoming/ -name '*.png' | python -m raccgan.detect runs/scans - --out results
      paths from another program, each scored as it comes
  torchrun --nproc-per-node 4 -m raccgan.detect runs/scans incoming/ --out results
      the same files by four GPUs

exit status:
  0    every image was scored
  1    some could not be read; they were named, skipped and counted
  2    nothing was done: bad options, no readable image, no usable checkpoint
  3    with --fail-on-anomaly: an image is anomalous (also where others were skipped)
  130  stopped with Ctrl-C
The last line on standard output: "A of N images anomalous, S skipped, threshold T; scores are in FILE".

A run that was stopped, or killed, goes on where it was when the same command is given again; a folder that holds part
of another checkpoint's run, or of one with other settings, is refused unless --restart replaces it. The threshold may
change in between.
"""


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_intermixed_args(arguments)  # images may stand behind options
    _require_images(given)

    import torch

    from raccgan.models import checkpoint as checkpoints
    from raccgan.scoring.calibration import choose_pixel_threshold, choose_threshold
    from raccgan.scoring.detector import Detector
    from raccgan.scoring.score_files import help_first

    device = options.pick_device(given.device)
    job = ranks.join(device, getattr(given, "rank_timeout", Config.rank_timeout))
    stored = job.on_first(lambda: checkpoints.load(given.run))
    chosen = {name: getattr(given, name) for name in ("threshold", "quantile", "sensitivity")}
    threshold = choose_threshold(stored, **chosen)
    pixel_threshold = choose_pixel_threshold(stored, **chosen | {"threshold": given.pixel_threshold})
    if given.masks and pixel_threshold is None:
        raise InputError(
            "the run holds no scores of held-out images to take the threshold of pixels from: give one "
            "with --pixel-threshold, or run python -m raccgan.calibrate first"
        )
    if getattr(given, "threads", 0):
        torch.set_num_threads(given.threads)
    settings = options.settings_of(given, but=("quantile", "threads"))
    settings |= {"label_policy": given.label_policy, "compiled": given.compile, "pixel_threshold": pixel_threshold}
    detector = Detector(stored, threshold, device, **settings)
    options.note_missing_library(detector.config.kernels)
    if not job.first:
        help_first(detector, job)
        return 0
    return _detect(detector, stored, given)


def _require_images(given: argparse.Namespace) -> None:
    """An InputError where the command line names no images, or in two ways."""
    if given.follow is not None and given.images:
        raise InputError("--follow FOLDER and images exclude each other: name one or the other")
    if given.follow is None and not given.images:
        raise InputError(
            "no image to score: name files or folders, - for paths from standard input, or --follow FOLDER"
        )
    if "-" in given.images and len(given.images) > 1:
        raise InputError("- takes all paths from standard input: name no others beside it")
    if given.null and given.images != ["-"]:
        raise InputError("--null says how paths from standard input end: add - in the place of images")
    if _arrive(given) and ranks.torchrun_job() is not None:
        raise InputError("images that arrive are scored by one process: start it without torchrun")


def _detect(detector: Detector, stored: Checkpoint, given: argparse.Namespace) -> int:
    """Score the files and write the results; the exit status."""
    from raccgan.models.checkpoint import digest
    from raccgan.outputs.overlays import MapScale
    from raccgan.scoring.record import Table
    from raccgan.scoring.score_files import FOLDERS, Wanted, take_folder

    if given.threshold is None and given.label_policy != stored.held_out_policy:
        say(f"note: the threshold is of scores under {stored.held_out_policy!r}, not {given.label_policy!r}")
    found = None if _arrive(given) else _found(detector, given)
    made_with = {  # what the scores depend on, beside the files
        "checkpoint": digest(stored),
        "label_policy": given.label_policy,
        "kernels": detector.config.kernels,
        "score_batch": detector.config.score_batch,
        "compile": given.compile,
    }
    about = {"run": str(given.run), "classes": stored.classes, "left_out": found.left_out if found else {}}
    kept = {name: getattr(given, name) for name in ("maps", "overlays", "masks", "report")}
    wanted = Wanted(given.out, **kept, scale=MapScale.of(stored.held_out))
    if given.masks:  # which a resumed run has to have alike
        kept["masks"] = detector.pixel_threshold
    with own_folder(given.out, FOLDERS) as out:
        take_folder(out, made_with, restart=given.restart)
        with Journal(out / "scores.part", made_with | kept, restart=given.restart) as journal:
            rows = _scored(detector, found, journal, wanted, given)
            table = Table.of(rows, detector.threshold)
            if table.records:
                table.write(out, made_with, {"pixel_threshold": detector.pixel_threshold, **about})
            if table.records and given.report:
                marked = detector.pixel_threshold if given.masks else None
                table.write_report(out / "report.html", stored, str(given.run), marked)
            if found:  # what arrives later goes on from the journal
                journal.remove()
    skipped = len(table.skipped) + (len(found.problems) if found else 0)
    if not table.records and found:
        raise InputError(f"none of the {skipped} files could be read")
    tell(
        f"{table.anomalous} of {len(table.records)} images anomalous, {skipped} skipped, "
        f"threshold {table.threshold:.4g}; scores are in {out / 'scores.csv'}"
    )
    return 3 if given.fail_on_anomaly and table.anomalous else 1 if skipped else 0


def _arrive(given: argparse.Namespace) -> bool:
    """Whether the images come while this runs."""
    return given.follow is not None or given.images == ["-"]


def _found(detector: Detector, given: argparse.Namespace) -> Found:
    """The files that the arguments mean, of which it says what they are; an InputError if there are none."""
    from raccgan.data.inventory import about_images
    from raccgan.scoring.score_files import find

    found = find(given.images, given.out)
    for problem in found.problems:
        say(f"skipped: {problem}")
    if not found.files:
        raise InputError(f"no image to score: {found.problems[0] if found.problems else 'none was named'}")
    for line in about_images(found.files, found.left_out, detector.config.brightness):
        say(line)
    return found


def _scored(
    detector: Detector, found: Found | None, journal: Journal, wanted: Wanted, given: argparse.Namespace
) -> list[Row]:
    """The rows of the files that were found, or of those that arrive until this is stopped."""
    from raccgan.scoring.score_files import score_files

    if found is None:
        return _arrived(detector, journal, wanted, given)
    if journal.rows:
        say(f"continues a stopped run: {len(journal.rows)} of {len(found.files)} images are scored already")
    try:
        return score_files(detector, found.files, journal, wanted, ranks.job())
    except KeyboardInterrupt:
        done = f"stopped after {len(journal.rows)} of {len(found.files)} images"
        raise KeyboardInterrupt(f"{done}; the same command goes on") from None


def _arrived(detector: Detector, journal: Journal, wanted: Wanted, given: argparse.Namespace) -> list[Row]:
    """The rows of the images that arrived; a line of each on standard output as it comes."""
    from raccgan.outputs.interruption import finish_step_on_interrupt
    from raccgan.scoring.arriving import from_pipe, in_folder, score_arriving

    def told(rows: list[Row]) -> None:
        for row in (row for row in rows if "reason" not in row):
            decided = "anomalous" if row["score"] > detector.threshold else "normal"
            print(f"{row['path']}\t{row['score']:.6g}\t{decided}", flush=True)

    with finish_step_on_interrupt() as interrupted:
        if given.follow is None:
            arrivals = from_pipe(sys.stdin.buffer, b"\0" if given.null else b"\n", interrupted)
        else:
            already = f"; {len(journal.rows)} images are scored already" if journal.rows else ""
            say(f"following {given.follow}: Ctrl-C ends it and writes the tables{already}")
            arrivals = in_folder(given.follow, given.out, journal.rows, interrupted)
        return score_arriving(detector, arrivals, journal, wanted, told)


def _parser() -> options.Parser:
    parser = options.Parser(
        "detect",
        "Score images with a trained run. A file that cannot be read is named, skipped and counted.",
        EXAMPLES,
        "RUN IMAGE ...",
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, folders (with all below), or patterns in quotes; - for paths on standard input, one a line",
    )
    arriving = parser.add_argument_group("images as they arrive (a line of each on standard output, at once)")
    arriving.add_argument(
        "--follow", type=Path, metavar="FOLDER", help="score what arrives below this folder, until Ctrl-C or SIGTERM"
    )
    arriving.add_argument("--null", action="store_true", help="with -: paths end with NUL, as find -print0 has them")
    results = parser.add_argument_group("results beside scores.csv and scores.json")
    results.add_argument("--report", action="store_true", help="report.html: one page that shows and explains it all")
    results.add_argument("--overlays", action="store_true", help="overlays/*.png: the image with its anomaly map on it")
    results.add_argument(
        "--masks",
        action="store_true",
        help="masks/*.png: the anomalous pixels in white, in the image's size; with boxes round them in scores.json, "
        "and lines round them in overlays and report",
    )
    results.add_argument(
        "--maps", action="store_true", help="maps/*.npy: the anomaly maps, float32 in the model's size"
    )
    results.add_argument("--fail-on-anomaly", action="store_true", help="exit with status 3 where one is anomalous")
    results.add_argument(
        "--restart", action="store_true", help="remove what an earlier run left in --out and score anew"
    )
    options.add_threshold(parser)
    parser.add_argument(
        "--pixel-threshold",
        type=float,
        metavar="X",
        help="a pixel is anomalous where its map is above X (default: as "
        "the threshold of images, from the maxima of held-out normal images' maps)",
    )
    options.add_label_policy(parser)
    options.add_places(parser, data_root=False, out="detected")
    options.add_settings(parser, ("kernels", "score_batch", "threads", "rank_timeout"))
    parser.add_argument(
        "--compile",
        action="store_true",
        help="score through torch.compile: twenty seconds more at first, then about as fast as scores "
        "otherwise are after 200 passes; needs a C++ compiler",
    )
    return parser


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
