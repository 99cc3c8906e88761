"""``python -m raccgan.evaluate``: tests a trained run on the test images of its data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from raccgan.cli import options
from raccgan.config import Config
from raccgan.distributed import ranks
from raccgan.outputs.files import own_folder
from raccgan.outputs.terminal import tell

EXAMPLES = """\
  python -m raccgan.evaluate runs/digits
      metrics.json, scores.csv and the pictures of that run, anew
  python -m raccgan.evaluate runs/digits --quantile 0.99 --out strict
      with a threshold that one in a hundred held-out normal images exceeds
  python -m raccgan.evaluate runs/digits --report
      with report.html: every test image, a threshold to slide, what it finds and what it misses
  python -m raccgan.evaluate runs/digits --label-policy 3
      when every image is known to be a 3, or not to be
  torchrun --nproc-per-node 4 -m raccgan.evaluate runs/scans
      the same files, the test images scored by four GPUs
"""

SETTINGS = (
    "dataset", "category", "unreadable", "score", "quantile", "score_batch", "control_steps", "kernels", "threads",
    "rank_timeout",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    device = options.pick_device(given.device)

    from raccgan.evaluation.assessment import evaluate_run
    from raccgan.models import checkpoint as checkpoints
    from raccgan.models.devices import require_kernels
    from raccgan.scoring.calibration import calibration_for
    from raccgan.scoring.scorer import Scorer
    from raccgan.training.run import prepare, readable, say_understood

    settings = options.settings_of(given)
    job = ranks.join(device, settings.get("rank_timeout", Config.rank_timeout))
    stored = job.on_first(lambda: checkpoints.load(given.run))
    config = checkpoints.config_of(stored, **settings)
    require_kernels(config.kernels, device)
    options.note_missing_library(config.kernels)
    run = prepare(config, given.data_root, device, job)
    if config.unreadable == "skip":
        run, _ = readable(run)
    checkpoints.check_same_model(stored, run.config, run.classes, run.channels)
    say_understood(run)
    folder = given.out or (given.run if given.run.is_dir() else given.run.parent)
    with job.entered_on_first(lambda: own_folder(folder)) as out:
        networks = checkpoints.networks_of(stored, run.config, device)
        scorer = Scorer(run.config, networks, run.classes, given.label_policy)
        held_out = partial(run.dataset, run.split.held_out)
        calibration = calibration_for(stored, run.config, scorer, held_out, settings.get("quantile"))
        report_of = str(given.run) if given.report else ""
        assessment = evaluate_run(
            out, run, scorer, calibration, seconds=stored.seconds, history=stored.history, report_of=report_of
        )
        if assessment is not None:
            print(assessment.summary())
            tell(f"metrics, scores and pictures are in {out}")
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "evaluate",
        "Evaluate a trained run: image AUROC, AUPR and F1, pixel AUROC and AUPRO where there are masks, "
        "and the two plain controls on the same split.",
        EXAMPLES,
        "RUN",
    )
    parser.add_argument("--report", action="store_true", help="report.html too: one page that shows the test images")
    options.add_label_policy(parser)
    options.add_places(parser)
    options.add_settings(parser, SETTINGS)
    return parser


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
