"""The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on the shared grid's small shapes.

A build of the library with both is loaded in place of the installed one, in processes of their own: every native
implementation that the grid knows, forward, through both orders of gradient and through a gradient penalty, with every
processor's instructions that this one has. Whether results are right is tested in tests/kernels/; here no byte may be
touched outside of the memory that was asked for. The PTX machine (tests/ptx) holds the CUDA kernels to the same.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from raccgan.kernels import library
from tests.kernels.capability import CAPABILITIES
from tests.kernels.grid import FAMILIES, LAYOUTS, Family, Inputs
from tests.kernels.test_grid import first_order, second_order, through_penalty

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16)
WIDE = 33  # channels beside the grid's few: two vectors of the widest target, and a part of one

# Last on the command line, so that they override setup.py's own. Without optimisation no access is left out, and a
# build takes a third of the time.
FLAGS = "-O0 -g1 -w -D_GLIBCXX_ASSERTIONS -fsanitize=address,undefined -fno-sanitize-recover=undefined"

pytestmark = [
    pytest.mark.skipif(library.path() is None, reason=str(library.why_not())),
    pytest.mark.long,  # it builds the library with both
]


# ---- what runs under the sanitizers, in a process of its own ---------------------------------------------------------


def cases(family: Family, device: str = "cpu") -> Iterator[tuple[str, Inputs]]:
    """Every case of the grid, as it is and with many channels, in every dtype and layout."""
    for case, arguments in family.cases.items():
        n, c, h, w = arguments["shape"]
        for channels in (c, WIDE):
            made = replace(family, cases={case: {**arguments, "shape": (n, channels, h, w)}})
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    yield f"{case}, {channels} channels, {dtype}, {layout}", made.inputs(case, dtype, device, layout)


def run_grid(kernels: str = "native", device: str = "cpu") -> None:
    """Run all of one implementation; a line on stderr before each case says where a report after it comes from."""
    torch.set_num_threads(1)
    runs: dict[str, int] = {}
    for name, family in FAMILIES.items():
        if kernels not in family.implementations:
            continue
        runs[name] = 0
        for case, inputs in cases(family, device):
            if family.implementations[kernels].supports(family.call(inputs)) is None:
                print(name, case, file=sys.stderr, flush=True)
                family.run(kernels, inputs)
                first_order(family, kernels, inputs)
                second_order(family, kernels, inputs)
                through_penalty(family, kernels, inputs)
                runs[name] += 1
    if device == "cuda":
        torch.cuda.synchronize()
    build = library.build()
    assert build is not None, library.why_not()
    print(json.dumps({"runs": runs, "used": build["cpu_capability"], "library": str(library.path())}))


def run_wild(file: str) -> None:
    """Write one number behind the end of a tensor."""
    values = torch.zeros(8)
    ctypes.CDLL(file).write(ctypes.c_void_p(values.data_ptr()), ctypes.c_long(values.numel()))
    print("survived")


# ---- the tests -------------------------------------------------------------------------------------------------------


class Instrumented(NamedTuple):
    """A compiler that adds the sanitizers to every command, and what a process needs to load what it makes."""

    compiler: Path
    preload: str

    def run(self, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call a function of this file in another process."""
        environment = {
            **os.environ,
            "LD_PRELOAD": self.preload,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch leave to the end of the process what they hold
            "UBSAN_OPTIONS": "print_stacktrace=1",
            **environment,
        }
        code = f"import tests.test_sanitizers as t; t.{call}"
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory: pytest.TempPathFactory) -> Instrumented:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C++ compiler here")
    preload = []
    for name in ("libasan.so", "libstdc++.so"):  # the second because the first looks for it when it starts
        found = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        if not (Path(found).is_file() and Path(found).read_bytes().startswith(b"\x7fELF")):
            pytest.skip(f"no {name} beside {compiler}")
        preload.append(found)
    wrapper = tmp_path_factory.mktemp("sanitizers") / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {FLAGS}\n')
    wrapper.chmod(0o755)
    return Instrumented(wrapper, " ".join(preload))


@pytest.fixture(scope="module")
def built(instrumented: Instrumented, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as setup.py builds it, but with the sanitizers and without the CUDA part."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += [f"--build-lib={folder}", f"--build-temp={folder}"]
    compiler = str(instrumented.compiler)
    environment = {**os.environ, "CC": compiler, "CXX": compiler, "RACCGAN_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("raccgan/_native*.so"))


def test_a_write_behind_a_tensor_is_caught(instrumented: Instrumented, tmp_path: Path) -> None:
    """What the next test rests on: the sanitizers watch PyTorch's memory too."""
    (tmp_path / "wild.cpp").write_text('extern "C" void write(float* p, long i) { p[i] = 1; }\n')
    file = str(tmp_path / "wild.so")
    command = [str(instrumented.compiler), "-shared", "-fPIC", str(tmp_path / "wild.cpp"), "-o", file]
    subprocess.run(command, check=True)
    done = instrumented.run(f"run_wild({file!r})")
    assert "heap-buffer-overflow" in done.stderr, done.stdout + done.stderr
    assert "survived" not in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_stay_inside_their_memory(instrumented: Instrumented, built: Path, capability: str) -> None:
    build = library.build()
    assert build is not None
    if capability not in build["cpu_targets"]:
        pytest.skip(f"{capability} is not compiled for this processor family")
    done = instrumented.run("run_grid()", RACCGAN_LIBRARY=str(built), RACCGAN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr[-8000:]
    said = json.loads(done.stdout)
    if said["used"] != capability:
        pytest.skip(f"this processor does not run {capability}")
    assert said["library"] == str(built)
    assert said["runs"]
    assert all(count > 0 for count in said["runs"].values()), said
