"""Tests of what the compiled kernels do with less of the processor than there is: in a process of its own each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raccgan.kernels import library

CAPABILITIES = ("portable", "avx2", "avx512", "avx512bf16")

_BUILD = library.build()
_BEST = _BUILD["cpu_capability"] if _BUILD else "portable"
FEW_CAPABILITIES = [pytest.param(one, marks=() if one == _BEST else pytest.mark.long) for one in CAPABILITIES]
"""For tests that take long: the short run takes the best that this processor has. All give the same bits, which
tests/test_library.py holds."""

_ROOT = Path(__file__).parent.parent.parent


def said_under(capability: str, code: str) -> str:
    """What ``code`` prints where the CPU kernels may use ``capability`` at best.

    It runs in the repository's root, so that it may import ``tests``. An exception in it is an error here; the test
    that asks is skipped where the library has not that capability, or this processor does not run it.
    """
    build = library.build()
    assert build is not None
    if capability not in build["cpu_targets"]:
        pytest.skip(f"{capability} is not compiled for this processor family")
    ask = "from raccgan.kernels import library; print(library.build()['cpu_capability'])"
    environment = {**os.environ, "RACCGAN_CPU_CAPABILITY": capability}
    printed = subprocess.check_output([sys.executable, "-c", f"{ask}\n{code}"], env=environment, cwd=_ROOT, text=True)
    used, said = printed.split("\n", 1)
    if used != capability:
        pytest.skip(f"this processor does not run {capability}")
    return said
