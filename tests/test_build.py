"""The build: what is compiled, by which compilers, for which GPUs, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def test_sources_compiled_per_target_include_c_headers_only() -> None:
    # See csrc/cpu/simd/targets.h: what C++ headers define inline would be merged across targets.
    folder = CSRC / "cpu"
    sources = [path for path in folder.rglob("*.[ch]*") if path.name != "targets.cpp"]
    for source in sources:
        included = re.findall(r"#include <(.+)>", source.read_text())
        assert set(included) <= {"immintrin.h", "math.h", "stddef.h", "stdint.h", "string.h"}, source


@pytest.fixture
def build_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    pytest.importorskip("packaging")
    monkeypatch.syspath_prepend(str(CSRC))
    spec = importlib.util.spec_from_file_location("build_backend", CSRC / "build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


def test_the_build_asks_for_pytorch_only_where_there_is_none(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not hasattr(build_backend, "get_requires_for_build_sdist")  # so a frontend asks for nothing
    assert build_backend.get_requires_for_build_wheel() == []
    monkeypatch.setattr(sysconfig, "get_path", lambda name, **_: str(tmp_path))
    (requirement,) = build_backend.get_requires_for_build_editable()
    assert requirement.startswith("torch>=2.11,<")
    assert requirement.endswith(",<2.14")  # narrower than what serves: the release that .ci/run tests
    for version, wanted in (("2.10.0", [requirement]), ("2.12.1+cpu", []), ("2.15.0", []), ("2.16.0", [requirement])):
        metadata = tmp_path / "torch.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
        assert build_backend.get_requires_for_build_wheel() == wanted
        ours = next(line for line in build_backend.requirements.dependencies() if line.startswith("torch>"))
        assert ours.endswith(",<2.14") == bool(wanted)  # one that serves is kept


@pytest.mark.parametrize(
    ("cuda", "release"), [("'13.0'", "13.0"), ("'13.2'", "13.2"), ("'12.8'", None), ("None", None)]
)
def test_the_build_asks_for_nvcc_where_pytorch_has_cuda_and_there_is_none(
    build_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, release: str | None
) -> None:
    monkeypatch.delenv("RACCGAN_CUDA", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, **_: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    (tmp_path / "torch.dist-info").mkdir()
    (tmp_path / "torch.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.15.0'\ncuda: Optional[str] = {cuda}\n")
    asked = build_backend.get_requires_for_build_editable()
    names = ("cuda-toolkit[cccl,nvcc]", "nvidia-nvvm", "nvidia-cuda-crt")
    assert asked == ([f"{name}=={release}.*" for name in names] if release else [])
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    assert build_backend.get_requires_for_build_editable() == []


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A checkout whose library is four lines: a binding, the targets, a kernel, and a header."""
    for name in ("bindings", "cpu/simd"):
        (tmp_path / "csrc" / name).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in ("build_tools.py", "requirements.py"):
        shutil.copy(CSRC / name, tmp_path / "csrc")
    (tmp_path / "pyproject.toml").write_text("[tool.raccgan]\ndependencies = []\noptional-dependencies = {}\n")
    (tmp_path / "csrc" / "number.h").write_text("#define NUMBER 1\n")
    (tmp_path / "csrc" / "bindings" / "number.cpp").write_text(
        '#include "number.h"\nextern "C" __attribute__((visibility("default"))) int number() { return NUMBER; }\n'
    )
    (tmp_path / "csrc" / "cpu" / "simd" / "targets.cpp").write_text("static_assert(sizeof(int) == 4);\n")
    (tmp_path / "csrc" / "cpu" / "kernel.cpp").write_text("static_assert(sizeof(int) == 4);\n")
    return tmp_path


COMPILERS = (shutil.which("g++"), shutil.which("ninja"))
needs_compiler = pytest.mark.skipif(None in COMPILERS, reason=f"no g++ or no ninja on PATH: {COMPILERS}")
BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    said: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(BUILD, cwd=tree, env={**os.environ, "RACCGAN_CUDA": "0", **environment}, **said)


def compiled(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout
    return re.findall(r"C\+\+ build/native/(\S+)\.o", done.stdout)


def number(tree: Path) -> int:
    """What the library computes, asked in a process of its own: this one would keep the first that it loads."""
    (file,) = (tree / "raccgan").glob("_native*.so")
    code = f"import ctypes, torch; print(ctypes.CDLL({str(file)!r}).number())"
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


@needs_compiler
def test_a_build_compiles_what_has_changed(small_tree: Path) -> None:
    (small_tree / "raccgan").mkdir()
    first = build(small_tree, MAX_JOBS="3")
    kernels = [f"{target}/cpu/kernel" for target in ("portable", "avx2", "avx512", "avx512bf16")]
    assert set(compiled(first)) >= {"bindings/number", "cpu/simd/targets", kernels[0]}
    assert set(compiled(first)) <= {"bindings/number", "cpu/simd/targets", *kernels}
    assert " -j3\n" in first.stdout
    assert number(small_tree) == 1
    assert compiled(build(small_tree)) == []
    (small_tree / "csrc" / "number.h").write_text("#define NUMBER 2\n")
    assert compiled(build(small_tree)) == ["bindings/number"]
    assert number(small_tree) == 2
    assert len(compiled(build(small_tree, CXXFLAGS="-O1"))) == len(compiled(first))
    (small_tree / "csrc" / "number.h").write_text("#define NUMBER broken\n")
    for _ in range(2):
        failed = build(small_tree, CXXFLAGS="-O1")
        assert failed.returncode != 0
        assert re.search("error: .*broken", failed.stdout)
        assert failed.stdout.endswith("error: the C++ compiler failed, see above\n")


@needs_compiler
def test_two_builds_at_once_compile_everything_once(small_tree: Path) -> None:
    (small_tree / "raccgan").mkdir()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(build, [small_tree, small_tree]))
    assert sorted(bool(compiled(done)) for done in both) == [False, True]
    assert number(small_tree) == 1


NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --dryrun*) echo "#$ TOP=/usr/local/cuda" ;;
  --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90 ;;
  *) echo "$*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def failing_nvcc(small_tree: Path) -> Path:
    """A CUDA source, and a toolkit among the Python packages whose compiler fails."""
    (small_tree / "raccgan").mkdir()
    (small_tree / "csrc" / "cuda").mkdir()
    (small_tree / "csrc" / "cuda" / "kernel.cu").write_text("")
    nvcc = small_tree / "packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    return nvcc


@needs_compiler
def test_an_nvcc_that_fails_costs_the_cuda_part_alone(small_tree: Path, failing_nvcc: Path) -> None:
    home = str(failing_nvcc.parents[1])
    done = build(small_tree, RACCGAN_CUDA="", CUDA_HOME=home)
    assert done.returncode == 0, done.stdout
    assert "arch=compute_80,code=[sm_80,sm_90,compute_80]" in done.stdout
    assert "leaving out the CUDA part: nvcc or the C++ compiler failed, see above" in done.stdout
    assert number(small_tree) == 1
    done = build(small_tree, RACCGAN_CUDA="1", CUDA_HOME=home)
    assert done.returncode != 0
    assert done.stdout.endswith("error: nvcc or the C++ compiler failed, see above\n")


def test_a_toolkit_among_the_python_packages_is_found(
    setup_py: dict[str, Any], failing_nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(failing_nvcc.parents[3])])
    monkeypatch.setattr(shutil, "which", lambda name, path=None: next(
        (f"{place}/{name}" for place in (path or "").split(":") if "packages/nvidia" in place), None
    ))  # fmt: skip
    for name in ("RACCGAN_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    toolkit = setup_py["Toolkit"].find()
    assert toolkit.nvcc == str(failing_nvcc)
    assert toolkit.architectures == ["80", "90"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("8.6;9.0+PTX", ["86", "90"]), ("7.5 8.0", ["80"]), ("12.0", ["120"]), ("7.5", []), ("", ["80", "90"])],
)
def test_architectures(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wanted: str, found: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    known = "compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_120\n"
    assert setup_py["Toolkit"].find.__globals__["gpu_architectures"](known) == found


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("8.9\n12.0\n", ["89", "120"]),
        ("7.5\n", ["80", "90"]),
        ("NVML: Driver/library version mismatch, 535.183\n", ["80", "90"]),
    ],
)
def test_architectures_of_the_gpus_that_are_there(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, said: str, found: list[str]
) -> None:
    """Where none of them can be compiled for, or none answers, as where there is none."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    ours = setup_py["Toolkit"].find.__globals__
    monkeypatch.setitem(ours, "said_by", lambda command: said)
    known = "compute_75\ncompute_80\ncompute_89\ncompute_90\ncompute_120\n"
    assert ours["gpu_architectures"](known) == found


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/g++", "No such file or directory"),
        ("./old", "g++: error: unrecognized command line option '-std=c++20'; did you mean '-std=c++2a'?"),
    ],
)
def test_no_compiler_and_an_old_one_are_one_line(small_tree: Path, compiler: str, reason: str) -> None:
    # What g++ 9 says.
    (small_tree / "old").write_text(f'#!/bin/sh\necho "{reason}" >&2\nexit 1\n')
    (small_tree / "old").chmod(0o755)
    done = build(small_tree, CXX=compiler)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == (
        f"error: a C++20 compiler is needed: apt install g++ (tried {compiler}: {reason})"
    )


def test_no_ninja_and_a_wrong_number_of_jobs_are_one_line(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BaseException, match="ninja is needed to build: pip install ninja"):
        setup_py["find_ninja"]()
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(BaseException, match=f"MAX_JOBS={wrong}: a whole number of at least 1 is needed"):
            setup_py["jobs"]()


def test_jobs_are_what_processors_quota_and_memory_allow(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = tmp_path / "groups" / "outer" / "inner"
    for folder in (group, tmp_path / "proc" / "self"):
        folder.mkdir(parents=True)
    memory = tmp_path / "proc" / "meminfo"
    memory.write_text(f"MemTotal: 1 kB\nMemAvailable:  {64 * 2**20} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/outer/inner\n")
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(48)))

    def jobs() -> int:
        found: int = setup_py["jobs"](tmp_path / "groups", tmp_path / "proc")
        return found

    assert jobs() == 48
    (group / "cpu.max").write_text("max 100000\n")
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert jobs() == 2
    (group.parent / "cpu.max").write_text("50000 100000\n")
    assert jobs() == 1
    (group.parent / "cpu.max").unlink()
    (group / "memory.max").write_text(f"{6 * 2**30}\n")
    assert jobs() == 6
    memory.write_text(f"MemAvailable:  {3 * 2**20} kB\n")
    assert jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "7")
    assert jobs() == 7


def test_an_old_setuptools_is_named(setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    setup_py["require_setuptools"]()
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools 77 or later is needed, this is 65\.5\.0: pip install"):
        setup_py["require_setuptools"]()
