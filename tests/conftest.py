"""A tiny run that every test of the road can afford: digits at 8 px, a few channels, a few steps."""

from __future__ import annotations

import os
import runpy
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from raccgan.config import Config, make_config
from raccgan.data.dataset import ImageDataset
from raccgan.kernels import triton_runtime
from raccgan.models.checkpoint import NAME, Checkpoint
from raccgan.models.networks import Networks, build
from raccgan.training.loop import Training
from raccgan.training.run import Run, prepare

TINY: dict[str, Any] = {
    "base_width": 4,
    "latent": 8,
    "embedding": 4,
    "batch_size": 8,
    "gan_steps": 6,
    "encoder_steps": 6,
    "checkpoint_every": 3,
    "control_steps": 3,
}

TINY_OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
"""The same, for a command line."""

CPU = torch.device("cpu")

KILLS = {"short": 3, "long": 50}
RANDOM_CASES = {"short": 20, "long": 1000}
SOAK_STEPS = {"short": 300, "long": 5000}
INTERPRETED = 10
DETECTED = {"short": (500, 2000), "long": (10_000, 100_000)}

for _name, _cases in RANDOM_CASES.items():
    settings.register_profile(
        _name, max_examples=_cases, derandomize=_name == "short", deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("raccgan")
    group.addoption("--long", action="store_true", help="random cases, kills and soak at full length: over an hour")
    group.addoption("--kills", type=int, metavar="N", help="how often tests/cli/test_crash.py kills training")


def pytest_configure(config: pytest.Config) -> None:
    length = "long" if config.getoption("long") else "short"
    settings.load_profile(length)
    config.option.kills = config.option.kills or KILLS[length]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted, the Triton kernels' tests would take as long as all the others: the short run keeps a sample."""
    if config.getoption("long") or not triton_runtime.INTERPRETED:
        return
    left_out = [item for item in items if _is_interpreted(item) and zlib.crc32(item.nodeid.encode()) % INTERPRETED]
    if left_out:
        chosen = set(left_out)
        items[:] = [item for item in items if item not in chosen]
        config.hook.pytest_deselected(items=left_out)


def _is_interpreted(item: pytest.Item) -> bool:
    file, _, test = item.nodeid.rpartition("/")[2].partition("::")
    in_a_grid = file == "test_grid.py" and "triton" in test
    return in_a_grid or (file.endswith("_triton.py") and file != "test_triton.py")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("long"):
        return "long run: all random cases, kills, soak steps and images"
    left_out = {"random cases of each implementation": RANDOM_CASES, "kills": KILLS, "soak steps": SOAK_STEPS}
    counts = [f"{most['short']} of {most['long']} {what}" for what, most in left_out.items()]
    counts.append(f"one in {INTERPRETED} tests of interpreted Triton kernels")
    counts.append(f"{DETECTED['short'][1]} of {DETECTED['long'][1]} images scored from disk")
    return f"short run: {', '.join(counts)}, as all of them take over an hour; --long runs them"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from more threads, and tests that share cores lose much."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real images of the development machines; tests that need them are skipped where they are not."""
    root = Path(os.environ.get("RACCGAN_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip("no real images: set RACCGAN_DATA to a folder with MNIST, mvtec/screw and chest_xray")
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Run, Training]]:
    """Make a tiny run and its training; settings override, ``resumed`` continues a checkpoint."""

    def make(resumed: Checkpoint | None = None, folder: str = "run", **settings: Any) -> tuple[Run, Training]:
        run = prepare(tiny_config(**settings), tmp_path, CPU)
        (tmp_path / folder).mkdir(exist_ok=True)
        return run, Training.of(run, training_data(run), tmp_path / folder / NAME, resumed)

    return make


def tiny_config(**settings: Any) -> Config:
    return make_config("digits", TINY | settings)


def networks(run: Run) -> Networks:
    return build(run.config, channels=run.channels, classes=len(run.classes), device=run.device)


def training_data(run: Run) -> ImageDataset:
    return run.dataset(run.split.train)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """torch.compile as where there is no C++ compiler; what another test compiled would do is out of reach."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        yield


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build; its paths are relative to the repository, which tests then run in."""
    pytest.importorskip("setuptools")
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--name"])
    return runpy.run_path("setup.py")
