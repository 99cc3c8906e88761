"""The compiled library: that it loads anywhere, and that its numbers are the same everywhere.

Shapes, dtypes and gradients of the operations are tested in tests/kernels/.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
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
import torch
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.anomaly_score import native, reference
from tests.kernels.capability import CAPABILITIES, said_under
from tests.kernels.compare import assert_each_close, largest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

needs_library = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def image_pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator).to(dtype)


def in_float64(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, x_hat, f, f_hat = (t.double() for t in inputs)
    return reference.anomaly_score(x, x_hat, f, f_hat, True)


def digest_and_error() -> tuple[str, float]:
    """The bits of some scores and maps, and how far they are at most from float64, relatively."""
    digest = hashlib.sha256()
    error = 0.0
    for dtype in DTYPES:
        for shape in [(2, 3, 75, 61), (1, 130, 9, 11), (3, 1, 32, 32)]:
            inputs = *image_pair(shape, dtype), *image_pair((shape[0], 40001), dtype, seed=1)
            for got, expected in zip(native.anomaly_score(*inputs, True), in_float64(*inputs), strict=True):
                digest.update(got.numpy().tobytes())
                error = largest([error, ((got - expected).abs() / (expected + 1e-9)).max().item()])
    return digest.hexdigest(), error


# ---- loading ---------------------------------------------------------------------------------------------------------


@needs_library
def test_the_library_loads_and_says_what_is_in_it() -> None:
    assert library.load(), library.why_not()
    build = library.build()
    assert build is not None
    assert build["cpu_targets"][0] == "portable"
    assert build["cpu_capability"] in build["cpu_targets"]


@needs_library
def test_the_library_needs_nothing_that_a_cpu_build_of_pytorch_lacks() -> None:
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("no nm and readelf here")
    undefined = subprocess.check_output([nm, "-D", "--undefined-only", str(library.path())], text=True)
    needed = subprocess.check_output([readelf, "-d", str(library.path())], text=True)
    assert not re.search(r"cuda_stream|\bcuda[A-Z]|c10_cuda|_ZN2at|_ZN3c10|\bPy", undefined)
    assert not re.search(r"NEEDED.*(cuda|torch_python)", needed)


def test_a_library_that_was_not_built_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "path", lambda: None)
    assert 'run "pip install -e ."' in str(library.why_not.__wrapped__())


def test_a_library_that_does_not_load_is_the_loaders_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "path", lambda: broken)
    reason = library.why_not.__wrapped__()
    assert reason is not None
    assert reason.startswith("the compiled library does not load: ")
    assert str(broken) in reason
    assert "\n" not in reason


@needs_library
def test_an_unknown_capability_is_an_error_that_names_the_known_ones() -> None:
    code = "from raccgan.kernels import library; print(library.why_not())"
    said = subprocess.check_output(
        [sys.executable, "-c", code], env={**os.environ, "RACCGAN_CPU_CAPABILITY": "mmx"}, cwd=ROOT, text=True
    )
    assert "RACCGAN_CPU_CAPABILITY=mmx is none of portable" in said
    assert len(said.splitlines()) == 1


# ---- the same numbers everywhere -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_gives_the_same_bits(capability: str) -> None:
    code = "import json, tests.test_build as t; print(json.dumps(t.digest_and_error()))"
    digest, error = json.loads(said_under(capability, code))
    assert error < 1e-6
    assert digest == digest_and_error()[0]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 70, 61), (2, 130, 9, 11), (2, 1, 128, 128)])
def test_a_score_depends_on_its_sample_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, x_hat = image_pair(shape, dtype)
    f, f_hat = image_pair((shape[0], 33, 1001), dtype)
    residual, feature, pixels = native.anomaly_score(x, x_hat, f, f_hat, True)

    def same(got: tuple[Tensor, Tensor, Tensor], n: slice = slice(None)) -> None:
        assert torch.equal(got[0], residual[n])
        assert torch.equal(got[1], feature[n])
        assert got[2].numel() == 0 or torch.equal(got[2], pixels[n])

    same(native.anomaly_score(x, x_hat, f, f_hat, False))
    last = {"memory_format": torch.channels_last}
    same(native.anomaly_score(x.contiguous(**last), x_hat.contiguous(**last), f, f_hat, True))
    for i in range(shape[0]):
        n = slice(i, i + 1)
        same(native.anomaly_score(x[n], x_hat[n].clone(), f[n].clone(), f_hat[n], True), n)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            same(native.anomaly_score(x, x_hat, f, f_hat, True))
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize("value", [0.1, 3.0])
def test_ten_million_elements_keep_six_digits(value: float) -> None:
    # Equal summands are the worst case: every rounding errs to the same side.
    x = torch.full((1, 1, 4000, 2500), value)
    residual, feature, _ = native.anomaly_score(x, torch.zeros_like(x), x, torch.zeros_like(x), False)
    expected = x[0, 0, 0, 0].double() ** 2
    assert_each_close(residual, expected, rtol=1e-6)
    assert_each_close(feature, expected, rtol=1e-6)


# ---- sources and build -----------------------------------------------------------------------------------------------


def test_sources_compiled_per_target_include_c_headers_only() -> None:
    # See csrc/cpu/simd/targets.h: what C++ headers define inline would be merged across targets.
    folder = CSRC / "cpu"
    sources = [path for path in folder.rglob("*.[ch]*") if path.name != "targets.cpp"]
    for source in sources:
        included = re.findall(r"#include <(.+)>", source.read_text())
        assert set(included) <= {"immintrin.h", "math.h", "stddef.h", "stdint.h", "string.h"}, source


@needs_library
def test_the_cuda_part_is_there_where_nvcc_is() -> None:
    if shutil.which("nvcc") is None or os.environ.get("RACCGAN_CUDA") == "0":
        pytest.skip("no nvcc on PATH, or RACCGAN_CUDA=0")
    build = library.build()
    assert build is not None
    assert re.fullmatch(r"\d+\.\d+", build["cuda"])
    assert "80" in build["cuda_architectures"]


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
    assert build_backend.get_requires_for_build_sdist() == []
    assert build_backend.get_requires_for_build_wheel() == []
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (requirement,) = build_backend.get_requires_for_build_editable()
    assert requirement.startswith("torch>=2.11,<")
    for version, wanted in (("2.10.0", [requirement]), ("2.12.1+cu130", [])):
        metadata = tmp_path / "torch.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        assert build_backend.get_requires_for_build_wheel() == wanted


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A checkout whose library is four lines: a binding, the targets, a kernel, and a header."""
    for name in ("bindings", "cpu/simd"):
        (tmp_path / "csrc" / name).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(CSRC / "build_tools.py", tmp_path / "csrc")
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
