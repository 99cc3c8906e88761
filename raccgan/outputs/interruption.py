"""Ctrl-C and SIGTERM in the middle of work that has to come to a good end first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between steps; the second interrupts at once."""
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # outside of the main thread Python sets no handlers, and the flag stays False
                previous[number] = signal.signal(number, handler)
        yield lambda: asked
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
