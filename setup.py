"""Builds the compiled half of raccgan: one library, csrc/ -> raccgan/_native.abi3.so. The rest is in pyproject.toml.

The library keeps to LibTorch's stable ABI and uses no Python API, so one build serves every Python and every PyTorch
from 2.11 on, with CUDA or without. ninja compiles csrc/bindings once, csrc/cpu once for each target below (the
processor decides at run time), and csrc/cuda where there is an nvcc. build/native keeps the objects, so a second build
compiles what has changed; ``build_ext --force`` compiles everything in its own folder. Beside each CUDA object stands
what the assembler says of its registers, in a .txt.

Environment:
    RACCGAN_CUDA    1: fail without the CUDA part; 0: leave it out; unset: build it if there is an nvcc that can.
    CUDA_HOME       the toolkit to use; otherwise the nvcc on PATH, in /usr/local/cuda, or among the Python packages.
    TORCH_CUDA_ARCH_LIST    GPU architectures such as "8.0 9.0"; unset: those of the GPUs here, else 8.0 and 9.0.
    MAX_JOBS        compilers at once; unset: as many as processors, their quota and memory allow.
    CXX, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS    as usual.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, "csrc")

import requirements
from build_tools import Toolkit, find_cxx, find_ninja, jobs, locked, require_setuptools, said_by

CPU_SOURCES = sorted(Path("csrc/cpu").rglob("*.cpp"))
CPU_KERNELS = [path for path in CPU_SOURCES if path.name != "targets.cpp"]
COMMON = [*sorted(Path("csrc/bindings").rglob("*.cpp")), *(path for path in CPU_SOURCES if path.name == "targets.cpp")]
CUDA_KERNELS = sorted(Path("csrc/cuda").rglob("*.cu"), key=lambda path: -path.stat().st_size)  # the slowest first

X86 = platform.machine() in ("x86_64", "AMD64")
CPU_TARGETS: dict[str, list[str]] = {"portable": []}
if X86:  # the same names in targets.h
    CPU_TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_TARGETS["avx512"] = [*CPU_TARGETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    CPU_TARGETS["avx512bf16"] = [*CPU_TARGETS["avx512"], "-mavx512bf16"]

CXX_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fwrapv", "-fPIC", "-fvisibility=hidden", "-Wall", "-Icsrc"]
CXX_FLAGS += ["-DRACCGAN_X86"] if X86 else []
COMMON_FLAGS = [*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11, the oldest in pyproject.toml
# Every target gives the same bits only if none fuses a multiplication and an addition of its own accord. Two warnings
# do not apply: no vector passes between functions of different targets (psabi), and GCC 12 finds its own AVX-512
# header uninitialised.
KERNEL_FLAGS = [*CXX_FLAGS, "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]

LIBRARY = "_native.so"
# A compiler's version, in a file, is an input of all that it compiles.
RULES = """
rule cxx
  command = $cxx $flags $cxxflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $out
rule nvcc
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; false; }
  depfile = $out.d
  deps = gcc
  description = CUDA $out
rule link
  command = $cxx -shared $in -o $out $flags
  description = link $out
"""


class NinjaFile:
    """A build.ninja as it grows: objects, and the library of all of them."""

    def __init__(self, folder: Path, commands: dict[str, list[str]]) -> None:
        self.objects: list[str] = []
        self.text = f"builddir = {folder}\n"
        self.text += "".join(f"{name} = {quoted(words)}\n" for name, words in commands.items()) + RULES

    def compile(self, rule: str, sources: list[Path], flags: list[str], subfolder: str = "") -> None:
        for source in sources:
            self.objects.append(str(Path("$builddir", subfolder, source.relative_to("csrc").with_suffix(".o"))))
            self.text += f"build {self.objects[-1]}: {rule} {source} | $builddir/{rule}.version\n"
            self.text += f"  flags = {quoted(flags)}\n"

    def link(self, flags: list[str]) -> None:
        self.text += f"build $builddir/{LIBRARY}: link {' '.join(self.objects)}\n  flags = {quoted(flags)}\n"


def quoted(words: list[str]) -> str:
    """Words as a shell command that stands in a build.ninja."""
    return shlex.join(words).replace("$", "$$")


def write_if_other(path: Path, text: str) -> None:
    """Write a file, but leave its time as it is where nothing changes."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def torch_in(folder: Path) -> Path:
    """A link in ``folder`` to the PyTorch that is compiled against.

    pip puts it into another temporary folder each time. A link that is named by its version leaves the commands, and so
    the objects, as they are.
    """
    found = find_spec("torch")
    assert found is not None
    link = folder / f"torch-{version('torch')}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(str(found.origin)).parent)
    return link


def configure(folder: Path, toolkit: Toolkit | None, why_no_cuda: str) -> None:
    """Write ``folder/build.ninja``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch, cxx = torch_in(folder), find_cxx()
    common_flags = [*COMMON_FLAGS, "-isystem", str(torch / "include")]
    link_flags = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    if toolkit:
        architectures = ", ".join(toolkit.architectures)
        common_flags += [f'-DRACCGAN_CUDA="{toolkit.version}"', f'-DRACCGAN_CUDA_ARCHITECTURES="{architectures}"']
        link_flags += [f"-L{place}" for place in toolkit.library_dirs]
        link_flags += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    else:
        common_flags.append(f'-DRACCGAN_WHY_NO_CUDA="{why_no_cuda}"')
    cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
    ninja = NinjaFile(folder, {"cxx": cxx, "cxxflags": cxxflags, "nvcc": [toolkit.nvcc] if toolkit else []})
    cxx_version = said_by([*cxx, "--version"])
    write_if_other(folder / "cxx.version", cxx_version)
    if toolkit:  # first, as they take longest
        append = os.environ.get("NVCC_APPEND_FLAGS", "")
        write_if_other(folder / "nvcc.version", said_by([toolkit.nvcc, "--version"]) + append + cxx_version)
        ninja.compile("nvcc", CUDA_KERNELS, [*NVCC_FLAGS, toolkit.code()])
    ninja.compile("cxx", COMMON, common_flags)
    for target, flags in CPU_TARGETS.items():
        ninja.compile("cxx", CPU_KERNELS, [*KERNEL_FLAGS, *flags, f"-DRACCGAN_TARGET={target}"], target)
    ninja.link([*link_flags, *shlex.split(os.environ.get("LDFLAGS", ""))])
    (folder / "build.ninja").write_text(ninja.text)


class BuildNative(build_ext):
    """Builds the library by ninja."""

    def run(self) -> None:
        if find_spec("torch") is None:
            self.warn("leaving out the compiled library: PyTorch is not installed where this build runs")
            self.extensions: list[Extension] = []
        self.folder = Path("build/native")
        if self.force:
            self.folder = Path(self.build_temp) / "native"
            shutil.rmtree(self.folder, ignore_errors=True)
        with locked(self.folder.with_suffix(".lock")):
            super().run()

    def build_extension(self, ext: Extension) -> None:
        why_no_cuda = "no nvcc was found where it was built, or RACCGAN_CUDA=0"
        try:
            if toolkit := Toolkit.find():
                self.compile(toolkit)
        except CompileError as error:
            if os.environ.get("RACCGAN_CUDA") == "1":
                raise
            toolkit, why_no_cuda = None, str(error).replace('"', "'")
        if toolkit is None:
            self.warn(f"leaving out the CUDA part: {why_no_cuda}")
            self.compile(None, why_no_cuda)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        shutil.copyfile(self.folder / LIBRARY, part)
        part.replace(target)  # a process that has the old library open keeps it

    def compile(self, toolkit: Toolkit | None, why_no_cuda: str = "") -> None:
        configure(self.folder, toolkit, why_no_cuda)
        command = [find_ninja(), "-f", str(self.folder / "build.ninja"), f"-j{jobs()}"]
        print(*command, flush=True)
        if subprocess.run(command).returncode != 0:
            raise CompileError(f"{'nvcc or ' if toolkit else ''}the C++ compiler failed, see above")


require_setuptools()
setup(
    install_requires=requirements.dependencies(),
    extras_require=requirements.extras(),
    ext_modules=[Extension("raccgan._native", [], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
