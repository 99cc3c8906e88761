"""Where Triton serves and where it does not, and its kernels compiled for GPUs that are not here.

What the kernels compute is in the shared grid: on a GPU, or on the PTX machine (tests/ptx) where there is none.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raccgan.kernels import dispatch, triton_runtime
from raccgan.kernels.anomaly_score import BACKENDS, anomaly_score
from raccgan.kernels.dispatch import Call
from tests.kernels import ahead
from tests.kernels.compare import assert_each_close
from tests.kernels.grid import DEVICES

ROOT = Path(__file__).parents[2]
SHAPE = (2, 3, 8, 8)
DEVICE = DEVICES[-1]

needs_triton = pytest.mark.skipif(triton_runtime.triton is None, reason="Triton is not installed")


def refusal(device: str = "cuda", dtype: torch.dtype = torch.float32) -> str | None:
    return triton_runtime.supports(Call(torch.device(device), dtype, SHAPE))


def on_a_gpu(patch: pytest.MonkeyPatch, major: int, minor: int = 0) -> None:
    """As if on a GPU of that compute capability."""
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


@needs_triton
def test_what_triton_serves_and_why_not_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, 8)
    assert refusal() is None
    assert "do not take torch.float64" in str(refusal(dtype=torch.float64))
    assert "no Triton kernels for meta" in str(refusal("meta"))
    assert "Triton needs a GPU" in str(refusal("cpu"))
    on_a_gpu(monkeypatch, 7, 5)
    assert "compute capability 7.5 is below 8.0" in str(refusal())
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(refusal())


@needs_triton
def test_fused_does_not_take_triton_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: one for name, one in BACKENDS.items() if name != "native"}
    on_the_cpu = Call(torch.device("cpu"), torch.float32, SHAPE)
    assert dispatch.choose("anomaly_score", table, "fused", on_the_cpu).name == "reference"
    on_a_gpu(monkeypatch, 9)
    for dtype in triton_runtime.DTYPES:
        call = Call(torch.device("cuda"), dtype, SHAPE)
        assert dispatch.choose("anomaly_score", table, "triton", call).name == "triton"
        fused = dispatch.choose("anomaly_score", table, "fused", call)
        assert fused.name == "reference"
        assert fused.refused == {"triton": "calls of this class were not tried on this GPU: --kernels triton takes it"}


@needs_triton
def test_asked_for_by_name_where_it_cannot_serve_is_an_error() -> None:
    with pytest.raises(dispatch.KernelError, match="--kernels triton cannot serve anomaly_score: Triton needs a GPU"):
        anomaly_score(torch.zeros(SHAPE), torch.zeros(SHAPE), kernels="triton")


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        ("sys.modules['triton'] = None", "Triton is not installed: CUDA builds"),
        ("import types; sys.modules['triton'] = types.ModuleType('triton')", "Triton is not installed: CUDA builds"),
        ("import triton; triton.__version__ = '2.1.0'", "Triton 2.1.0 is older than 3.6"),
        ("import triton; triton.knobs.runtime.interpret = True", "TRITON_INTERPRET is set, which would run"),
    ],
)
def test_importing_works_without_triton_and_with_another_one(hidden: str, said: str) -> None:
    if hidden.startswith("import triton") and triton_runtime.triton is None:
        pytest.skip("Triton is not installed")
    code = f"import sys; {hidden}; import raccgan.doctor as d; d.main([])"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert f"Triton: {said}" in printed
    assert f"not triton: {said}" in printed


@needs_triton
@pytest.mark.parametrize("family", ahead.families())
def test_every_kernel_compiles_for_gpus_and_does_not_spill(family: str, pytestconfig: pytest.Config) -> None:
    """Its table is printed. The short run compiles every kernel, and one in 64 of their configurations."""
    every = 1 if pytestconfig.getoption("long") else 64
    command = [sys.executable, "-m", "tests.kernels.ahead", family, f"--every={every}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for architecture in ahead.ARCHITECTURES:
        assert f"sm_{architecture}" in done.stdout


@pytest.mark.skipif(refusal(DEVICE) is not None, reason=str(refusal(DEVICE)))
@pytest.mark.parametrize("last", [False, True])
def test_a_score_does_not_depend_on_the_batch_or_on_the_map(last: bool) -> None:
    """Large enough for several pieces of image and features a sample."""
    draw = torch.Generator().manual_seed(1)
    x, x_hat = (torch.randn(3, 3, 40, 50, generator=draw).to(DEVICE) for _ in range(2))
    f, f_hat = (torch.randn(3, 2600, generator=draw).to(DEVICE) for _ in range(2))
    if last:
        x, x_hat = (t.contiguous(memory_format=torch.channels_last) for t in (x, x_hat))
    together = anomaly_score(x, x_hat, f, f_hat, kernels="triton")
    assert together.map is not None
    alone = anomaly_score(x[2:], x_hat[2:], f[2:], f_hat[2:], want_map=False, kernels="triton")
    assert torch.equal(together.residual[2:], alone.residual)
    assert torch.equal(together.feature[2:], alone.feature)
    wanted = anomaly_score(*(t.double() for t in (x, x_hat, f, f_hat)), kernels="reference")
    assert_each_close(together.score, wanted.score, rtol=1e-6)
    assert_each_close(together.map, wanted.map, rtol=1e-5, atol=1e-7)
