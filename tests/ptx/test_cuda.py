"""The CUDA kernels on the PTX machine: what nvcc makes of them, run by the tests of the compiled kernels."""

from __future__ import annotations

import pytest

from tests.ptx import build
from tests.ptx.running import GRID, NUMBERS, run_tests


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    try:
        with build.alone("machine"):
            build.machine()
        with build.alone("kernels"):
            build.kernels(build.native_library())
    except build.BuildError as reason:
        pytest.skip(str(reason))


def test_the_shared_grid(pytestconfig: pytest.Config) -> None:
    run_tests(pytestconfig, "native", GRID, "-k", f"native and {NUMBERS}", least=500)


def test_the_fused_kernel(pytestconfig: pytest.Config) -> None:
    """With the tensor cores' instruction and the asynchronous copies, and its gradients."""
    run_tests(pytestconfig, "native", "tests/kernels/test_depthwise_separable_fused.py", "-k", "not graph", least=20)


def test_shapes_across_tiles_chunks_and_vectors(pytestconfig: pytest.Config) -> None:
    cases = "40" if pytestconfig.getoption("long") else "6"
    run_tests(pytestconfig, "native", "tests/ptx/test_shapes.py", least=200, PTX_CASES=cases)


@pytest.mark.long
@pytest.mark.parametrize("order", ["descending", "random:1", "random:2"])
def test_no_thread_relies_on_going_first(order: str, pytestconfig: pytest.Config) -> None:
    """The machine finds a race in any order of the threads; here the numbers have to be right in several, too."""
    chosen = "native and second_order and not channels_last"
    run_tests(pytestconfig, "native", GRID, "-k", chosen, least=20, PTX_ORDER=order)


@pytest.mark.long
def test_cbam_beyond_the_grid(pytestconfig: pytest.Config) -> None:
    """Many channels, several tiles of a sample and several groups of samples, every norm, ties and third order."""
    # A test of a capability starts a process of its own, in which the machine's plugin is not.
    chosen = "not capability and not refuse and not threads and not layouts and not penalty"
    run_tests(pytestconfig, "native", "tests/kernels/test_cbam_native.py", "-k", chosen, least=10)


@pytest.mark.long
def test_random_cases(pytestconfig: pytest.Config) -> None:
    chosen = "test_values_and_gradients and native"
    run_tests(pytestconfig, "native", "tests/kernels/test_random.py", "-k", chosen, least=4, all_cases=False)
