"""The CUDA kernels run on the CPU, by the tests of the compiled kernels: indices and barriers without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.emulation import ROOT, emulated

__all__ = ["emulated"]

# What the operations' registration alone decides is tested once, for the CPU.
_REGISTRATION = "opcheck or compiles_in_one_graph or gradgradcheck"


def run_tests(library: Path, file: str, chosen: str, **variables: str) -> int:
    """Run tests of tests/kernels in a process that takes the emulated kernels for the CPU's; how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.kernels.emulation", f"tests/kernels/{file}"]
    environment = {**os.environ, "RACCGAN_LIBRARY": str(library), **variables}
    done = subprocess.run(
        [*command, "-k", chosen], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert "skipped" not in done.stdout, done.stdout
    return int(passed[1])


@pytest.mark.parametrize("family", ["depthwise_separable", "moments", "cbam"])
def test_the_shared_grid(emulated: Path, family: str) -> None:
    assert run_tests(emulated, "test_grid.py", f"{family} and native and not ({_REGISTRATION})") > 50


def test_the_fused_kernel(emulated: Path) -> None:
    """With the tensor cores' instruction and the asynchronous copies in the GPU's layout, and their gradients."""
    assert run_tests(emulated, "test_depthwise_separable_fused.py", "not graph") > 25


def test_no_thread_of_the_fused_kernel_relies_on_going_first(emulated: Path) -> None:
    chosen = "test_shapes and float32"
    assert run_tests(emulated, "test_depthwise_separable_fused.py", chosen, RACCGAN_EMULATION_BACKWARDS="1") == 6


def test_no_thread_relies_on_going_first(emulated: Path) -> None:
    """What a barrier is missing for is wrong in one order of the threads or in the other."""
    chosen = "native and second_order and not channels_last and not anomaly_score"
    assert run_tests(emulated, "test_grid.py", chosen, RACCGAN_EMULATION_BACKWARDS="1") > 20


@pytest.fixture
def long_run(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("long"):
        pytest.skip("emulated, a minute and more: --long runs it")


@pytest.mark.usefixtures("long_run")
def test_depthwise_beyond_the_grid(emulated: Path) -> None:
    """Kernel sizes, resizings and norms at shapes of several tiles and chunks of channels, through the penalty."""
    file = "test_depthwise_separable_native.py"
    assert run_tests(emulated, file, "not avx and not refuse and not threads and not one_call") > 20


@pytest.mark.usefixtures("long_run")
def test_cbam_beyond_the_grid(emulated: Path) -> None:
    """Many channels, several pieces of a sample and several groups of samples, every norm, ties and third order."""
    chosen = "not avx and not refuse and not threads and not layouts and not penalty"
    assert run_tests(emulated, "test_cbam_native.py", chosen) > 10
