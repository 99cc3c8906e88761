"""``python -m raccgan.calibrate``: gives a trained run another threshold and leaves its weights as they are."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raccgan.cli import options
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from torch import Tensor

    from raccgan.models.checkpoint import Checkpoint

EXAMPLES = """\
  python -m raccgan.calibrate runs/scans normal-from-the-new-scanner/
      the threshold becomes the 0.95 quantile of the scores of these images, all of which must be normal
  python -m raccgan.calibrate runs/scans normal/ --sensitivity 0.01
      the lowest threshold that at most 1 in 100 of them exceeds
  python -m raccgan.calibrate runs/scans --quantile 0.99
      another quantile of the normal images' scores that the run holds already
  python -m raccgan.calibrate runs/scans --threshold 0.08
      this threshold

The checkpoint is written beside and renamed; its weights stay bit for bit. Exit status: 0, or 1 where some images could
not be read and were skipped, or 2 where nothing was changed.
"""


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)

    from raccgan.models import checkpoint as checkpoints
    from raccgan.scoring.calibration import choose_pixel_threshold, choose_threshold, note_few

    file = checkpoints.existing(given.run)
    with own_folder(file.parent):  # a training that goes on there would lose steps to what is read here
        stored = checkpoints.load(file)
        held_out, policy, skipped = stored.held_out, stored.held_out_policy, 0
        if given.images:
            held_out, skipped = _scores(stored, given)
            policy = given.label_policy
        quantile = given.quantile
        if given.threshold is None and given.sensitivity is None and quantile is None:
            quantile = checkpoints.config_of(stored).quantile
        fresh = dataclasses.replace(stored, threshold=None, held_out=held_out)
        threshold = choose_threshold(fresh, threshold=given.threshold, quantile=quantile, sensitivity=given.sensitivity)
        if given.images:
            fresh.pixel_threshold = None  # that of other images
        pixel_threshold = choose_pixel_threshold(fresh, quantile=quantile, sensitivity=given.sensitivity)
        made = checkpoints.Calibration(threshold, held_out, policy, pixel_threshold)
        checkpoints.save(file, stored.calibrated(made))
        if quantile is not None:
            note_few(len(held_out.get("score", ())), quantile)
        before = "none" if stored.threshold is None else f"{stored.threshold:.4g}"
        count = len(held_out.get("score", ()))
        above = int((held_out["score"] > threshold).sum()) if count else 0
        tell(
            f"threshold {threshold:.4g} (before: {before}); {above} of {count} normal images are above it, "
            f"{skipped} skipped; written to {file}"
        )
    return 1 if skipped else 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "calibrate",
        "Give a trained run another threshold: from a folder of normal images, or from the normal images' scores that "
        "it holds already.",
        EXAMPLES,
        "RUN [IMAGE ...]",
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="normal images: files, folders (with all below), patterns in quotes"
    )
    options.add_threshold(parser)
    options.add_label_policy(parser)
    options.add_places(parser, data_root=False, out=None)
    options.add_settings(parser, ("kernels", "score_batch"))
    return parser


def _scores(stored: Checkpoint, given: argparse.Namespace) -> tuple[dict[str, Tensor], int]:
    """What the named images get, and how many of them could not be read."""
    import torch

    from raccgan.data.inventory import about_images
    from raccgan.scoring.detector import Detector
    from raccgan.scoring.reading import Skipped
    from raccgan.scoring.score_files import find

    found = find(given.images)
    # A detector has a threshold, and this one decides nothing.
    settings = options.settings_of(given, but=("quantile",))
    device = options.pick_device(given.device)
    detector = Detector(stored, 0.0, device, label_policy=given.label_policy, **settings)
    options.note_missing_library(detector.config.kernels)
    for line in about_images(found.files, found.left_out, detector.config.brightness):
        say(line)
    problems = list(found.problems)
    scores, peaks = [], []
    with Progress("normal images", len(found.files), unit="image", lines=False) as progress:
        for result in detector.scan(found.files, details=False):
            if isinstance(result, Skipped):
                problems.append(result.reason)
            else:
                scores.append(result.score)
                peaks.append(result.peak.value)
            progress.update()
    for problem in problems:
        say(f"skipped: {problem}")
    if not scores:
        raise InputError("no normal image could be read, so the threshold stays")
    return {"score": torch.tensor(scores), "peak": torch.tensor(peaks)}, len(problems)


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
