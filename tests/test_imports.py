"""Imports run one way: from the commands down to the kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import raccgan

PACKAGE = Path(raccgan.__file__).parent

COMMANDS = ("check", "train", "evaluate", "detect", "calibrate", "generate", "export", "experiment", "doctor")
FOLDERS = (
    "cli", "config", "data", "distributed", "errors", "estimator", "evaluation", "generation", "kernels", "models",
    "outputs", "scoring", "training",
)  # fmt: skip

LAYERS = (
    ("errors",),
    ("config", "kernels"),
    ("outputs",),
    ("models", "data", "distributed"),
    ("training", "scoring"),
    ("evaluation", "generation", "export", "estimator"),
    ("cli",),
    ("check", "train", "evaluate", "detect", "calibrate", "generate", "doctor", "experiment"),
    ("__main__", "experiment.__main__", "export.__main__"),
)
"""From the bottom to the top, without ``raccgan.``; the longest name that a module begins with counts."""


def modules() -> dict[str, Path]:
    """The files of the package by the name of the module, without ``raccgan.``."""
    names = {}
    for path in sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")}):  # rglob enters no link
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports anywhere in it, functions and TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in (name.removeprefix("raccgan.") for name in named if name.startswith("raccgan.")):
            whole, _, _ = name.rpartition(".")
            yield name if name in known else whole


def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: {to for to in imports(path, known) if to in known and to} for name, path in known.items() if name}


def layer(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for place, names in enumerate(LAYERS):
            if ".".join(parts[:end]) in names:
                return place
    raise AssertionError(f"raccgan.{module} is in no layer: add its folder to LAYERS")


def folder(module: str) -> str:
    return module.partition(".")[0]


def test_every_import_goes_down_or_stays_in_its_folder() -> None:
    wrong = {
        (name, to)
        for name, targets in arrows().items()
        for to in targets
        if layer(to) >= layer(name) and not (layer(to) == layer(name) and folder(to) == folder(name))
    }
    assert sorted(wrong) == []


def test_nothing_below_training_knows_of_ranks() -> None:
    for name, targets in arrows().items():
        if folder(name) in ("models", "data", "outputs", "kernels"):
            assert not {folder(to) for to in targets} & {"distributed", "cli"}, name


def test_no_import_leads_back() -> None:
    list(TopologicalSorter(arrows()).static_order())  # raises CycleError, which names the circle


def test_the_top_of_the_package_fits_into_a_head() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and not path.name.startswith("__")}
    assert found == {*COMMANDS, *FOLDERS} - {"py"}
    assert len(FOLDERS) <= 13


def test_the_rules_see_a_wrong_arrow() -> None:
    """The rules are about something: what an outline of the package forbids is found."""
    assert layer("outputs.files") < layer("models.density") < layer("scoring.scorer") < layer("evaluation.assessment")
    assert layer("export.graph") < layer("cli.options") < layer("export.__main__")
    assert {"config", "data.dataset", "distributed.collectives"} <= arrows()["training.run"]
