"""The scripts of examples/ run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from raccgan import train
from tests.cli.test_commands import run, shapes
from tests.conftest import TINY_OPTIONS

EXAMPLES = Path(__file__).parents[1] / "examples"


def said_by(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.check_output(command, env=environment, text=True).splitlines()


def test_score_folder_lists_every_image_with_the_most_anomalous_first(tmp_path: Path) -> None:
    shapes(tmp_path / "scans", ["healthy", "ill"], 30)
    shapes(tmp_path / "new", ["first", "second"], 5)
    (tmp_path / "new" / "notes.txt").write_text("no image")
    dataset = ["--dataset", tmp_path / "scans", "--normal", "healthy", "--image-size", 8, "--multipliers", "2,1"]
    assert run(train, *dataset, "--out", tmp_path / "run", *TINY_OPTIONS) == 0
    lines = said_by("score_folder.py", tmp_path / "run", tmp_path / "new")
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    named = {line.split()[-1] for line in lines}
    assert named == {str(path) for path in (tmp_path / "new").rglob("*.png")}
    assert all(re.search(r" (anomalous|normal) +most so at \d+, \d+ ", line) for line in lines)


def test_own_model_learns_under_a_gradient_penalty() -> None:
    estimates = [float(line.rpartition(" ")[2]) for line in said_by("own_model.py", 40)]
    assert len(estimates) == 4
    assert abs(estimates[0]) < 2  # of 0.0 at the start
    assert estimates[-1] > 5  # seen: 11.5; without the second derivatives the penalty stops nothing, or all
