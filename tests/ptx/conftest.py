"""Fixtures of the machine's own tests.

test_shapes.py is for a process in which the plugin is loaded: test_cuda.py and test_triton.py start it.
"""

import os

import pytest

from tests.ptx import build, machine

collect_ignore = [] if "PTX_BACKEND" in os.environ else ["test_shapes.py"]


@pytest.fixture(scope="session")
def built():
    try:
        with build.alone("machine"):
            build.machine()
    except build.BuildError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def fresh(built):
    """The machine, with its settings and findings as at the start."""
    machine.settings()
    machine.findings()
