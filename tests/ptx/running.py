"""Starts pytest in a process of its own in which the plugin has put the PTX machine in the GPU's place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GRID = "tests/kernels/test_grid.py"
NUMBERS = "not opcheck and not graph and not gradgradcheck"
"""Leaves out what an op's registration decides: the CPU's tests hold the CUDA kernels' registration, too."""


def run_tests(
    config: pytest.Config, backend: str, *files: str, least: int, all_cases: bool = True, **environment: str
) -> str:
    """Run tests on the machine, at least so many of which must pass and none fail; what pytest said.

    Args:
        files: and options, as for pytest.
        all_cases: the process runs tests marked long, and random cases in full, where this one does.
        environment: PTX_ORDER and the like (src/ptx.h).
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "tests.ptx.plugin", *files]
    command += ["--long"] if all_cases and config.getoption("long") else []
    command += [f"--hypothesis-seed={config.getoption('hypothesis_seed')}"]
    there = {**os.environ, "PTX_BACKEND": backend, **environment}
    for name in [name for name in there if name.startswith("PYTEST_")]:
        del there[name]  # of the process that this one is a test of
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= least, f"{passed[0]}, of {least} at least"
    assert int(re.search(r"PTX: (\d+) launches", done.stdout)[1]) > 0, "nothing ran on the machine"  # type: ignore[index]
    return done.stdout
