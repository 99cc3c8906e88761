import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raccgan.data.sources.registry import SOURCES, load_source
from raccgan.errors import InputError


def test_the_names_cost_no_heavy_import() -> None:
    script = (
        "import sys, raccgan.data.sources.registry, raccgan.data.splits\n"
        "print([name for name in ('torch', 'torchvision', 'sklearn', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_source_has_a_line_of_help() -> None:
    assert list(SOURCES) == [
        "digits",
        "mnist",
        "fashion-mnist",
        "mvtec",
        "chest-xray",
        "lung-ct",
        "covid-xray",
        "folder",
        "csv",
    ]
    for entry in SOURCES.values():
        assert entry.help
        assert "\n" not in entry.help


def test_digits() -> None:
    source = load_source("digits", Path("unused"))
    assert len(source.samples) == 1797
    assert source.classes == tuple("0123456789")
    assert source.channels == 1
    assert len({sample.key for sample in source.samples}) == 1797
    pixels = [sample.image for sample in source.samples]
    assert {image.dtype.name for image in pixels} == {"float32"}  # type: ignore[union-attr]
    assert (min(image.min() for image in pixels), max(image.max() for image in pixels)) == (0, 1)  # type: ignore[union-attr]
    train = sum(sample.split == "train" for sample in source.samples)
    assert train == pytest.approx(0.6 * 1797, abs=5)


def test_paths(tmp_path: Path, draw_classes: Callable[..., None]) -> None:
    draw_classes("screw/train", good=2)
    draw_classes("screw/test", good=1, hole=1)
    assert load_source("folder", tmp_path / "screw").name == "screw"
    assert (
        load_source(str(tmp_path / "screw"), Path("unused")).samples
        == load_source("folder", tmp_path / "screw").samples
    )
    assert load_source(str(tmp_path), Path("unused"), category="screw").name == "screw"
    assert load_source("mvtec", tmp_path, category="screw").name == "mvtec/screw"


def test_a_folder_called_like_a_source(
    tmp_path: Path, draw_classes: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_classes("digits", normal=2)
    monkeypatch.chdir(tmp_path)
    assert load_source("digits", tmp_path).channels == 1
    assert load_source("./digits", tmp_path).classes == ("normal",)


@pytest.mark.parametrize(
    ("dataset", "category", "message"),
    [
        (
            "Digit",
            None,
            "no dataset, folder or .csv file 'Digit'; did you mean 'digits'[?] the names are digits, mnist, ",
        ),
        ("nowhere/at/all", None, "'nowhere/at/all'; the names are digits"),
        ("nowhere.csv", None, "no file nowhere.csv"),
        ("digits", "screw", "this dataset has no categories, so 'screw' names nothing"),
    ],
)
def test_what_cannot_be_loaded(dataset: str, category: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_source(dataset, tmp_path, category=category)
