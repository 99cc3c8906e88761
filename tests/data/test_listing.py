"""Patterns mean what Python's own glob says, but for links, and however the folders lie."""

import glob
import os
from pathlib import Path

import pytest

from raccgan.data.listing import list_images, matching
from raccgan.errors import InputError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("", "a", "a/b", "a/b/c", ".h", "d[1]"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("1.png", "10.png", "2.png", "x.PNG", ".hidden.png"):
            (tmp_path / folder / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*.png", "**/*.png", "*/*.png", "a/**/1*.png", "**/c/*.png", "**/b/**/*.png", "[a]/?.png", "./*.png",
        "*/b/*.png", "**/**/*.png", ".h/*.png", ".*/*.png", "*/b", "**/1.png", "no/*.png", "1.png/*.png", "d[[]1]/*",
        "{tmp}/**/*.png", "a/../*/*.png",
    ],
)  # fmt: skip
def test_a_pattern_means_what_glob_says(tree: Path, pattern: str) -> None:
    pattern = pattern.replace("{tmp}", str(tree))
    expected = {os.path.normpath(path) for path in glob.glob(pattern, recursive=True)}
    problems: list[str] = []
    assert {os.path.normpath(path) for path in matching(pattern, problems)} == expected
    assert expected or pattern in ("no/*.png", "1.png/*.png")
    assert problems == []


def test_files_below_come_in_natural_order_and_once(tree: Path) -> None:
    assert [str(path) for path in matching("a/**/*.png", [])][:4] == ["a/1.png", "a/2.png", "a/10.png", "a/b/1.png"]
    found = matching("**/a/**/**/*.png", [])
    assert len(found) == len(set(found)) == 9


def test_linked_folders_are_entered_by_name_alone(tree: Path) -> None:
    (tree / "link").symlink_to("a/b")
    (tree / "circle").symlink_to(".")
    assert Path("link/1.png") not in matching("**/*.png", [])
    assert Path("link/1.png") in matching("link/**/*.png", [])
    assert Path("link/1.png") in matching("*/1.png", [])


def test_an_unreadable_folder_is_refused_or_noted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is unreadable, so the system's own call says it here."""
    scandir = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"cannot read the folder .*a/b: Permission denied"):
        list_images(tree)
    problems: list[str] = []
    assert len(list_images(tree, problems)) == 12
    assert len(matching("**/*.png", problems)) == 9
    assert problems == [
        f"cannot read the folder {tree}/a/b: Permission denied",
        "cannot read the folder a/b: Permission denied",
    ]
