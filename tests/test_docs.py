"""Every command in docs/ is run as it stands, on tiny data, unless the page says why not.

A block whose fence reads ``sh`` or ``python`` is run. ``sh not run: REASON`` is not, and the reason is printed;
``sh in the repository`` runs there. The blocks of one page run in order, in one folder and one Python process, so that
what a block defines is there in the next ones. The folder holds:

- ``scans/healthy`` and ``scans/ill``, ``new-scans``, ``other-scanner``: small grey images,
- ``runs/scans``, trained on scans with healthy as normal, and ``runs/digits``, both tiny.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from raccgan import train
from tests.cli.test_commands import run, shapes
from tests.conftest import TINY_OPTIONS

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
PAGES = sorted(set((ROOT / "docs").glob("*.md")) - {INDEX})  # docs/api is made of docstrings

LONG = (
    "add-an-op", "distributed", "experiments", "export", "generate", "kernels", "measuring", "reliability", "results",
    "scores-and-thresholds", "your-images",
)  # fmt: skip
"""The pages whose commands take longest."""

# Runs the blocks on its standard input: [place, language, code, folder of a shell's block] each.
DRIVER = """
import json, subprocess, sys

namespace = {"__name__": "__main__"}
for place, language, code, folder in json.load(sys.stdin):
    print("+", place, file=sys.stderr, flush=True)
    if language == "sh":
        subprocess.run(["bash", "-eu", "-c", code], cwd=folder, stdin=subprocess.DEVNULL, check=True)
    else:
        exec(compile(code, place, "exec"), namespace)
"""


IN_REPOSITORY = "in the repository"


class Block(NamedTuple):
    """A fenced block: its language, what stands behind that (where it runs, or why it does not), what it holds."""

    line: int
    language: str
    note: str
    code: str

    @property
    def runs(self) -> bool:
        return self.note in ("", IN_REPOSITORY)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page that name a language that is run here."""
    found = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, rest, code = match.groups()
        if language in ("sh", "python"):
            block = Block(page[: match.start()].count("\n") + 1, language, rest.strip(), code)
            assert block.runs or re.fullmatch(r"not run: .{10,}", block.note), f"a fence with no reason: {rest!r}"
            found.append(block)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    shapes(folder / "scans", ["healthy", "ill"], 30)
    for name in ("new-scans", "other-scanner"):
        shapes(folder / name, ["."], 9)
    dataset = ["--dataset", "scans", "--normal", "healthy", "--image-size", 8, "--multipliers", "2,1"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(train, *dataset, "--out", "runs/scans", *TINY_OPTIONS) == 0
        assert run(train, "--out", "runs/digits", *TINY_OPTIONS) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.long if page.stem in LONG else (), id=page.stem) for page in PAGES]
)
def test_the_commands_of_a_page_run(page: Path, prepared: Path, tmp_path: Path) -> None:
    found = blocks(page.read_text("utf-8"))
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    # A pytest in a page is a reader's own, not a worker of ours.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")} | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    wanted = []
    for block in found:
        place = f"{page.name}:{block.line}"
        if block.runs:
            folder = ROOT if block.note == IN_REPOSITORY else tmp_path
            wanted.append([place, block.language, block.code, str(folder)])
        else:
            print(place, block.note)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(wanted),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert wanted, "a page without a block that runs"


def test_blocks_are_found_and_a_reason_is_asked_for() -> None:
    page = (
        "a\n```sh\nls\n```\n```text\nno\n```\n```sh not run: needs a GPU here\nx\n```\n"
        "```python\n1\n```\n```sh in the repository\ny\n```\n"
    )
    assert [(block.line, block.language, block.code) for block in blocks(page)] == [
        (2, "sh", "ls\n"), (8, "sh", "x\n"), (11, "python", "1\n"), (14, "sh", "y\n")
    ]  # fmt: skip
    assert [block.runs for block in blocks(page)] == [True, False, True, True]
    with pytest.raises(AssertionError, match="no reason"):
        blocks("```sh skip\nx\n```\n")


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\]\(([\w-]+)\.md\)", INDEX.read_text("utf-8"))
    assert sorted(linked) == [page.stem for page in PAGES]


def test_the_tests_that_the_page_on_reliability_names_are_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = [name for name in re.findall(r"[\w/]+(?:\.py)?", page) if Path(name).name.startswith("test_")]
    assert len(named) > 30
    for name in named:
        if name.endswith(".py"):
            assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), name
        else:
            assert f"def {name}(" in sources, name
