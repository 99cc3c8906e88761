"""Builds the compiled half of raccgan: one library, csrc/ -> raccgan/_native.abi3.so. The rest is in pyproject.toml.

The library keeps to LibTorch's stable ABI and uses no Python API at all, so one build serves every Python and every
PyTorch from 2.11 on, with CUDA or without. The CPU kernels are compiled once a target below, and the processor decides
at run time. The CUDA kernels are compiled by nvcc where there is one. A second build compiles what has changed since;
``build_ext --force`` compiles everything, and keeps nothing.

Environment:
    RACCGAN_CUDA    1: fail without nvcc; 0: leave the CUDA part out; unset: build it if there is an nvcc.
    CUDA_HOME       the toolkit to use; otherwise the nvcc on PATH, then the one in /usr/local/cuda.
    CXX, CXXFLAGS, NVCC_APPEND_FLAGS    as usual.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMMON = [*sorted(str(path) for path in Path("csrc/bindings").glob("*.cpp")), "csrc/cpu/targets.cpp"]
CPU_KERNELS = sorted({str(path) for path in Path("csrc/cpu").glob("*.cpp")} - set(COMMON))
CUDA_KERNELS = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(Path("csrc").rglob("*.h"))

X86 = platform.machine() in ("x86_64", "AMD64")
CPU_TARGETS: dict[str, list[str]] = {"portable": []}
if X86:  # the same names in csrc/cpu/targets.h
    CPU_TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_TARGETS["avx512"] = [*CPU_TARGETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    CPU_TARGETS["avx512bf16"] = [*CPU_TARGETS["avx512"], "-mavx512bf16"]

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-Icsrc", *(["-DRACCGAN_X86"] if X86 else [])]
COMMON_FLAGS = [*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11, the oldest in pyproject.toml
# Every target gives the same bits only if none fuses a multiplication and an addition of its own accord. Two warnings
# do not apply: no vector passes between functions of different targets (psabi), and GCC 12 finds its own AVX-512
# header uninitialised.
KERNEL_FLAGS = [*CXX_FLAGS, "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

GPU_ARCHITECTURES = ("80", "90a")  # code for 8.0 runs on 8.6 and 8.9; each more takes a minute or two to compile
PTX_ARCHITECTURE = "90"  # for GPUs that came later: their driver compiles it at first use
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--threads", "2"]

OBJECTS = Path("build/objects")
"""Compiled sources, each in a folder named by the digest of all that it was made of."""
UNUSED_DAYS = 7
"""A folder there that no build has used for so long is removed."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler, and what of it ends up in the library."""

    nvcc: str
    version: str
    architectures: list[str]
    library_dirs: list[str]

    @classmethod
    def find(cls) -> Toolkit | None:
        """The toolkit to build with, or None where there is none or it is not wanted."""
        wanted = os.environ.get("RACCGAN_CUDA")
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
        places = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
        if wanted == "0" or (nvcc is None and wanted != "1"):
            return None
        if nvcc is None:
            raise CompileError("RACCGAN_CUDA=1, but there is no nvcc: set CUDA_HOME to the CUDA toolkit's folder")
        return cls.of(nvcc)

    @classmethod
    def of(cls, nvcc: str) -> Toolkit:
        def ask(*args: str) -> str:
            return subprocess.run([nvcc, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

        version = re.search(r"release ([\d.]+)", ask("--version"))
        # Where nvcc itself looks for its libraries: the nvcc on PATH may be a link or a wrapper script.
        steps = ask("--dryrun", "-c", CUDA_KERNELS[0])
        top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
        if version is None or top is None:
            raise CompileError(f"{nvcc} does not answer as nvcc does; RACCGAN_CUDA=0 leaves the CUDA part out")
        known = ask("--list-gpu-arch").split()
        architectures = [a for a in GPU_ARCHITECTURES if f"compute_{a.rstrip('a')}" in known]
        library_dirs = [*re.findall(r'"-L([^"]+)"', steps), f"{top[1]}/lib64", f"{top[1]}/lib"]
        return cls(nvcc, version[1], architectures, library_dirs)

    def command(self) -> list[str]:
        """Compile for every architecture; sources and output are to be added."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        if PTX_ARCHITECTURE in {a.rstrip("a") for a in self.architectures}:
            codes.append(f"-gencode=arch=compute_{PTX_ARCHITECTURE},code=compute_{PTX_ARCHITECTURE}")
        return [self.nvcc, *NVCC_FLAGS, *codes, "-c"]

    def compile(self, source: str, folder: Path) -> None:
        """The object, and beside it what nvcc says of registers and spills: a test reads that instead of compiling."""
        command = [*self.command(), source, "-o", str(folder / Path(source).with_suffix(".o").name)]
        print(*command, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout, flush=True)
            raise CompileError(f"nvcc could not compile {source}; RACCGAN_CUDA=0 leaves the CUDA part out")
        (folder / "said.txt").write_text(f"{contents(source)}\n{done.stdout}")


def contents(source: str) -> str:
    """A digest of a source with all headers."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in (Path(source), *HEADERS))).hexdigest()


def kept(objects: Path, source: str, made_with: Sequence[str], compile: Callable[[Path], None]) -> list[str]:
    """What ``compile`` puts into a folder, or what an earlier build made of the same and left in ``objects``.

    All kernels take minutes to compile; whoever installs once more with the tests' packages, or changes one kernel,
    does not wait for the others.
    """
    made_of = "\0".join([source, contents(source), *made_with])
    folder = objects / hashlib.sha256(made_of.encode()).hexdigest()[:32]
    if not folder.exists():
        objects.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(dir=objects))  # so that what was stopped half way has another name
        compile(part)
        part.rename(folder)
    os.utime(folder)
    return [str(path) for path in sorted(folder.rglob("*.o"))]


def tidy() -> None:
    """Remove objects that nothing has used for long."""
    for folder in OBJECTS.glob("*"):
        if time.time() - folder.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def version_of(compiler: str) -> str:
    """What a compiler says of itself; an update makes every object anew."""
    return subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


class BuildNative(build_ext):
    """Compiles each source as its kind wants it, and links all of them into one library."""

    def run(self) -> None:
        if find_spec("torch") is None:
            self.warn("leaving out the compiled library: PyTorch is not installed where this build runs")
            self.extensions: list[Extension] = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        folder = OBJECTS
        if self.force:
            folder = Path(self.build_temp) / "objects"
            shutil.rmtree(folder, ignore_errors=True)
        toolkit = Toolkit.find()
        cuda_flags: list[str] = []
        if toolkit:
            codes = ", ".join(toolkit.architectures)
            cuda_flags = [f'-DRACCGAN_CUDA="{toolkit.version}"', f'-DRACCGAN_CUDA_ARCHITECTURES="{codes}"']
        else:
            self.warn("leaving out the CUDA part: no nvcc found, or RACCGAN_CUDA=0")

        compilers = [getattr(self.compiler, name, []) for name in ("compiler_so", "compiler_so_cxx")]
        versions = [version_of(compiler[0]) for compiler in compilers if compiler]

        def nvcc(source: str) -> list[str]:
            assert toolkit is not None
            made_with = [*toolkit.command(), toolkit.version, os.environ.get("NVCC_APPEND_FLAGS", ""), *versions]
            return kept(folder, source, made_with, lambda part: toolkit.compile(source, part))

        def cxx(source: str, flags: list[str]) -> list[str]:
            def compile(part: Path) -> None:
                include_dirs = cpp_extension.include_paths()
                self.compiler.compile([source], str(part), include_dirs=include_dirs, extra_postargs=flags)

            return kept(folder, source, [str(compilers), *versions, torch.__version__, *flags], compile)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(nvcc, source) for source in CUDA_KERNELS if toolkit]
            jobs += [pool.submit(cxx, source, COMMON_FLAGS + cuda_flags) for source in COMMON]
            for target, flags in CPU_TARGETS.items():
                target_flags = [*KERNEL_FLAGS, *flags, f"-DRACCGAN_TARGET={target}"]
                jobs += [pool.submit(cxx, source, target_flags) for source in CPU_KERNELS]
        objects = [path for job in jobs for path in job.result()]
        tidy()

        libraries, library_dirs = ["torch_cpu", "c10"], cpp_extension.library_paths()
        if toolkit:
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            library_dirs += toolkit.library_dirs
        self.compiler.force = True  # link, though objects may be kept ones, older than a library made of others
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=libraries,
            library_dirs=library_dirs,
            target_lang="c++",
        )


setup(
    ext_modules=[Extension("raccgan._native", COMMON + CPU_KERNELS, py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
