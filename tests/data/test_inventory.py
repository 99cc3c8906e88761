"""What is said of a data set after it is loaded: by ``check``, which then stops, and by the commands that go on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import check
from raccgan.cli import options
from raccgan.data.inventory import about_images, lines_of
from raccgan.data.sources.folder import load_folder
from raccgan.data.splits import make_split

Draw = Callable[..., Path]


@pytest.fixture
def parts(tmp_path: Path, draw: Draw) -> Path:
    """An official split with a validation part, one class with masks and one without."""
    counts = {"train/good": 5, "valid/good": 2, "valid/hole": 1, "test/good": 3, "test/hole": 2, "test/crack": 4}
    for folder, count in counts.items():
        for index in range(count):
            draw(f"{folder}/{index}.png", size=(16, 12))
    for index in range(2):
        draw_mask(tmp_path / f"ground_truth/hole/{index}.png")
    (tmp_path / "train/good/0.heic").write_text("")
    return tmp_path


def draw_mask(path: Path, *, inverted: bool = False, blank: bool = False) -> None:
    mask = np.zeros((12, 16), np.uint8)
    mask[2:5, 3:9] = 0 if blank else 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(255 - mask if inverted else mask).save(path)


def said(root: Path, *named: str) -> list[str]:
    source = load_folder(root)
    return lines_of(source, make_split(source, None, named))


def test_images_masks_and_files(parts: Path) -> None:
    name = parts.name
    assert said(parts) == [
        f"{name} has train: good 5; held out for the threshold (validation part): good 2; "
        "test: crack 4, good 3, hole 2; left out, anomalous but not in the test part: hole 1",
        "masks: 2 of the 6 anomalous test images have one; the 4 without are left out of pixel metrics",
        "17 images: 8-bit grey, 16 x 12 pixels; left out: files of other kinds 1 (.heic)",
    ]


def test_sizes_depths_and_no_masks(tmp_path: Path, draw: Draw) -> None:
    draw("good/0.png", size=(10, 8))
    draw("good/1.png", size=(20, 9))
    draw("good/2.png", size=(20, 9))
    draw("bad/0.png", mode="RGB", size=(10, 8))
    lines = said(tmp_path)
    assert lines[1] == "masks: none, so that nothing is known of pixels"
    assert lines[2] == "4 images: 8-bit grey and 8-bit colour, 10 x 8 to 20 x 9 pixels"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"inverted": True}, "2 of 2 masks mark more than half of the image: white is anomalous, so invert them"),
        ({"blank": True}, "2 of 2 masks mark nothing, in images that are not normal"),
    ],
)
def test_odd_masks(parts: Path, changes: dict[str, bool], note: str) -> None:
    for index in range(2):
        draw_mask(parts / f"ground_truth/hole/{index}.png", **changes)
    assert any(line.startswith(f"note: {note}") for line in said(parts))


def test_masks_that_mark_normal_images(parts: Path) -> None:
    draw_mask(parts / "ground_truth/good/0.png")
    assert any(line.startswith("note: 1 of 3 masks mark pixels of a normal image") for line in said(parts))


@pytest.mark.parametrize(
    ("pixels", "dark"),
    [
        (np.array([[0, 4095]], np.uint16), True),
        (np.array([[0, 4097]], np.uint16), False),
        (np.array([[0, 15]], np.uint8), True),
        (np.array([[0, 16]], np.uint8), False),
        (np.array([[0, 255]], np.int32), True),
        (np.array([[0, 0]], np.uint8), False),
    ],
)
def test_images_that_use_a_sixteenth_of_their_scale(tmp_path: Path, pixels: np.ndarray, dark: bool) -> None:
    paths = [tmp_path / f"{i}.tif" for i in range(3)]
    for path in paths:
        Image.fromarray(pixels).save(path)
    lines = about_images(paths, {})
    assert [line.startswith("note: no image passes") for line in lines[1:]] == [True] * dark
    assert all("--brightness level" in line for line in lines[1:])


def test_a_file_of_several_pages(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), 200), Image.new("L", (8, 8))]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert about_images([tmp_path / "a.tif"], {})[1:] == [
        "note: 1 TIFF files have several pages, of which the first is read"
    ]


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    status = options.call(check.main, list(map(str, arguments)))
    out, err = capsys.readouterr()
    return status, out.splitlines(), [line for line in err.splitlines() if not line.startswith("reading images")]


def test_check_says_it_and_stops(parts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(parts.rglob("*"))
    status, out, err = checked(capsys, parts)
    assert (status, err) == (0, [])
    assert out == [*said(parts), "every image can be read"]
    assert sorted(parts.rglob("*")) == before


def test_check_names_what_cannot_be_read(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (parts / "test/crack/0.png").write_bytes(b"")
    (parts / "ground_truth/hole/1.png").write_bytes(b"no image")
    status, out, err = checked(capsys, parts)
    assert status == 1
    assert out[-1] == "2 cannot be used: see the lines on what was skipped"
    assert len([line for line in err if line.startswith("skipped: ")]) == 2


def test_check_reads_what_training_leaves_alone(
    tmp_path: Path, draw_classes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Anomalous images of the training part, which tables of experiments look at."""
    draw_classes(".", **{"train/good": 4, "train/bad": 2, "test/good": 2, "test/bad": 2})
    (next((tmp_path / "train/bad").iterdir())).write_bytes(b"")
    status, out, err = checked(capsys, tmp_path)
    assert status == 1
    assert out[-1] == "1 cannot be used: see the lines on what was skipped"
    assert "train/bad" in err[-1]


def test_check_says_what_there_is_where_it_refuses(
    tmp_path: Path, draw_classes: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    draw_classes(".", cat=4, dog=4)
    status, out, err = checked(capsys, tmp_path)
    assert status == 2
    assert out[0].endswith("has train: cat 2, dog 2; test: cat 2, dog 2")
    assert "name it, for example --normal cat" in err[0]
    assert checked(capsys, tmp_path, "--normal", "dog")[0] == 0
