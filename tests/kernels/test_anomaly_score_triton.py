"""The anomaly score's Triton kernels, compiled for a GPU that is not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from raccgan.kernels import triton_runtime

ROOT = Path(__file__).parents[2]

# The op returns the feature term without features too, as zeros: gradients then come for all three outputs.
COMPILED = """
from tests.kernels.ahead import compile_one
from tests.kernels.shipped import compilations
found = [
    c for c in compilations("anomaly_score")
    if c.kernel.__name__ == "find_gradients" and "f" in c.constants and "grad_feature" in c.signature
]
assert found, "no such compilation"
print(compile_one("anomaly_score", found[0], 80, "multiples of 16"))
"""


@pytest.mark.skipif(triton_runtime.triton is None, reason="Triton is not installed")
def test_gradients_without_features_compile_where_all_outputs_have_gradients() -> None:
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "find_gradients" in done.stdout
