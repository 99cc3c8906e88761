"""A tiny run that every test of the road can afford: digits at 8 px, a few channels, a few steps."""

from __future__ import annotations

import datetime
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from raccgan.config import Config, make_config
from raccgan.data.dataset import ImageDataset
from raccgan.models.checkpoint import NAME, Checkpoint
from raccgan.models.networks import Networks, build
from raccgan.training.loop import Training
from raccgan.training.run import Run, prepare

TINY: dict[str, Any] = {
    "base_width": 4,
    "latent": 8,
    "embedding": 4,
    "pathology_width": 2,
    "batch_size": 8,
    "gan_steps": 6,
    "encoder_steps": 6,
    "pathology_steps": 6,
    "checkpoint_every": 3,
    "control_steps": 3,
}

TINY_OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
"""The same, for a command line."""

CPU = torch.device("cpu")

LONGEST = frozenset(("ptx", "export", "test_docs.py", "test_crash.py", "distributed"))
"""Folders and files that take longest. They go first, so that no process has one left when the others are done."""

KILLS = {"short": 1, "long": 50}
RANDOM_CASES = {"short": 10, "long": 1000}
SOAK_STEPS = {"short": 150, "long": 5000}
DETECTED = {"short": (300, 1200), "long": (10_000, 100_000)}

for _name, _cases in RANDOM_CASES.items():
    settings.register_profile(
        _name, max_examples=_cases, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("raccgan")
    group.addoption("--long", action="store_true", help="also tests marked long; random cases, kills, soak in full")
    group.addoption("--kills", type=int, metavar="N", help="how often tests/cli/test_crash.py kills training")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    length = "long" if config.getoption("long") else "short"
    settings.load_profile(length)
    config.option.kills = config.option.kills or KILLS[length]
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have the most tests
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = f"{datetime.date.today():%Y%m%d}"


_LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest go first; the short run leaves out the tests that are marked long."""
    items.sort(key=lambda item: LONGEST.isdisjoint(item.path.parts))
    if config.getoption("long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if not item.get_closest_marker("long")]
    config.stash[_LEFT_OUT] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Each of pytest-xdist's workers has collected, and left out, the same tests."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"short run: {left_out} tests marked long were left out; --long runs them")


def pytest_report_header(config: pytest.Config) -> list[str]:
    counts = {"random cases of each backend": RANDOM_CASES, "kills": KILLS, "soak steps": SOAK_STEPS}
    counts["images scored from disk"] = {length: most[1] for length, most in DETECTED.items()}
    length = "long" if config.getoption("long") else "short"
    parts = ", ".join(f"{most[length]} {what}" for what, most in counts.items())
    seed = config.option.hypothesis_seed
    return [f"{length} run: {parts}", f"random cases of the day: --hypothesis-seed={seed} draws them again"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from more threads, and tests that share cores lose much; so do their processes."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A folder of real images: RACCGAN_DATA, or shared/data beside the checkout; without one, a test is skipped."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("RACCGAN_DATA") or beside)
    if not root.is_dir():
        pytest.skip(f"no real images in {root}: set RACCGAN_DATA to a folder with MNIST, mvtec/screw and chest_xray")
    return root


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., tuple[Run, Training]]:
    """Make a tiny run and its training; settings override, ``resumed`` continues a checkpoint."""

    def make(resumed: Checkpoint | None = None, folder: str = "run", **settings: Any) -> tuple[Run, Training]:
        run = prepare(tiny_config(**settings), tmp_path, CPU)
        (tmp_path / folder).mkdir(exist_ok=True)
        return run, Training(run, training_data(run), tmp_path / folder / NAME, resumed)

    return make


def tiny_config(**settings: Any) -> Config:
    return make_config("digits", TINY | settings)


def config_of(widths: Sequence[int], **settings: Any) -> Config:
    """Of networks whose generator has these widths, by default without CBAM."""
    sizes = {"image_size": 4 * 2 ** (len(widths) - 1), "base_width": 1, "multipliers": ",".join(map(str, widths))}
    return Config(**{**sizes, "attention_generator": "none", **settings})


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
