"""A rank that is gone must not leave the others waiting, nor each of them guessing: one line on every rank says why.

Every rank has a thread that leaves a sign of life in the job's store, reads those of the others, and what the first
rank that stopped has said of itself. A collective that fails asks here which rank it was; a rank that waits in one that
does not even fail is ended from here.
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

BEAT = 0.5
"""Seconds between signs of life."""
SILENT = 2.5
"""Seconds without one after which a rank is what a failed collective had to do with."""
GRACE = 5.0
"""Seconds that the work has, to end by itself with its own line, before the thread ends the process."""

_LEFT = b"left"
_NO_STORE = "rank 0, or torchrun on its machine, was lost"

T = TypeVar("T")


class LostRankError(InputError):
    """Another rank stopped or was lost: this one cannot go on alone."""


class Watch(threading.Thread):
    """Signs of life of rank ``rank`` among ``world``, from now until :meth:`leave`.

    Args:
        store: the job's store (``torch.distributed.Store``), a connection for this object alone.
        rank, world: this rank, and how many there are.
        timeout: seconds without a sign after which a rank is given up.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        super().__init__(name="raccgan-watch", daemon=True)
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self._beats = [f"beat/{other}" for other in range(world)]
        self._seen: list[tuple[bytes, float]] = [(b"", time.monotonic())] * world
        """Of every rank, the last sign and when it was new."""
        self._ended = threading.Event()
        self._speaking = threading.Lock()
        self._using = threading.Lock()
        self._count = 0
        self.terminated = False
        """Whether torchrun asked this process to end: because a rank was lost, or because it is ended itself."""
        self.store.set(self._beats[rank], "0")
        self.store.wait(self._beats)
        self.start()

    def run(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                reason = self._ask(self._look)
            except RuntimeError:
                reason = _NO_STORE
            if reason is not None and not self._ended.wait(GRACE):
                with self._speaking:  # which the work takes as it ends
                    print(f"error: rank {self.rank}: {reason}", file=sys.stderr, flush=True)
                    os._exit(2)

    def lost(self, symptom: str) -> LostRankError:
        """The error to raise where a collective failed with ``symptom``; this rank's last word."""
        return LostRankError(f"rank {self.rank}: {self._reason(symptom)}")

    def report(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends, and why; a line that another has said already is not said again.

        Raises:
            InputError: instead of ``error``, with this rank's number.
            SystemExit: instead of ``error``, where it needs no words.
            LostRankError: instead of a KeyboardInterrupt, where torchrun sent that because a rank was lost.
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
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        line = (text.strip().splitlines() or [""])[0]
        self._announce(f"rank {self.rank} stopped: {line}")
        if isinstance(error, InputError):
            if not self._is_first_to(f"said/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"):
                raise SystemExit(2) from None
            raise InputError(f"rank {self.rank}: {text}") from None

    def leave(self) -> None:
        """No more signs: the others may go on without."""
        self._speaking.acquire()
        self._ended.set()
        with suppress(RuntimeError):  # no one is there to tell
            self._ask(lambda: self.store.set(self._beats[self.rank], _LEFT))
        self.join(GRACE)  # Python must not end while a thread of it is in C++

    def _look(self) -> str | None:
        """One sign of life; why the job cannot go on, or None."""
        self._count += 1
        self.store.set(self._beats[self.rank], str(self._count))
        now = time.monotonic()
        for other, beat in enumerate(self.store.multi_get(self._beats)):
            if beat != self._seen[other][0]:
                self._seen[other] = beat, now
        if silent := self._silent(self.timeout):
            self.store.compare_set("ended", "", f"{silent} was lost, without a sign for {self.timeout:.0f} s")
        return self._said()

    def _said(self) -> str | None:
        """What the first rank that ended has said, of itself or of another."""
        return self.store.get("ended").decode() if self.store.check(["ended"]) else None

    def _ask(self, use: Callable[[], T]) -> T:
        """Use the store, which a lost machine may have made silent.

        Raises:
            RuntimeError: it is not there.
        """
        if not self._using.acquire(timeout=GRACE):
            raise RuntimeError(_NO_STORE)
        try:
            return use()
        finally:
            self._using.release()

    def _silent(self, seconds: float) -> str:
        """The ranks without a sign for so long, in words; empty if there is none."""
        now = time.monotonic()
        gone = [
            f"rank {other}"
            for other, (beat, since) in enumerate(self._seen)
            if other != self.rank and beat != _LEFT and now - since > seconds
        ]
        return " and ".join(gone)

    def _gone(self, patience: float) -> str | None:
        """Why another rank is gone, if one is known to be within so many seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                if said := self._ask(self._said):
                    return said
            except RuntimeError:
                return _NO_STORE
            if silent := self._silent(SILENT):
                return f"{silent} was lost; torchrun --max-restarts N would start all again"
            if time.monotonic() > end:
                return None
            time.sleep(BEAT / 5)

    def _reason(self, symptom: str) -> str:
        reason = self._gone(SILENT + 2 * BEAT) or f"another rank does not answer: {symptom}"
        self._announce(reason)
        return reason

    def _announce(self, reason: str) -> None:
        with suppress(RuntimeError):  # no one is there to tell
            self._ask(lambda: self.store.compare_set("ended", "", reason))

    def _is_first_to(self, key: str) -> bool:
        try:
            return self._ask(lambda: bool(self.store.add(key, 1) == 1))
        except RuntimeError:
            return True
