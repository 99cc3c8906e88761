"""Freed memory that stays with a command's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROUNDS = 10
MEGABYTES = 64  # more than glibc ever keeps by itself
FAULTS = f"""
import resource, sys
from raccgan.cli import memory
kept = memory.keep_freed() if "keep" in sys.argv else False
def use():
    bytearray({MEGABYTES << 20})[::4096]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str, **environment: str) -> tuple[bool, int]:
    """Whether freed memory is kept, and the pages that the system handed out for memory that had been freed."""
    said = subprocess.check_output(
        [sys.executable, "-c", FAULTS, *arguments], env={**os.environ, **environment}, text=True
    )
    kept, count = map(int, said.split())
    return bool(kept), count


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)


def test_what_was_freed_is_used_again() -> None:
    kept, count = faults("keep")
    if not kept:
        pytest.skip("the C library here is not glibc, whose memory is left alone")
    pages = ROUNDS * MEGABYTES << 20 >> 12
    assert count < pages / 10
    assert faults()[1] > pages / 2, "the system's own way costs what it is said to cost"


def test_the_environment_has_the_last_word() -> None:
    assert not faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0]
