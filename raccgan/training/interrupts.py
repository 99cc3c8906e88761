"""Handles Ctrl-C and SIGTERM in the middle of a training step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the checkpoint written; the message says how to go on."""


@contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between steps; the second interrupts at once.

    Outside of the main thread, where Python sets no signal handlers, the flag stays False.
    """
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
