"""What stands in several files of the project at once agrees."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

import raccgan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_version_is_said_once_and_the_others_follow() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "raccgan.__version__"}
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    released = re.findall(r"^## (\d\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    date = re.search(r'^date-released: "(\S+)"$', (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert citation is not None
    assert date is not None
    assert released[0] == (raccgan.__version__, date[1])
    assert citation[1] == raccgan.__version__


def test_the_command_is_installed() -> None:
    module, _, function = PROJECT["project"]["scripts"]["raccgan"].partition(":")
    assert (module, function) == ("raccgan.__main__", "main")
    assert callable(importlib.import_module(module).main)


def test_type_information_is_packaged() -> None:
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["raccgan"]
    assert (ROOT / "raccgan" / "py.typed").is_file()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_a_page_links_to_are_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_hooks_and_workflows_use_what_is_installed_and_ci_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    tools = set(re.findall(r"entry: (\S+)", hooks))
    installed = {
        re.split(r"[<>=;\[ ]", line)[0] for line in PROJECT["tool"]["raccgan"]["optional-dependencies"]["test"]
    }
    assert tools
    assert tools <= installed
    for workflow in (ROOT / ".github" / "workflows").iterdir():
        assert re.findall(r"- run: (\S+)", workflow.read_text("utf-8")) == [".ci/run"]
