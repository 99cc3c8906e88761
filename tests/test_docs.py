"""Every command in docs/ is run as it stands, on tiny data, unless the page says why not.

A block whose fence reads ``sh`` or ``python`` is run. ``sh not run: REASON`` is not, and the reason is printed. The
blocks of one page run in order, in one folder, which holds:

- ``scans/healthy`` and ``scans/ill``, ``new-scans``, ``other-scanner``: small grey images,
- ``runs/scans``, trained on scans with healthy as normal, and ``runs/digits``, both tiny.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from raccgan import train
from tests.conftest import TINY_OPTIONS
from tests.test_commands import run, shapes

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))

RUNNERS: dict[str, Callable[[str], list[str]]] = {
    "sh": lambda code: ["bash", "-eu", "-c", code],
    "python": lambda code: [sys.executable, "-c", code],
}


class Block(NamedTuple):
    """A fenced block: its language, why it is not run if so, and what it holds."""

    line: int
    language: str
    why_not: str
    code: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page that name a language that is run here."""
    found = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, rest, code = match.groups()
        if language in RUNNERS:
            why_not = rest.strip()
            assert not why_not or re.fullmatch(r"not run: .{10,}", why_not), f"a fence with no reason: {rest!r}"
            found.append(Block(page[: match.start()].count("\n") + 1, language, why_not, code))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, prepared: Path, tmp_path: Path) -> None:
    found = blocks(page.read_text("utf-8"))
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for block in found:
        if block.why_not:
            print(f"{page.name}:{block.line} {block.why_not}")
            continue
        done = subprocess.run(
            RUNNERS[block.language](block.code),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}:{block.line}\n{block.code}{done.stdout}{done.stderr}"


def test_blocks_are_found_and_a_reason_is_asked_for() -> None:
    page = "a\n```sh\nls\n```\n```text\nno\n```\n```sh not run: needs a GPU here\nx\n```\n```python\n1\n```\n"
    assert [(block.line, block.language, block.code) for block in blocks(page)] == [
        (2, "sh", "ls\n"), (8, "sh", "x\n"), (11, "python", "1\n")
    ]  # fmt: skip
    assert [bool(block.why_not) for block in blocks(page)] == [False, True, False]
    with pytest.raises(AssertionError, match="no reason"):
        blocks("```sh skip\nx\n```\n")


def test_there_are_pages() -> None:
    assert {"your-images", "scores-and-thresholds"} <= {page.stem for page in PAGES}
