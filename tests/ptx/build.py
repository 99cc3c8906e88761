"""Builds the machine, and the CUDA kernels on top of it, into ``build/ptx``: ``python -m tests.ptx.build`` does both.

A file there is named by the digest of all that it was made of, so nothing is built twice and nothing is stale. One
process builds at a time; the others wait for it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE, INCLUDE, CSRC = HERE / "src", HERE / "include", ROOT / "csrc"
FOLDER = Path(os.environ.get("PTX_BUILD", ROOT / "build" / "ptx")).resolve()

CXX = ["-std=c++20", "-fPIC", "-w"]
# Signed numbers wrap, and nothing fuses a multiplication and an addition of its own accord.
MACHINE = ["-O3", "-march=native", "-fwrapv", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
           "-fno-strict-aliasing"]  # fmt: skip
# What a binding's sources see first is the tests' own <bindings/on_device.h>, by which it serves CPU tensors.
BINDING = ["-O1", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DRACCGAN_CUDA="PTX"',
           f"-I{INCLUDE}", f"-I{CSRC}"]  # fmt: skip
NVCC = ["-std=c++17", "-O3", "-lineinfo", "-gencode=arch=compute_80,code=compute_80", "-no-compress", "-cudart", "none",
        "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{CSRC}"]  # fmt: skip


def native_library() -> Path:
    """The package's own compiled library, without importing the package."""
    found = sorted((ROOT / "raccgan").glob("_native*.so"))
    if not found:
        raise BuildError("raccgan's own library is not compiled: the CUDA kernels need its operations")
    return found[0]


class BuildError(RuntimeError):
    """Why there is no machine here, or no CUDA kernels for it: one line."""


def compiler() -> str:
    """The C++ compiler."""
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None or sys.platform != "linux":
        raise BuildError("no C++ compiler here: the PTX machine cannot be built")
    return found


def nvcc() -> str:
    """The CUDA compiler, which makes PTX; neither its assembler nor a GPU is needed."""
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if found is None or not Path(found).exists():
        raise BuildError("no nvcc on PATH and no CUDA_HOME: the CUDA kernels cannot be compiled to PTX")
    return found


@functools.cache
def machine() -> Path:
    """The folder of libptx.so, and libtensors.so, by which the machine knows PyTorch's CPU tensors."""
    sources = [SOURCE / f"{name}.cpp" for name in ("parse", "operations", "machine", "ptx")]

    def make(folder: Path) -> None:
        objects = in_parallel([functools.partial(_object, s, [compiler(), *CXX, *MACHINE]) for s in sources])
        _run(compiler(), "-shared", *objects, "-o", folder / "libptx.so")
        _run(compiler(), *CXX, "-O1", "-shared", *_torch_includes(), SOURCE / "tensors.cpp", "-o",
             folder / "libtensors.so", f"-L{folder}", "-lptx", "-Wl,-rpath,$ORIGIN", *_torch_libraries())  # fmt: skip

    return _made("machine", [*sources, SOURCE / "tensors.cpp"], [*MACHINE, _processor(), _torch_version()], make)


@functools.cache
def kernels(library: Path) -> Path:
    """A library in which the CUDA kernels serve CPU tensors, on top of the package's own, ``library``.

    The ``.cu`` files are compiled by nvcc as for a GPU, to PTX alone; the bindings as they are.
    """
    ptx = machine()
    cuda = [nvcc(), *NVCC]
    binding = [compiler(), *CXX, *BINDING, *_torch_includes()]
    runtime = [nvcc(), "-std=c++17", "-O1", "-Xcompiler", "-fPIC"]  # which knows where CUDA's headers are
    jobs = [functools.partial(_object, source, cuda) for source in sorted(CSRC.rglob("*.cu"))]
    bindings = sorted((CSRC / "bindings").rglob("*_cuda.cpp"))
    jobs += [functools.partial(_object, source, binding) for source in bindings]
    jobs.append(functools.partial(_object, SOURCE / "cudart.cpp", runtime))
    objects = in_parallel(jobs)

    def link(folder: Path) -> None:
        # -Bsymbolic: a PyTorch for CUDA has loaded the real runtime, whose functions have the same names.
        _run(compiler(), "-shared", "-Wl,-Bsymbolic", *objects, "-Wl,--no-as-needed", library, f"-L{ptx}", "-lptx",
             f"-Wl,-rpath,{ptx}", *_torch_libraries(), "-o", folder / "_native_ptx.so")  # fmt: skip

    return _made("kernels", [library, *objects], [str(ptx), str(library)], link) / "_native_ptx.so"


def in_parallel(jobs: Sequence[Callable[[], Path]]) -> list[Path]:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda job: job(), jobs))


def _object(source: Path, command: list[str]) -> Path:
    def make(folder: Path) -> None:
        _run(*command, "-c", source, "-o", folder / "made.o")

    read = [source, *sorted(_headers(source, frozenset()))]
    return _made(f"{source.stem}-o", read, [*command, _version(command[0])], make) / "made.o"


def _headers(source: Path, known: frozenset[Path]) -> frozenset[Path]:
    """Every header of this repository that a source can reach."""
    for quoted, bracketed in re.findall(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', source.read_text(), re.MULTILINE):
        folders = [source.parent] if quoted else []
        for folder in [*folders, INCLUDE, CSRC, CSRC / "bindings", SOURCE]:
            header = (folder / (quoted or bracketed)).resolve()
            if header.is_file() and header not in known:
                known = _headers(header, known | {header})
    return known


def _made(name: str, files: Sequence[Path], settings: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder that ``make`` fills, named by the digest of what it is made of; made unless it is there."""
    digest = hashlib.sha256("\0".join(map(str, settings)).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = FOLDER / f"{name}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        begun = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        make(begun)
        begun.rename(folder)
    return folder


@contextmanager
def alone() -> Iterator[None]:
    """No other process builds meanwhile."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"[-8000:])


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def _processor() -> str:
    """What -march=native may use."""
    return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")


def _torch_version() -> str:
    import torch

    return str(torch.__version__)


def _torch_includes() -> list[str]:
    from torch.utils import cpp_extension

    return [f"-I{path}" for path in cpp_extension.include_paths()]


def _torch_libraries() -> list[str]:
    from torch.utils import cpp_extension

    return [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]


def main() -> int:
    with alone():
        try:
            print(machine())
            print(kernels(native_library()))
        except BuildError as reason:
            print(reason, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
