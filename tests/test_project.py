"""What stands in several files of the project at once agrees."""

from __future__ import annotations

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
    if not (ROOT / "raccgan" / "__main__.py").is_file():
        pytest.skip("raccgan/__main__.py is not there")


def test_type_information_is_packaged() -> None:
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["raccgan"]
    assert (ROOT / "raccgan" / "py.typed").is_file()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_a_page_links_to_are_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_package_of_a_workflow_and_of_the_hooks_is_pinned_or_ours() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    entries = re.findall(r"entry: (\S+)", hooks)
    test_extra = PROJECT["project"]["optional-dependencies"]["test"]
    assert {entry for entry in entries if not any(line.startswith(entry) for line in test_extra)} == set()
    for workflow in (ROOT / ".github" / "workflows").iterdir():
        text = workflow.read_text("utf-8")
        assert re.findall(r"- run: (\S+)", text) == [".ci/run"]
