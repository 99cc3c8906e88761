"""A build of the library in which the CUDA kernels serve CPU tensors, emulated (csrc/cuda/emulation.h).

The ``.cu`` sources and their bindings are compiled by the C++ compiler and linked to the library that is there; when
loaded, they take the place of its CPU kernels. ``RACCGAN_LIBRARY`` names the result to a process, and every test of the
compiled kernels then holds the CUDA kernels to the same. As a pytest plugin, this module lets float16 in too, which
the CPU kernels do not take, and keeps out the kernel that only a CPU has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from raccgan.kernels import dispatch, library
from raccgan.kernels.cbam import native

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "bindings").glob("*_cuda.cpp"))]
FLAGS = ["-std=c++20", "-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden"]
DEFINES = ["-DRACCGAN_EMULATION", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def build(compiler: str, folder: Path) -> Path:
    """Compile the emulated library with ``compiler`` into ``folder``."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]

    def compiled(source: Path) -> str:
        made = str(folder / f"{source.name}.o")
        command = [compiler, *FLAGS, *DEFINES, *includes, "-x", "c++", "-c", str(source), "-o", made]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    file = folder / "_native_emulated.so"
    torch_libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    command = [compiler, "-shared", *objects, "-Wl,--no-as-needed", str(library.path()), *torch_libraries]
    subprocess.run([*command, "-o", str(file)], check=True)
    return file


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler here")
    if library.path() is None:
        pytest.skip(str(library.why_not()))
    return build(compiler, tmp_path_factory.mktemp("emulated"))


def pytest_configure() -> None:
    """Loaded with ``-p`` into a process that runs the emulated kernels."""
    if "emulated" in os.environ.get("RACCGAN_LIBRARY", ""):
        dispatch.COMPILED_DTYPES["cpu"] = (*dispatch.COMPILED_DTYPES["cpu"], torch.float16)
        native._of_a_penalty = lambda *_, **__: False
