"""The GPU's kernels under NVIDIA's compute-sanitizer, on the shared grid's small shapes: memory, races, barriers, and
what is read before it was written. The tests of results cannot see those: a race may give right numbers.

The PTX machine (tests/ptx) finds the same where there is no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 86  # the exit status that says so

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@triton.jit
def write_at(values, place):  # type: ignore[no-untyped-def]
    triton.language.store(values + place, 1.0)


def run_wild() -> None:
    """Write one number behind the end of a tensor."""
    values = torch.zeros(128, device="cuda")
    write_at[(1,)](values, values.numel())
    torch.cuda.synchronize()


def sanitized(tool: str, call: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run Python code under one of the tools; skip where it does not run on this machine."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        pytest.skip("there is no compute-sanitizer here; it comes with the CUDA toolkit")
    command = [program, f"--tool={tool}", f"--error-exitcode={FOUND}", *options, sys.executable, "-c", call]
    # Each tensor is an allocation of its own, so that its end is one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device")
    return done


def test_a_write_behind_a_tensor_is_caught() -> None:
    """What the next tests rest on."""
    done = sanitized("memcheck", "import tests.kernels.test_compute_sanitizer as t; t.run_wild()")
    assert done.returncode == FOUND, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Invalid __global__ write" in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_cuda_kernels_are_clean(tool: str) -> None:
    # Ours alone: the libraries' kernels take far longer, and are not ours to mend.
    clean(sanitized(tool, grid("native"), "--kernel-regex", "kns=raccgan"))


@pytest.mark.parametrize("tool", ["memcheck"])
def test_the_triton_kernels_are_clean(tool: str) -> None:
    clean(sanitized(tool, grid("triton")))


def grid(kernels: str) -> str:
    return f"import tests.test_sanitizers as t; t.run_grid({kernels!r}, 'cuda')"


def clean(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    said = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    assert said["runs"]
    assert all(count > 0 for count in said["runs"].values()), said
