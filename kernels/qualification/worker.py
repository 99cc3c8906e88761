"""The child process of :mod:`.run`: tries classes of calls, and prints a line of JSON for each thing that it begins or
finds. Whatever a kernel does to this process, its parent knows by the last line which one it was.

    {"trying": [class, backend]}    {"refused": [class, backend, reason]}    {"proven": [class, backend, error]}
    {"timed": [class, {backend: milliseconds}]}    {"skipped": [class, reason]}

A class is its number among those that are asked about. It ends with the line ``{"done": true}``.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from raccgan.kernels import dispatch
from raccgan.kernels.qualification import trial
from raccgan.kernels.qualification.record import Recorded


class Request(NamedTuple):
    """What a child is asked."""

    classes: list[tuple[int, list[Recorded]]]  # the number of each class, and its calls
    device: str
    refused: Mapping[tuple[str, str], str]  # by op and backend: not to be tried any more
    until: float  # Unix time after which no class is begun
    imports: tuple[str, ...]  # modules to import first, which bring backends of their own


def main() -> None:
    request: Request = pickle.load(sys.stdin.buffer)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def tell(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for name in request.imports:
        importlib.import_module(name)
    device = torch.device(request.device)
    # As raccgan.models.devices.exact sets it where the calls come from.
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # PyTorch declares none
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.deterministic = True
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tables = dispatch.tables()
    for number, calls in request.classes:
        if time.time() > request.until:
            break
        op = calls[0].kind.op
        candidates = {name: one for name, one in tables[op].items() if (op, name) not in request.refused}
        try:
            _try_class(number, calls, candidates, device, tell)
        except torch.OutOfMemoryError as error:
            tell(skipped=[number, _first_line(error)])
    tell(done=True)


def _try_class(
    number: int, calls: list[Recorded], candidates: dict[str, dispatch.Backend], device: torch.device, tell: Any
) -> None:
    proven = dict(candidates)
    errors = dict.fromkeys(candidates, 0.0)
    for one in calls:
        test = trial.Trial(one, candidates["reference"], device)
        for name, backend in list(proven.items()):
            tell(trying=[number, name])
            if (reason := _why_not(test, backend, errors, name)) is not None:
                del proven[name]
                tell(refused=[number, name, reason])
    for name in proven:
        tell(proven=[number, name, errors[name]])
    total = dict.fromkeys(proven, 0.0)
    for one in calls:
        spent = trial.times(one, proven, device, lambda name: tell(trying=[number, name]))
        total = {name: total[name] + spent[name] for name in proven}
    tell(timed=[number, total])


def _why_not(test: trial.Trial, backend: dispatch.Backend, errors: dict[str, float], name: str) -> str | None:
    """Why a backend does not serve a call, in words; None where it does."""
    try:
        if reason := backend.supports(_call(test.recorded, test.device)):
            return reason
        errors[name] = max(errors[name], test.check(backend))
    except trial.RefusedError as refusal:
        return str(refusal)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises is the reason that it is not taken
        if test.device.type == "cuda":
            _leave_if_broken(test.device)
        return f"raises: {_first_line(error)}"
    return None


def _call(one: Recorded, device: torch.device) -> dispatch.Call:
    dtype = getattr(torch, one.kind.dtype)
    return dispatch.Call(device, dtype, (one.samples, *one.kind.shape), one.kind.kernel_size)


def _leave_if_broken(device: torch.device) -> None:
    """End this process where a kernel has left the GPU's context unusable: all that follows would fail too."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        print(_first_line(error), file=sys.stderr, flush=True)
        os._exit(3)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    main()
