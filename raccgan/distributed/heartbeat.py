"""Heartbeats: if a rank stops or is lost, every other rank ends within seconds, with one line that says which it was.

A thread of every rank writes its heartbeat to the job's store, and reads there the others' and why the first rank
stopped. A collective that fails asks for that reason; a rank in one that does not even fail is ended by its thread.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from raccgan.errors import InputError

BEAT = 0.5  # seconds between heartbeats
SILENT = 2.5  # seconds without a heartbeat after which a rank is the reason of a failed collective
GRACE = 5.0  # seconds that the work has to end with its own line before the thread ends the process

_LEFT = b"left"
_NO_STORE = "rank 0, or torchrun on its machine, was lost"

T = TypeVar("T")


class LostRankError(InputError):
    """Another rank stopped or was lost: this rank cannot go on alone."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Heartbeat(threading.Thread):
    """Heartbeats of rank ``rank`` among ``world``, from now until :meth:`leave`.

    ``store`` is the job's (``torch.distributed.Store``), over a connection of this object's own. A rank is given up
    after ``timeout`` seconds without a heartbeat.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        super().__init__(name="raccgan-heartbeat", daemon=True)
        self.store, self.rank, self.timeout = store, rank, timeout
        self._beats = [f"beat/{other}" for other in range(world)]
        self._seen = [(b"", time.monotonic())] * world  # of every rank, the last heartbeat and when it was new
        self._ended = threading.Event()
        self._speaking = threading.Lock()
        self._using = threading.Lock()
        self._count = 0
        self.terminated = False  # by torchrun, because a rank was lost or because torchrun itself ends
        self.store.set(self._beats[rank], "0")
        self.store.wait(self._beats)
        self.start()

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                reason = self._ask(self._beat)
            except RuntimeError:
                reason = _NO_STORE
            if reason is not None and not self._ended.wait(GRACE):
                with self._speaking:  # leave() holds it for good
                    print(f"error: rank {self.rank}: {reason}", file=sys.stderr, flush=True)
                    os._exit(2)

    def lost(self, symptom: BaseException) -> LostRankError:
        """The error to raise in place of the ``symptom`` that a collective raised; the other ranks are told."""
        reason = self._gone(SILENT + 2 * BEAT) or f"another rank does not answer: {first_line(symptom)}"
        self._announce(reason)
        return LostRankError(f"rank {self.rank}: {reason}")

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends, and why.

        Instead of ``error`` this raises an InputError of the same line with this rank's number; or a SystemExit, if
        another rank has said the line already; or a LostRankError, if torchrun interrupted because a rank was lost.
        """
        if isinstance(error, LostRankError | SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            if not self.terminated:
                self._announce(f"rank {self.rank} was interrupted")
            elif reason := self._gone(SILENT + 2 * BEAT):
                raise LostRankError(f"rank {self.rank}: {reason}") from None
            if self.rank:
                raise SystemExit(130) from None
            return
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        self._announce(f"rank {self.rank} stopped: {kind}{first_line(error)}")
        if kind:
            return
        said = f"said/{hashlib.blake2b(str(error).encode(), digest_size=8).hexdigest()}"
        with suppress(RuntimeError):  # the store is gone: the line is said
            if self._ask(lambda: self.store.add(said, 1)) > 1:
                raise SystemExit(2) from None
        raise InputError(f"rank {self.rank}: {error}") from None

    def leave(self) -> None:
        """End the heartbeats; the other ranks may go on without this one."""
        self._speaking.acquire()
        self._ended.set()
        with suppress(RuntimeError):  # the store is gone, and with it everyone who could be told
            self._ask(lambda: self.store.set(self._beats[self.rank], _LEFT))
        self.join(GRACE)  # Python must not end while a thread of it is in C++

    def _beat(self) -> str | None:
        """Write one heartbeat and read the others'; why the job cannot go on, or None."""
        self._count += 1
        self.store.set(self._beats[self.rank], str(self._count))
        now = time.monotonic()
        for other, beat in enumerate(self.store.multi_get(self._beats)):
            if beat != self._seen[other][0]:
                self._seen[other] = beat, now
        if silent := self._silent(self.timeout):
            self.store.compare_set("ended", "", f"{silent} was lost, without a sign for {self.timeout:.0f} s")
        return self._announced()

    def _announced(self) -> str | None:
        """The reason that the first rank to stop has left."""
        return self.store.get("ended").decode() if self.store.check(["ended"]) else None

    def _ask(self, use: Callable[[], T]) -> T:
        """Use the store; a RuntimeError if it does not answer, as where its machine was lost."""
        if not self._using.acquire(timeout=GRACE):
            raise RuntimeError(_NO_STORE)
        try:
            return use()
        finally:
            self._using.release()

    def _silent(self, seconds: float) -> str:
        """The ranks without a heartbeat for so long, in words; empty if there is none."""
        before = time.monotonic() - seconds
        seen = enumerate(self._seen)
        gone = (n for n, (beat, since) in seen if n != self.rank and beat != _LEFT and since < before)
        return " and ".join(f"rank {n}" for n in gone)

    def _gone(self, patience: float) -> str | None:
        """Why another rank is gone, if that becomes known within ``patience`` seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                if reason := self._ask(self._announced):
                    return reason
            except RuntimeError:
                return _NO_STORE
            if silent := self._silent(SILENT):
                return f"{silent} was lost; torchrun --max-restarts N would start all again"
            if time.monotonic() > end:
                return None
            time.sleep(BEAT / 5)

    def _announce(self, reason: str) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it everyone who could be told
            self._ask(lambda: self.store.compare_set("ended", "", reason))
