"""nvcc compiles every instantiation of the CUDA kernels without a warning, and none of them spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").rglob("*.cu"))
CODES = ("arch=compute_80,code=[sm_80,sm_90,compute_80]",)
SHARED_LIMIT = 48 * 1024  # bytes a block has without asking for more
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]


class Kernel(NamedTuple):
    """What the assembler says of one instantiation on one architecture."""

    name: str
    architecture: str
    spilled: int  # bytes, of loads and stores
    registers: int  # a thread
    shared: int  # bytes a block


def kernels(said: str) -> list[Kernel]:
    """Read ``ptxas -v``."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*\n.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(?:.*?(\d+) bytes smem)?",
        said,
    )
    assert len(found) == said.count("Compiling entry function")
    names = demangled([name for name, *_ in found])
    return [
        Kernel(name, architecture, int(stores) + int(loads), int(registers), int(shared or 0))
        for name, (_, architecture, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


def demangled(names: list[str]) -> list[str]:
    filter_ = shutil.which("c++filt")
    if filter_ is None:
        return names
    said = subprocess.run([filter_, "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"raccgan::cuda::|\(anonymous namespace\)::", "", line) for line in said.splitlines()]


def test_what_the_assembler_says_is_read() -> None:
    said = (
        "ptxas info    : Compiling entry function '_Z1fPf' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1fPf\n"
        "    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 488 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1gPf\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 6 registers, used 0 barriers\n"
    )
    first, second = kernels(said)
    assert first[1:] == ("sm_80", 24, 32, 1024)
    assert second[1:] == ("sm_90", 0, 6, 0)


def compiled_by_the_build(source: Path, setup_py: dict[str, Any]) -> Path | None:
    """The object of the last build in this checkout; None if ninja would compile the source again."""
    folder = CSRC.parent / "build" / "native"
    found = folder / source.relative_to(CSRC).with_suffix(".o")
    if not found.is_file():
        return None
    command = [setup_py["find_ninja"](), "-n", "-f", "build/native/build.ninja", str(found.relative_to(CSRC.parent))]
    said = subprocess.run(command, cwd=CSRC.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return found if "no work to do" in said else None


def said_now(source: Path, folder: Path) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    codes = [f"-gencode={code}" for code in CODES]
    command = [nvcc, *FLAGS, f"-I{CSRC}", *codes, "-c", str(source), "-o", str(folder / "kernels.o")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_warning_and_no_spill(source: Path, tmp_path: Path, setup_py: dict[str, Any]) -> None:
    compiled = compiled_by_the_build(source, setup_py)
    said = Path(f"{compiled}.txt").read_text() if compiled else said_now(source, tmp_path)
    assert not re.search(r"\b(warning|error)\b", said), said[-4000:]
    found = kernels(said)
    assert {kernel.architecture for kernel in found} == {"sm_80", "sm_90"}
    print(f"\n{'registers':>9} {'shared':>7}")
    for kernel in sorted(found):
        print(f"{kernel.registers:9} {kernel.shared:7} {kernel.architecture:6} {kernel.name}")
    spilling = [kernel for kernel in found if kernel.spilled > 0]
    assert not spilling, spilling
    assert max(kernel.shared for kernel in found) <= SHARED_LIMIT
