"""``python -m raccgan.train``: trains the GAN, then encoder and pathology head, then tests them; all or in parts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raccgan.cli import options
from raccgan.config import PRESETS, Config, goes_by_time, make_config
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from raccgan.training.loop import Training
    from raccgan.training.run import Run

PHASES = ("all", "gan", "encoder", "evaluate")

EXAMPLES = """\
  python -m raccgan.train
      real handwritten digits, 0 to 4 normal; a few minutes on a CPU, nothing to download
  python -m raccgan.train --dataset mnist --normal 3 --gan-steps 3000
      one digit of MNIST against the nine others
  python -m raccgan.train --preset parts --dataset mvtec --category screw --data-root ~/data
      MVTec AD, one category; looks in ~/data/mvtec/screw. Parts that lie as they fell are turned upright
  python -m raccgan.train --dataset ~/scans --normal healthy --out runs/scans
      your own folder: one sub-folder a class, such as healthy/ and abnormal/; about 20 minutes on a CPU
  python -m raccgan.train --dataset ~/scans --normal healthy --minutes 120 --out runs/scans
      the same, with larger networks or more steps, as they fit in two hours
  python -m raccgan.train --resume runs/scans
      go on where a run stopped
  python -m raccgan.train --dataset fashion-mnist --precision bfloat16 --compile
      as fast as it goes on a CPU: compiled steps, and half precision where the processor has it
  torchrun --nproc-per-node 8 --max-restarts 3 -m raccgan.train --dataset ~/scans --normal healthy --out runs/scans
      on eight GPUs of this machine; with more of its options on many machines
"""


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    if given.phase not in PHASES:
        raise InputError(f"--phase {given.phase!r} is not one of {', '.join(PHASES)}")
    device = options.pick_device(given.device)

    from raccgan.evaluation.budget import planned
    from raccgan.models import checkpoint as checkpoints
    from raccgan.models.devices import require_kernels
    from raccgan.training import places
    from raccgan.training.loop import Training
    from raccgan.training.run import fewer_a_batch, prepare, readable, say_understood, settle_threads
    from raccgan.training.steps import cannot_trace

    asked = options.settings_of(given)
    job = ranks.join(device, asked.get("rank_timeout", Config.rank_timeout))
    request = places.Request(given.out, given.resume, given.preset, asked.get("dataset"), ranks.torchrun_job())
    start = job.on_first(lambda: places.find(request))
    out, resumed, settings = start.out, start.resumed, start.settings | asked
    config = make_config(given.preset, settings) if resumed is None else checkpoints.config_of(resumed, **settings)
    timed = resumed is None and goes_by_time(given.preset, config.dataset)
    if given.minutes is not None and not timed:
        raise InputError("--minutes chooses sizes and steps, which --preset, --resume and digits bring: leave one out")
    require_kernels(config.kernels, device)
    options.note_missing_library(config.kernels)
    run = prepare(config, given.data_root, device, job)
    if resumed is not None:
        checkpoints.check_same_model(resumed, run.config, run.classes, run.channels)
        if given.resume is None and job.first:
            say(f"started again, and goes on from {out / checkpoints.NAME}")
    done = resumed.steps if resumed else {}
    for before in {"encoder": ("gan",), "evaluate": ("gan", "encoder", "pathology")}.get(given.phase, ()):
        goal = getattr(run.config, f"{before}_steps")
        if done.get(before, 0) < goal:
            trained = {"gan": "generator", "encoder": "encoder", "pathology": "pathology head"}[before]
            raise InputError(
                f"--phase {given.phase} needs a trained {trained}, and this run has {done.get(before, 0)} of {goal} "
                f"steps: run --phase {'gan' if before == 'gan' else 'encoder'} first, or --resume such a run"
            )
    say_understood(run)
    if timed:
        run = replace(run, config=job.on_first(lambda: planned(run, settings, given.minutes)))
        settle_threads(run.config)
    if given.compile and (reason := cannot_trace(run.config, job)) is not None:
        raise InputError(f"--compile works {reason}")
    job.require_divisible(run.config.batch_size)
    run, data = readable(run)
    run = fewer_a_batch(run, len(data))
    with job.entered_on_first(lambda: own_folder(out)):  # last of all checks, so that a refused run leaves nothing
        job.on_first(lambda: places.begin(start, run.config, request.torchrun_job))
        if job.first:
            say(
                f"{run.config.dataset}: normal {', '.join(run.classes)}; {len(run.split.train)} images to train on, "
                f"{len(run.split.held_out)} held out for the threshold, {len(run.split.test)} to test; results in {out}"
            )
        training = Training(run, data, out / checkpoints.NAME, resumed, compiled=given.compile)
        _run_phases(training, run, given.phase, out)
        if job.first:
            places.end(out)
    return 0


def _run_phases(training: Training, run: Run, phase: str, out: Path) -> None:
    """Train, calibrate and evaluate, or one part of that; on several ranks, the first alone evaluates."""
    from raccgan.evaluation.assessment import evaluate_run
    from raccgan.scoring.calibration import calibrate, fitted_scorer

    if phase in ("all", "gan"):
        training.run("gan")
    if phase in ("all", "encoder"):
        training.run("encoder")
        training.run("pathology")
    if phase == "gan":
        if training.job.first:
            say(f"the generator is trained; --phase encoder --resume {out} goes on")
        return
    held_out = run.dataset(run.split.held_out)
    scorer = fitted_scorer(run.config, training.networks, run.classes, training.data, held_out)
    if training.job.first and run.config.score == "learned":
        say(f"the score weighs {training.networks.evidence.described()}")
    training.calibration = calibration = calibrate(scorer, held_out, quantile=run.config.quantile)
    training.save("pathology")
    if phase == "encoder":
        if training.job.first:
            trained = f"encoder and pathology head are trained, threshold {calibration.threshold:.4g}"
            say(f"{trained}; --phase evaluate --resume {out} goes on")
        return
    seconds, history = training.seconds, training.history
    assessment = evaluate_run(out, run, scorer, calibration, seconds=seconds, history=history)
    if assessment is not None:
        print(assessment.summary())
        tell(f"scores, metrics, pictures and the checkpoint are in {out}")


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        "train",
        "Train RA-CCGAN on normal images and test it: generator and discriminator, then encoder, then scores.",
        EXAMPLES,
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings to start from: {', '.join(PRESETS)}; all but digits, mnist-small and parts are sized for a "
        "GPU. A preset replaces some of the defaults shown below (default: that of digits for digits; for other data, "
        "sizes and steps that take --minutes)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="X",
        help="without a preset: how long training and its tests may take on this machine, where a few steps are timed "
        "first (default: 20 on a CPU, 60 on a GPU)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="continue the run in this folder (default: the one that --out names)",
    )
    parser.add_argument("--phase", default="all", metavar="PHASE", help=f"one of {', '.join(PHASES)} (default: all)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="send the steps through torch.compile, the gradient penalty included: one to two minutes more at first, "
        "then 0.7 to 0.9 of the time; needs a C++ compiler, and goes on without compiling if that fails",
    )
    options.add_places(parser)
    options.add_settings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
