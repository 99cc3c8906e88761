"""The compiled library: that it loads anywhere, and that its numbers are the same everywhere.

Shapes, dtypes and gradients of the operations are tested in tests/kernels/.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.anomaly_score import native, reference
from tests.kernels.capability import CAPABILITIES, said_under
from tests.kernels.compare import assert_each_close, largest

ROOT = Path(__file__).parent.parent
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


@needs_library
def test_the_cuda_part_is_there_where_nvcc_is() -> None:
    if shutil.which("nvcc") is None or os.environ.get("RACCGAN_CUDA") == "0":
        pytest.skip("no nvcc on PATH, or RACCGAN_CUDA=0")
    build = library.build()
    assert build is not None
    assert re.fullmatch(r"\d+\.\d+", build["cuda"])
    assert "80" in build["cuda_architectures"]


# ---- the same numbers everywhere -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_gives_the_same_bits(capability: str) -> None:
    code = "import json, tests.test_library as t; print(json.dumps(t.digest_and_error()))"
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
