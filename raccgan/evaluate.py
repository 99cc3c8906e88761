"""``python -m raccgan.evaluate``: a trained run against the test images of its data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from raccgan import options

EXAMPLES = """\
  python -m raccgan.evaluate runs/digits
      metrics.json, scores.csv and the pictures of that run, anew
  python -m raccgan.evaluate runs/digits --quantile 0.99 --out strict
      with a threshold that one in a hundred held-out normal images exceeds
  python -m raccgan.evaluate runs/digits --label-policy 3
      when every image is known to be a 3, or not to be
"""

SETTINGS = ("dataset", "category", "quantile", "score_batch", "control_steps", "kernels", "threads")


def main(arguments: Sequence[str]) -> int:
    parser = options.Parser(
        "Evaluate a trained run: image AUROC, AUPR and F1, pixel AUROC and AUPRO where there are masks, "
        "and the two plain controls on the same split.",
        EXAMPLES,
        prog="python -m raccgan.evaluate",
        usage="python -m raccgan.evaluate RUN [option ...]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its checkpoint")
    options.add_label_policy(parser)
    options.add_places(parser)
    options.add_settings(parser, SETTINGS)
    given = parser.parse_args(arguments)
    device = options.pick_device(given.device)

    from raccgan import checkpoint as checkpoints
    from raccgan.detector import choose_threshold
    from raccgan.evaluation import calibrate, evaluate, summary, write_results
    from raccgan.files import prepare_out
    from raccgan.run import prepare

    stored = checkpoints.load(given.run)
    settings = options.settings_of(given)
    config = checkpoints.config_of(stored, **settings)
    options.require_kernels(config.kernels, device)
    run = prepare(config, given.data_root, device)
    checkpoints.check_same_model(stored, run.config, run.classes, run.channels)
    scorer = run.scorer(checkpoints.networks_of(stored, run.config, device), given.label_policy)
    out = prepare_out(given.out or (given.run if given.run.is_dir() else given.run.parent))
    if stored.held_out and given.label_policy == stored.held_out_policy:
        threshold = choose_threshold(stored, quantile=settings.get("quantile"))
    elif stored.threshold is None or "quantile" in settings or given.label_policy != stored.held_out_policy:
        threshold = calibrate(run, scorer).threshold
    else:
        threshold = stored.threshold
    evaluation = evaluate(run, scorer, threshold, seconds=stored.seconds)
    write_results(out, run, evaluation, scorer, stored.history)
    print(summary(evaluation))
    print(f"metrics, scores and pictures are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
