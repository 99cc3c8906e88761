"""``python -m raccgan.train``: the GAN, then the encoder, then scores and metrics; in one go or phase by phase."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raccgan.cli import options
from raccgan.config import Config, make_config
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder, stamp, write_json, write_text
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from raccgan.data.dataset import ImageDataset
    from raccgan.models.checkpoint import Checkpoint
    from raccgan.training.loop import Log
    from raccgan.training.run import Run

JOB = ".torchrun-job"
"""The file that names the job of torchrun which writes into a folder, until it is done."""

PHASES = ("all", "gan", "encoder", "evaluate")
SETTINGS = "config.json"

EXAMPLES = """\
  python -m raccgan.train
      real handwritten digits, 0 to 4 normal; a few minutes on a CPU, nothing to download
  python -m raccgan.train --dataset mnist --normal 3 --gan-steps 3000
      one digit of MNIST against the nine others
  python -m raccgan.train --preset parts --dataset mvtec --category screw --data-root ~/data
      MVTec AD, one category; looks in ~/data/mvtec/screw. Parts that lie as they fell are turned upright
  python -m raccgan.train --dataset ~/scans --normal healthy --out runs/scans
      your own folder: one sub-folder a class, such as healthy/ and abnormal/
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

    from raccgan.models import checkpoint as checkpoints
    from raccgan.models.devices import require_kernels
    from raccgan.training.run import prepare

    asked = options.settings_of(given)
    ranks.join(device, asked.get("rank_timeout", Config.rank_timeout))
    found = ranks.on_first(lambda: _find(given))
    out, resumed, settings = found.out, found.resumed, found.settings | asked
    config = make_config(given.preset, settings) if resumed is None else checkpoints.config_of(resumed, **settings)
    require_kernels(config.kernels, device)
    options.note_missing_library(config.kernels)
    run = prepare(config, given.data_root, device)
    if resumed is not None:
        checkpoints.check_same_model(resumed, run.config, run.classes, run.channels)
    if resumed is not None and given.resume is None:
        _say(f"started again, and goes on from {out / checkpoints.NAME}")
    _check_phase(given.phase, run.config, resumed)
    if given.compile:
        _require_recordable(run.config)
    run, data = _training_data(run)
    with ranks.entered_on_first(lambda: own_folder(out)):  # last of all checks, so that a refused run leaves nothing
        ranks.on_first(lambda: _begin(found, run.config))
        _say(
            f"{run.config.dataset}: normal {', '.join(run.classes)}; {len(run.split.train)} images to train on, "
            f"{len(run.split.held_out)} held out for the threshold, {len(run.split.test)} to test; results in {out}"
        )
        status = _run_phases(run, data, given.phase, out, resumed, compiled=given.compile)
        if ranks.first():
            (out / JOB).unlink(missing_ok=True)
        return status


@dataclass(frozen=True)
class _Found:
    """Where a run goes, and what it goes on from."""

    out: Path
    seen: tuple[int, int, int] | None  # the stamp of the checkpoint there
    resumed: Checkpoint | None
    settings: dict[str, Any]


def _find(given: argparse.Namespace) -> _Found:
    from raccgan.models.checkpoint import NAME

    out, source = _place(given)
    seen = stamp(out / NAME)
    resumed, settings = _start(source) if source is not None else (None, {})
    return _Found(out, seen, resumed, settings)


def _begin(found: _Found, config: Config) -> None:
    from raccgan.models.checkpoint import NAME

    if stamp(found.out / NAME) != found.seen:
        raise InputError(f"another run has written into {found.out} just now: give the command again")
    write_json(found.out / SETTINGS, config.to_dict())
    if (job := ranks.job()) is not None:
        write_text(found.out / JOB, job)


def _run_phases(
    run: Run, data: ImageDataset, phase: str, out: Path, resumed: Checkpoint | None, *, compiled: bool
) -> int:
    from raccgan.evaluation.result_files import evaluate_run
    from raccgan.models.checkpoint import NAME
    from raccgan.scoring.calibration import calibrate, fit_density
    from raccgan.scoring.scorer import Scorer
    from raccgan.training.loop import Training

    training = Training.of(run, data, out / NAME, resumed, _tensorboard(out), compiled=compiled)
    if phase in ("all", "gan"):
        training.run("gan")
    if phase in ("all", "encoder"):
        training.run("encoder")
    if phase == "gan":
        _say(f"the generator is trained; --phase encoder --resume {out} goes on")
        return 0
    fit_density(training.networks, training.data, batch=run.config.score_batch)
    scorer = Scorer(run.config, training.networks, run.classes)
    held_out = run.dataset(run.split.held_out)
    training.calibration = calibration = calibrate(scorer, held_out, quantile=run.config.quantile)
    training.save("encoder")
    if phase == "encoder":
        _say(f"the encoder is trained, threshold {calibration.threshold:.4g}; --phase evaluate --resume {out} goes on")
        return 0
    seconds, history = training.seconds, training.history
    assessment = evaluate_run(out, run, scorer, calibration, seconds=seconds, history=history)
    if assessment is None:
        return 0
    print(assessment.summary())
    tell(f"scores, metrics, pictures and the checkpoint are in {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        "Train RA-CCGAN on normal images and test it: generator and discriminator, then encoder, then scores.",
        EXAMPLES,
        prog="python -m raccgan.train",
    )
    options.add_preset(parser)
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
        "then 0.7 to 0.9 of the time; needs a C++ compiler",
    )
    options.add_places(parser)
    options.add_settings(parser)
    return parser


def _place(given: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and what to go on from. A finished or stopped run is never overwritten."""
    from raccgan.models.checkpoint import NAME

    begun = _begun(given)
    if begun is not None and (begun / NAME).exists():
        return begun, begun
    if given.resume is None:
        if begun is not None:
            return begun, None
        if given.out is None:
            return next(place for place in _folders(given) if not place.exists()), None
        if (given.out / NAME).exists():
            raise InputError(f"{given.out} holds a run already: add --resume to continue it, or name another --out")
        return given.out, None
    source = Path(given.resume) if given.resume else given.out
    if source is None:
        raise InputError("--resume needs a folder, for example --resume runs/digits")
    if given.preset is not None:
        raise InputError("--preset and --resume exclude each other: the settings are the checkpoint's")
    folder = source if source.is_dir() else source.parent
    if given.out is not None and (given.out / NAME).exists() and not given.out.samefile(folder):
        raise InputError(f"{given.out} holds a run already: name another --out to continue {source} in")
    return given.out or folder, source


def _start(source: Path) -> tuple[Checkpoint | None, dict[str, Any]]:
    """The checkpoint to go on from; or, of a run that was killed before its first one, the settings to begin with."""
    from raccgan.models.checkpoint import NAME, PICKLED_NAME, load

    file = source / SETTINGS
    if any((source / name).exists() for name in (NAME, PICKLED_NAME)) or not file.is_file():
        return load(source), {}
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{file} is damaged, and there is no {NAME}: train anew without --resume")
    return None, settings


def _folders(given: argparse.Namespace) -> Iterator[Path]:
    """Where a run may go: the folder that it was given, or one of its data's name, with -2, -3 ... appended."""
    named = given.out or (Path(given.resume) if given.resume else None)
    if named is not None:
        yield named if named.is_dir() or given.out else named.parent
        return
    wanted = Path("runs") / Path(getattr(given, "dataset", given.preset or "digits")).name
    yield from (wanted if i == 1 else wanted.with_name(f"{wanted.name}-{i}") for i in range(1, 10_000))


def _begun(given: argparse.Namespace) -> Path | None:
    """The folder that this job of torchrun began in, if it starts its ranks again; no other run's."""
    if (job := ranks.job()) is None:
        return None
    there = itertools.takewhile(Path.exists, _folders(given))
    return next((place for place in there if (place / JOB).exists() and (place / JOB).read_text() == job), None)


def _check_phase(phase: str, config: Config, resumed: Checkpoint | None) -> None:
    done = resumed.steps if resumed is not None else {"gan": 0, "encoder": 0}
    if phase in ("encoder", "evaluate") and done["gan"] < config.gan_steps:
        raise InputError(
            f"--phase {phase} needs a trained generator, and this run has {done['gan']} of {config.gan_steps} steps: "
            "run --phase gan first, or --resume such a run"
        )
    if phase == "evaluate" and done["encoder"] < config.encoder_steps:
        raise InputError(
            f"--phase evaluate needs a trained encoder, and this run has {done['encoder']} of {config.encoder_steps} "
            "steps: run --phase encoder first"
        )


def _require_recordable(config: Config) -> None:
    from raccgan.training.loop import cannot_record

    if (reason := cannot_record(config)) is not None:
        raise InputError(f"--compile works {reason}")


def _training_data(run: Run) -> tuple[Run, ImageDataset]:
    """The run and the images to train on, every file of it read once: now, not when the training is over."""
    from raccgan.training.run import readable

    ranks.require_divisible(run.config.batch_size)
    run, data = readable(run)
    if run.config.batch_size > len(data):
        raise InputError(
            f"--batch-size {run.config.batch_size} is larger than the {len(data)} images there are to train on"
        )
    return run, data


def _tensorboard(out: Path) -> Log:
    """Losses to TensorBoard where it is installed, from rank 0; nowhere else."""
    if importlib.util.find_spec("tensorboard") is None or not ranks.first():
        return lambda phase, step, figures: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))

    def log(phase: str, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(f"{phase}/{name}", value, step)

    return log


def _say(line: str) -> None:
    if ranks.first():
        say(line)


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
