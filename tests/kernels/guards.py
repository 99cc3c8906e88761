"""Guard bytes around every CPU tensor: guards.cpp, compiled and put in the place of PyTorch's allocator for a while."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

_SOURCE = Path(__file__).with_name("guards.cpp")


class Guards:
    """``with guards.around():`` gives guards to every tensor that is made inside; what they saw stays till the next."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("guards_broken", "guards_allocations"):
            getattr(self._library, name).restype = ctypes.c_long

    @contextmanager
    def around(self) -> Iterator[None]:
        self._library.guards_begin()
        try:
            yield
        finally:
            self._library.guards_end()

    @property
    def broken(self) -> int:
        """Tensors whose guards were written to."""
        return int(self._library.guards_broken())

    @property
    def allocations(self) -> int:
        return int(self._library.guards_allocations())


def compiled(folder: Path) -> Guards:
    """Compile the allocator into ``folder``; skips the test that asks where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler here to build the guarding allocator with")
    torch_folder = Path(torch.__file__).parent
    library = folder / "guards.so"
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(_SOURCE), "-o", str(library),
        f"-L{torch_folder / 'lib'}", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return Guards(library)
