"""What the build needs of the machine: ninja, a C++20 compiler, nvcc, a number of jobs, and a lock.

setup.py says what is compiled, and how; nothing here knows a source file. What a person can mend is a
:class:`CompileError` of one line.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools.errors import CompileError

SETUPTOOLS = 77  # the first release that reads ``license = "MIT"``
MEMORY_PER_JOB = 2**30  # bytes that one job may need, with room: g++ 12 and nvcc 13.0 were seen to take 0.3 GB
# Built for where no GPU is there to ask. Code for 8.0 runs on 8.6 and 8.9; others compile the PTX at first use.
GPU_ARCHITECTURES = "8.0 9.0"


def require_setuptools() -> None:
    """Say that setuptools is too old, before it calls pyproject.toml invalid. Raises SystemExit."""
    if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS:
        raise SystemExit(
            f"setuptools {SETUPTOOLS} or later is needed, this is {setuptools.__version__}: "
            f"pip install 'setuptools>={SETUPTOOLS}'"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; wait where another build holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build of this checkout, which holds {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def jobs(control_groups: Path = Path("/sys/fs/cgroup"), system: Path = Path("/proc")) -> int:
    """How many compilers run at once: ``MAX_JOBS``, else as many as processors, quota and memory allow."""
    if given := os.environ.get("MAX_JOBS"):
        if not given.isdecimal() or int(given) == 0:
            raise CompileError(f"MAX_JOBS={given}: a whole number of at least 1 is needed")
        return int(given)
    available = re.search(r"MemAvailable: *(\d+) kB", (system / "meminfo").read_text())
    processors = [float(len(os.sched_getaffinity(0)))]
    memory = [int(available[1]) * 1024] if available else [MEMORY_PER_JOB]
    group = re.search(r"^0::/(.*)$", (system / "self" / "cgroup").read_text(), re.MULTILINE)
    innermost = control_groups / (group[1] if group else "")
    for folder in (innermost, *innermost.parents):  # a limit binds all groups inside
        quota, limit = folder / "cpu.max", folder / "memory.max"
        if quota.is_file() and not (text := quota.read_text()).startswith("max"):
            processors.append(int(text.split()[0]) / int(text.split()[1]))
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            memory.append(int(text))
    return max(1, int(min(*processors, min(memory) / MEMORY_PER_JOB)))


def find_ninja() -> str:
    """The ninja of the environment that is built for, else the one on ``PATH``.

    Always the same one where there are several: a release that cannot read another's log compiles everything anew.
    """
    found = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise CompileError("ninja is needed to build: pip install ninja (or apt install ninja-build)")
    return found


def find_cxx() -> list[str]:
    """The command of a C++20 compiler: ``CXX``, else the first of the usual names that is one."""
    tried = []
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]:
        command = [*shlex.split(name), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        code = "#include <bit>\n#include <span>\nint main() {}\n"
        try:
            done = subprocess.run(command, input=code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            tried.append(f"{name}: {error.strerror}")
            continue
        if done.returncode == 0:
            return shlex.split(name)
        tried.append(f"{name}: {next((line for line in done.stdout.splitlines() if 'error' in line), 'it fails')}")
    raise CompileError(f"a C++20 compiler is needed: apt install g++ (tried {'; '.join(tried)})")


def find_nvcc(packages: Iterable[str]) -> str | None:
    """The CUDA compiler, or None.

    Looked for in ``CUDA_HOME`` and ``CUDA_PATH``, on ``PATH``, in /usr/local/cuda, and last in the folders ``packages``
    of Python packages: ``pip install nvidia-cuda-nvcc`` and its like put theirs into nvidia/ there.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    places += [str(found) for path in packages for found in sorted(Path(path).glob("nvidia/*/bin"), reverse=True)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def said_by(command: list[str]) -> str:
    """What a command prints, errors included."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def gpu_architectures(known: str) -> list[str]:
    """The GPU architectures to compile for, the oldest first, such as ``["80", "90"]``.

    ``TORCH_CUDA_ARCH_LIST`` names them; else those of the GPUs that are there; else GPU_ARCHITECTURES. ``known`` is
    what ``nvcc --list-gpu-arch`` prints: what this nvcc does not know, and what is older than 8.0, is left out.
    """

    def served(text: str) -> list[str]:
        numbers = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", text)})
        return [str(one) for one in numbers if one >= 80 and f"compute_{one}" in known.split()]

    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return served(named)
    ask = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    here = served(said_by(ask)) if shutil.which("nvidia-smi") else []
    return here or served(GPU_ARCHITECTURES)


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler, and what of it ends up in the library."""

    nvcc: str
    version: str
    architectures: list[str]
    library_dirs: list[str]

    @classmethod
    def find(cls) -> Toolkit | None:
        """The toolkit to build with, or None where there is none or it is not wanted."""
        wanted, nvcc = os.environ.get("RACCGAN_CUDA"), find_nvcc(sys.path)
        if wanted == "0" or (nvcc is None and wanted != "1"):
            return None
        if nvcc is None:
            raise CompileError("RACCGAN_CUDA=1, but there is no nvcc: set CUDA_HOME to the CUDA toolkit's folder")
        return cls.of(nvcc)

    @classmethod
    def of(cls, nvcc: str) -> Toolkit:
        version = re.search(r"release ([\d.]+)", said_by([nvcc, "--version"]))
        # Where nvcc itself looks for its libraries: the nvcc on PATH may be a link or a wrapper script.
        steps = said_by([nvcc, "--dryrun", "-c", "any.cu"])
        top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
        if version is None or top is None:
            raise CompileError(f"{nvcc} does not answer as nvcc does; RACCGAN_CUDA=0 leaves the CUDA part out")
        architectures = gpu_architectures(said_by([nvcc, "--list-gpu-arch"]))
        if not architectures:
            raise CompileError(f"{nvcc} knows no GPU that is wanted here; RACCGAN_CUDA=0 leaves the CUDA part out")
        library_dirs = [*re.findall(r'"-L([^"]+)"', steps), f"{top[1]}/lib64", f"{top[1]}/lib"]
        return cls(nvcc, version[1], architectures, library_dirs)

    def code(self) -> str:
        """The option that names the architectures.

        The kernels use nothing that is newer than 8.0, so one PTX, of the oldest, serves all: it is translated to each
        architecture's machine code here, and by the driver of a GPU that is not among them.
        """
        oldest = self.architectures[0]
        codes = [*(f"sm_{one}" for one in self.architectures), f"compute_{oldest}"]
        return f"-gencode=arch=compute_{oldest},code=[{','.join(codes)}]"
