"""Qualifies the backends of recorded calls: starts children, and survives whatever their kernels do."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any

import torch

from raccgan.kernels.qualification import cache, table
from raccgan.kernels.qualification.record import Recorded
from raccgan.kernels.qualification.table import Class, Row
from raccgan.kernels.qualification.worker import Request

PYTORCH = ("pytorch", "reference")  # the backends that a kernel of ours has to beat
MARGIN = 0.98  # of PyTorch's time that it may take at most: less is noise

ENDED = "ended"  # of a child that has closed its standard output


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    all: float = 120.0  # of everything; classes that were not reached stay PyTorch's until the next time
    silence: float = 30.0  # between two lines of a child: what takes longer hangs
    start: float = 120.0  # until the first line: importing PyTorch, and compiling PTX for a GPU that needs it


@dataclass
class _Class:
    """What is known of one class so far."""

    refused: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def known(device: torch.device) -> table.Rows:
    """Have ``fused`` follow what was found on this device before, and return it; nothing with RACCGAN_QUALIFY=0."""
    rows = {} if os.environ.get("RACCGAN_QUALIFY") == "0" else cache.load(table.indexed(device))
    table.use(table.indexed(device), rows)
    return rows


def qualify(
    calls: Iterable[Recorded],
    device: torch.device,
    *,
    limits: Limits = Limits(),
    imports: tuple[str, ...] = (),
    begin: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
    say: Callable[[str], None] = lambda line: None,
) -> table.Rows:
    """Try every backend of every class of calls that nothing is known of; from then on ``fused`` follows the findings.

    Args:
        calls: of :func:`raccgan.kernels.qualification.record.recorded`.
        imports: modules that the children import first, with backends of their own.
        begin: is told how many classes there are to try, if any, and returns what is told how many are done.
        say: is told, in one line, what was not reached or cannot be kept.

    Returns:
        The rows of the device, old ones included.
    """
    device = table.indexed(device)
    classes: dict[Class, list[Recorded]] = {}
    unique = dict.fromkeys(calls)
    for call in unique:
        if call.second_order or call._replace(second_order=True) not in unique:
            classes.setdefault(call.kind, []).append(call)
    if os.environ.get("RACCGAN_QUALIFY") == "0":
        return {}
    if all(kind in known(device) for kind in classes):
        return table.rows_of(device)
    with cache.locked(device):
        rows = dict(known(device))  # another process may have found them meanwhile
        todo = {kind: its for kind, its in classes.items() if kind not in rows}
        if todo:
            unsaved = _Run(todo, device, limits, imports, begin(len(todo)), rows).all()
            table.use(device, rows)
            if left := len(todo.keys() - rows.keys()):
                say(
                    f"{left} of {len(todo)} classes of calls were not tried in {limits.all:.0f} seconds and stay "
                    "PyTorch's: the next start, or python -m raccgan.doctor --qualify, goes on"
                )
            if unsaved:
                say(f"what was found cannot be kept, so every start tries anew: {unsaved}")
    return rows


class _Run:
    """Children one after the other, until every class is known or time is up."""

    def __init__(
        self,
        todo: dict[Class, list[Recorded]],
        device: torch.device,
        limits: Limits,
        imports: tuple[str, ...],
        done: Callable[[int], None],
        rows: dict[Class, Row],
    ) -> None:
        self.kinds = sorted(todo, key=lambda kind: -sum(call.work for call in todo[kind]))
        self.todo, self.device, self.limits, self.imports = todo, device, limits, imports
        self.done, self.rows = done, rows
        self.until = time.time() + limits.all
        self.found = {kind: _Class() for kind in self.kinds}
        self.refused: dict[tuple[str, str], str] = {}  # by op and backend: what ended a child
        self.finished: set[Class] = set()
        self.unsaved: str | None = None

    def all(self) -> str | None:
        """Fill ``rows``; returns why they could not be kept, else None."""
        while len(self.finished) < len(self.kinds) and time.time() < self.until:
            if not self._child():
                break
        return self.unsaved

    def _child(self) -> bool:
        """One child, to its end; whether another one may find more."""
        left = [(i, self.todo[kind]) for i, kind in enumerate(self.kinds) if kind not in self.finished]
        request = Request(left, str(self.device), self.refused, self.until, self.imports)
        command = [sys.executable, "-m", "raccgan.kernels.qualification.worker"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
            try:
                assert child.stdin is not None
                assert child.stdout is not None
                with child.stdin as stream:
                    pickle.dump(request, stream)
                reason, trying = self._listen(child.stdout)
                if reason == ENDED:
                    child.wait(10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                reason, trying = ENDED, None
            finally:
                child.kill()
                status = child.wait()
            if reason is None:
                return False  # it has tried all that it was asked, or time is up
            if reason == ENDED:
                reason = _why(status, errors)
        if trying is None:
            for kind in self.kinds:
                if kind not in self.finished:
                    self._finish(kind, {}, f"the child that tries kernels does not start: {reason}")
            return False
        kind, name = self.kinds[trying[0]], trying[1]
        if name in PYTORCH:
            self._finish(kind, {}, f"PyTorch itself {reason} on it")
        else:
            self.refused[kind.op, name] = f"{reason} in {kind}"
        return True

    def _listen(self, stream: IO[bytes]) -> tuple[str | None, tuple[int, str] | None]:
        """Take a child's answers. Returns why it is over, None where it is done, and what it tried last."""
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_copy, args=(stream, lines), daemon=True).start()
        trying: tuple[int, str] | None = None
        while True:
            limit = self.limits.silence if trying else self.limits.start
            left = max(0.0, self.until - time.time())
            try:
                line = lines.get(timeout=min(limit, left))
            except queue.Empty:
                return (None if left < limit else f"hangs: no end after {limit:.3g} seconds"), trying
            if not line:
                return ENDED, trying
            answer: dict[str, Any] = json.loads(line)
            if "done" in answer:
                return None, trying
            if "trying" in answer:
                trying = (answer["trying"][0], answer["trying"][1])
            else:
                self._take(answer)

    def _take(self, answer: dict[str, Any]) -> None:
        (what, (number, *rest)), *_ = answer.items()
        kind = self.kinds[number]
        if what == "refused":
            self.found[kind].refused[rest[0]] = rest[1]
        elif what == "proven":
            self.found[kind].errors[rest[0]] = rest[1]
        elif what == "timed":
            self._finish(kind, rest[0])
        elif what == "skipped":
            self._finish(kind, {}, rest[0])

    def _finish(self, kind: Class, spent: dict[str, float], why_none: str = "") -> None:
        """Write a class's row."""
        found = self.found[kind]
        refused = {name: reason for (op, name), reason in self.refused.items() if op == kind.op} | found.refused
        limit = MARGIN * min((spent[name] for name in PYTORCH if name in spent), default=0.0)
        for name, milliseconds in spent.items():
            if name not in PYTORCH and milliseconds > limit:
                best = min((other for other in PYTORCH if other in spent), key=lambda other: spent[other])
                refused[name] = f"slower: {milliseconds:.3g} ms, {best} {spent[best]:.3g} ms"
        order = tuple(sorted((name for name in spent if name not in refused), key=lambda name: spent[name]))
        if why_none:
            refused |= dict.fromkeys(("native", "triton"), why_none)
        self.rows[kind] = Row(order, refused, spent, found.errors)
        self.finished.add(kind)
        self.done(len(self.finished))
        self.unsaved = cache.save(self.device, self.rows)


def _copy(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")


def _why(status: int, errors: IO[bytes]) -> str:
    """Why a child ended, in words."""
    errors.seek(0)
    said = [line for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if status < 0:
        return f"crashes: {signal.Signals(-status).name}"
    return f"crashes: {said[-1].strip() if said else f'exit status {status}'}"
