"""The folder of a run, and what the run continues from. A finished or stopped run is never overwritten."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.models.checkpoint import NAME, PICKLED_NAME, Checkpoint, load
from raccgan.outputs.files import stamp, write_json, write_text

SETTINGS = "config.json"  # from which a run that was killed before its first checkpoint begins again
JOB = ".torchrun-job"  # names the job of torchrun which writes into a folder, until the job is done


@dataclass(frozen=True)
class Request:
    """What a command line says of the place."""

    out: Path | None
    resume: str | None  # the folder or checkpoint to continue; "" for the run in ``out``, None for a new run
    preset: str | None
    dataset: str | None
    torchrun_job: str | None  # the name of the job of torchrun that this process is a rank of, if any


@dataclass(frozen=True)
class Start:
    """Where a run goes, and what it goes on from."""

    out: Path
    stamp: tuple[int, int, int] | None  # of the checkpoint in ``out``, as it was when this was found out
    resumed: Checkpoint | None
    settings: dict[str, Any]  # of a run that was killed before its first checkpoint


def find(request: Request) -> Start:
    """The folder of the run that a command line asks for, and what is there to go on from.

    An InputError if the folder holds another run, or if there is nothing to resume, or it cannot be read.
    """
    out, source = _place(request)
    seen = stamp(out / NAME)
    if source is None:
        return Start(out, seen, None, {})
    file = source / SETTINGS
    if any((source / name).exists() for name in (NAME, PICKLED_NAME)) or not file.is_file():
        return Start(out, seen, load(source), {})
    with suppress(ValueError, RecursionError):
        settings = json.loads(file.read_bytes())
        if isinstance(settings, dict):
            return Start(out, seen, None, settings)
    raise InputError(f"{file} is damaged, and there is no {NAME}: train anew without --resume")


def begin(start: Start, config: Config, torchrun_job: str | None) -> None:
    """Write the settings, and the name of the job, into the run's folder, which is locked by this process.

    An InputError if another run has written its checkpoint there since :func:`find`.
    """
    if stamp(start.out / NAME) != start.stamp:
        raise InputError(f"another run has written into {start.out} just now: give the command again")
    write_json(start.out / SETTINGS, config.to_dict())
    if torchrun_job is not None:
        write_text(start.out / JOB, torchrun_job)


def end(out: Path) -> None:
    """Note that the job which writes into this folder is done."""
    (out / JOB).unlink(missing_ok=True)


def _place(request: Request) -> tuple[Path, Path | None]:
    begun = _begun(request)
    if begun is not None and (request.resume is None or (begun / NAME).exists()):
        return begun, begun if (begun / NAME).exists() else None
    if request.resume is None:
        if request.out is None:
            return next(place for place in _folders(request) if not place.exists()), None
        if (request.out / NAME).exists():
            raise InputError(f"{request.out} holds a run already: add --resume to continue it, or name another --out")
        return request.out, None
    source = Path(request.resume) if request.resume else request.out
    if source is None:
        raise InputError("--resume needs a folder, for example --resume runs/digits")
    if request.preset is not None:
        raise InputError("--preset and --resume exclude each other: the settings are the checkpoint's")
    folder = source if source.is_dir() else source.parent
    if request.out is not None and (request.out / NAME).exists() and not request.out.samefile(folder):
        raise InputError(f"{request.out} holds a run already: name another --out to continue {source} in")
    return request.out or folder, source


def _begun(request: Request) -> Path | None:
    """The folder in which this job of torchrun began, if torchrun restarts its ranks; never another job's."""
    if request.torchrun_job is None:
        return None
    there = itertools.takewhile(Path.exists, _folders(request))
    return next((p for p in there if (p / JOB).exists() and (p / JOB).read_text() == request.torchrun_job), None)


def _folders(request: Request) -> Iterator[Path]:
    """Where a run may go: the folder that is named, or one of its data's name, with -2, -3 ... appended."""
    named = request.out or (Path(request.resume) if request.resume else None)
    if named is not None:
        yield named if named.is_dir() or request.out else named.parent
        return
    wanted = Path("runs") / Path(request.dataset or request.preset or "digits").name
    yield from (wanted if i == 1 else wanted.with_name(f"{wanted.name}-{i}") for i in range(1, 10_000))
