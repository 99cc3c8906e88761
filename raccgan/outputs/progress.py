"""Progress of long work: a bar with the time left in a terminal, and a plain line every 15 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from raccgan.outputs.terminal import one_line, say

LINE_EVERY = 15.0  # seconds between plain lines


class Progress(AbstractContextManager["Progress"]):
    """A counter from ``start`` to ``total`` on standard error; ``update`` takes live figures to show beside it.

    Without ``lines`` a standard error that is no terminal gets none, for commands that scripts call. Where not
    ``shown`` it counts in silence, for all ranks of a job but the first.
    """

    def __init__(
        self, title: str, total: int, start: int = 0, unit: str = "step", *, lines: bool = True, shown: bool = True
    ) -> None:
        self.title, self.total, self.done, self.unit = title, total, start, unit
        self.lines = lines and shown
        self._bar: Any = None
        if sys.stderr.isatty() and shown:
            self._bar = tqdm(total=total, initial=start, desc=title, unit=unit, dynamic_ncols=True)
        self._begun = self._said = time.monotonic()
        self._begun_at = start

    def update(self, count: int = 1, figures: Mapping[str, float] | None = None) -> None:
        self.done += count
        text = "  ".join(f"{name} {value:.4g}" for name, value in (figures or {}).items())
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.lines and (now - self._said >= LINE_EVERY or self.done >= self.total):
            self._said = now
            left = (now - self._begun) / max(1, self.done - self._begun_at) * (self.total - self.done)
            line = f"{self.title}: {self.unit} {self.done} of {self.total}, {_clock(left)} left"
            print(f"{line}  {text}".rstrip(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line on standard error, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(one_line(line), file=sys.stderr)
        else:
            say(line)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
