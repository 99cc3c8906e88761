"""The Triton kernels on the PTX machine: what Triton compiles for a GPU, run by the tests of the Triton kernels."""

from __future__ import annotations

import pytest

from raccgan.kernels import triton_runtime
from tests.ptx import build
from tests.ptx.running import GRID, NUMBERS, run_tests

pytestmark = pytest.mark.skipif(triton_runtime.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    try:
        with build.alone("machine"):
            build.machine()
    except build.BuildError as reason:
        pytest.skip(str(reason))


def test_the_shared_grid(pytestconfig: pytest.Config) -> None:
    run_tests(pytestconfig, "triton", GRID, "-k", f"triton and {NUMBERS}", least=100)


@pytest.mark.long
def test_how_the_ops_are_registered(pytestconfig: pytest.Config) -> None:
    run_tests(pytestconfig, "triton", GRID, "-k", f"triton and not ({NUMBERS})", least=10, all_cases=False)


@pytest.mark.long
def test_beyond_the_grid(pytestconfig: pytest.Config) -> None:
    files = ["test_cbam_triton.py", "test_depthwise_separable_triton.py", "test_depthwise_separable_triton_op.py"]
    files.append("test_triton.py::test_a_score_does_not_depend_on_the_batch_or_on_the_map")
    run_tests(pytestconfig, "triton", *(f"tests/kernels/{file}" for file in files), least=50, all_cases=False)


@pytest.mark.long
def test_shapes_across_tiles_and_vectors(pytestconfig: pytest.Config) -> None:
    run_tests(pytestconfig, "triton", "tests/ptx/test_shapes.py", least=150)


@pytest.mark.long
def test_random_cases(pytestconfig: pytest.Config) -> None:
    chosen = "test_values_and_gradients and triton"
    run_tests(pytestconfig, "triton", "tests/kernels/test_random.py", "-k", chosen, least=4, all_cases=False)
