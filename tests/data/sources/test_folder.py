"""Every layout on the disk, and what is said where it is none."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raccgan.data.samples import Source
from raccgan.data.sources.folder import load_folder
from raccgan.data.sources.published import load_chest_xray, load_mvtec
from raccgan.data.splits import make_split
from raccgan.errors import InputError

Draw = Callable[..., Path]
DrawClasses = Callable[..., None]


def counts(source: Source) -> dict[tuple[str, str], int]:
    """(split, label) -> number of samples."""
    found: dict[tuple[str, str], int] = {}
    for sample in source.samples:
        found[sample.split, sample.label] = found.get((sample.split, sample.label), 0) + 1
    return found


@pytest.fixture
def screw(tmp_path: Path, draw: Draw, draw_classes: DrawClasses) -> Path:
    """A category as MVTec AD has it, in tmp_path/mvtec/screw."""
    draw_classes("mvtec/screw/train", good=11)
    draw_classes("mvtec/screw/test", good=2, scratch=2, hole=1)
    for name in ("scratch/0", "scratch/1", "hole/0"):
        draw(f"mvtec/screw/ground_truth/{name}_mask.png")
    return tmp_path / "mvtec" / "screw"


def test_mvtec_from_the_data_root(tmp_path: Path, screw: Path) -> None:
    source = load_mvtec(tmp_path, "screw")
    assert source.name == "mvtec/screw"
    assert source.classes == ("good", "hole", "scratch")
    assert (source.default_normal, source.default_protocol) == (("good",), "folder")
    assert counts(source) == {
        ("train", "good"): 11,
        ("test", "good"): 2,
        ("test", "hole"): 1,
        ("test", "scratch"): 2,
    }
    by_key = {sample.key: sample for sample in source.samples}
    assert by_key["mvtec/screw/test/scratch/1.png"].mask == screw / "ground_truth/scratch/1_mask.png"
    assert by_key["mvtec/screw/test/good/1.png"].mask is None
    split = make_split(source, None, ())
    assert [len(part) for part in (split.train, split.held_out, split.test)] == [9, 2, 5]


@pytest.mark.parametrize(
    ("load", "below"),
    [
        (load_mvtec, ""),
        (load_mvtec, "mvtec"),
        (load_mvtec, "mvtec/screw"),
        (load_folder, "mvtec"),
        (load_folder, "mvtec/screw"),
    ],
)
def test_mvtec_from_anywhere(tmp_path: Path, screw: Path, below: str, load: Callable[..., Source]) -> None:
    source = load(tmp_path / below)
    assert len(source.samples) == 16
    assert sum(sample.mask is not None for sample in source.samples) == 3
    prefix = "mvtec/screw/"[len(below) + bool(below) :]
    assert source.samples[0].key == f"{prefix}train/good/0.png"


def test_files_come_in_natural_order(tmp_path: Path, screw: Path) -> None:
    keys = [sample.key for sample in load_folder(screw).samples if sample.split == "train"]
    assert keys == [f"train/good/{index}.png" for index in range(11)]


@pytest.mark.parametrize("load", [load_mvtec, load_folder])
def test_category_errors(tmp_path: Path, screw: Path, draw_classes: DrawClasses, load: Callable[..., Source]) -> None:
    draw_classes("mvtec/bottle/train", good=2)
    draw_classes("mvtec/bottle/test", good=1)
    root = tmp_path / "mvtec"
    with pytest.raises(
        InputError, match=r"several categories: name one, for example --category bottle; .* bottle, screw"
    ):
        load(root)
    with pytest.raises(
        InputError, match=r"no category 'Screws'; did you mean 'screw'[?] the categories are bottle, screw"
    ):
        load(root, "Screws")
    assert len(load(root, "bottle").samples) == 3
    with pytest.raises(InputError, match=r"screw has no category: no folder in it has train/ and test/"):
        load_folder(screw, "test")


def test_mvtec_absent_or_something_else(tmp_path: Path, draw_classes: DrawClasses) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere: the data root holds mvtec/<category>/train/good"):
        load_mvtec(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no category: no folder in it has train/ and test/"):
        load_mvtec(tmp_path)
    draw_classes("train", a=1, b=1)
    draw_classes("test", a=1)
    with pytest.raises(InputError, match="has no class good"):
        load_mvtec(tmp_path)


def test_an_image_may_be_without_a_mask(screw: Path) -> None:
    (screw / "ground_truth/scratch/0_mask.png").unlink()
    masks = [sample.mask for sample in load_folder(screw).samples if sample.label == "scratch"]
    assert masks == [None, screw / "ground_truth/scratch/1_mask.png"]


def test_masks_may_carry_the_name_of_the_image(screw: Path) -> None:
    (screw / "ground_truth/hole/0_mask.png").rename(screw / "ground_truth/hole/0.png")
    masks = [sample.mask for sample in load_folder(screw).samples if sample.label == "hole"]
    assert masks == [screw / "ground_truth/hole/0.png"]


def test_official_split_of_classes(tmp_path: Path, draw_classes: DrawClasses) -> None:
    draw_classes("train", **{"9": 3, "10": 3})
    draw_classes("test", **{"9": 1, "10": 2, "1": 1})
    source = load_folder(tmp_path)
    assert source.classes == ("1", "9", "10")
    assert (source.default_normal, source.default_protocol) == ((), "one-vs-rest")
    assert source.official_split
    assert counts(source)["test", "10"] == 2


@pytest.mark.parametrize(("normal", "abnormal"), [("normal", "abnormal"), ("NORMAL", "SICK"), ("good", "bad")])
def test_normal_against_abnormal(tmp_path: Path, draw_classes: DrawClasses, normal: str, abnormal: str) -> None:
    draw_classes(".", **{normal: 10, abnormal: 5})
    source = load_folder(tmp_path)
    assert (source.default_normal, source.default_protocol) == ((normal,), "folder")
    assert not source.official_split
    split = make_split(source, None, ())
    assert len(split.train + split.held_out) == 6
    assert sum(split.is_anomalous(sample) for sample in split.test) == 5
    assert len(split.test) == 9
    swapped = make_split(source, None, [abnormal])
    assert sum(swapped.is_anomalous(sample) for sample in swapped.test) == 10


def test_two_usual_names_leave_the_choice_to_the_user(tmp_path: Path, draw_classes: DrawClasses) -> None:
    draw_classes(".", normal=2, good=2, bad=2)
    assert load_folder(tmp_path).default_normal == ()


def test_plain_classes_are_split_the_same_every_time(tmp_path: Path, draw: Draw, draw_classes: DrawClasses) -> None:
    draw_classes("x", cat=10, dog=5)
    first = load_folder(tmp_path / "x")
    assert counts(first) == {("train", "cat"): 6, ("test", "cat"): 4, ("train", "dog"): 3, ("test", "dog"): 2}
    (tmp_path / "x").rename(tmp_path / "moved")
    assert load_folder(tmp_path / "moved").samples == first.samples


def test_only_normal_images(tmp_path: Path, draw_classes: DrawClasses) -> None:
    draw_classes(".", normal=5)
    split = make_split(load_folder(tmp_path), None, ())
    assert not any(split.is_anomalous(sample) for sample in split.test)


def test_images_in_deeper_folders_belong_to_the_class(tmp_path: Path, draw: Draw) -> None:
    draw("normal/patient2/a.png")
    draw("normal/patient10/a.png")
    draw("normal/b.png")
    keys = [sample.key for sample in load_folder(tmp_path).samples]
    assert keys == ["normal/b.png", "normal/patient2/a.png", "normal/patient10/a.png"]


def test_what_is_ignored(tmp_path: Path, draw: Draw, draw_classes: DrawClasses) -> None:
    draw_classes(".", normal=2, abnormal=1)
    draw("normal/.hidden.png")
    draw("normal/.thumbnails/1.png")
    draw(".cache/1.png")
    draw("__MACOSX/1.png")
    (tmp_path / "normal/notes.txt").write_text("x")
    (tmp_path / "normal/Thumbs.db").write_text("x")
    (tmp_path / "README").write_text("x")
    source = load_folder(tmp_path)
    assert source.classes == ("abnormal", "normal")
    assert len(source.samples) == 3


@pytest.mark.parametrize(
    "ending", ["png", "PNG", "jpg", "JPG", "jpeg", "bmp", "tif", "TIFF", "webp", "gif", "pgm", "ppm"]
)
def test_image_endings(tmp_path: Path, draw: Draw, ending: str) -> None:
    draw(f"normal/a.{ending}")
    assert len(load_folder(tmp_path).samples) == 1


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L"], 1), (["L", "1"], 1), (["L", "RGB"], 3), (["RGB"], 3), (["RGBA"], 3), (["LA"], 1), (["P"], 3)],
)
def test_channels(tmp_path: Path, draw: Draw, modes: list[str], channels: int) -> None:
    for index, mode in enumerate(modes):
        draw(f"normal/{index}.png", mode=mode)
    assert load_folder(tmp_path).channels == channels


def test_grey_palette_is_grey(tmp_path: Path, draw: Draw) -> None:
    draw("normal/0.gif", mode="L")  # GIF stores a palette, here of greys
    assert load_folder(tmp_path).channels == 1


def test_a_damaged_file_does_not_stop_the_loading(tmp_path: Path, draw: Draw) -> None:
    draw("normal/0.png")
    (tmp_path / "normal/1.png").write_bytes(b"")
    assert len(load_folder(tmp_path).samples) == 2


def test_names_that_are_no_utf8(tmp_path: Path, draw: Draw) -> None:
    draw("normal/0.png")
    strange = os.fsencode(tmp_path) + b"/normal/\xff.png"
    try:
        Path(os.fsdecode(strange)).write_bytes((tmp_path / "normal/0.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    source = load_folder(tmp_path)
    assert [sample.key for sample in source.samples] == ["normal/0.png", r"normal/\xff.png"]
    assert sorted(sample.split for sample in source.samples) == ["test", "train"]


def test_loops_of_links_end(tmp_path: Path, draw_classes: DrawClasses) -> None:
    draw_classes(".", normal=2, abnormal=1)
    try:
        (tmp_path / "loop").symlink_to(tmp_path)
    except OSError:
        pytest.skip("no symbolic links here")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "normal/up").symlink_to(tmp_path)
    (tmp_path / "normal/self.png").symlink_to("self.png")
    source = load_folder(tmp_path)
    assert source.classes == ("abnormal", "normal")
    assert [sample.key for sample in source.samples if sample.label == "normal"] == [
        "normal/0.png",
        "normal/1.png",
        "normal/self.png",  # kept, so that verify names it
    ]


def test_a_pipe_is_no_image(tmp_path: Path, draw: Draw) -> None:
    draw("normal/0.png")
    try:
        os.mkfifo(tmp_path / "normal/1.png")
    except (AttributeError, OSError):
        pytest.skip("no named pipes here")
    assert len(load_folder(tmp_path).samples) == 1


def test_linked_class_folders_are_followed(tmp_path: Path, draw: Draw) -> None:
    draw("elsewhere/0.png")
    (tmp_path / "data").mkdir()
    try:
        (tmp_path / "data/normal").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no symbolic links here")
    assert [sample.key for sample in load_folder(tmp_path / "data").samples] == ["normal/0.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has neither images nor class folders: put the images into one folder a class, for example .*normal"),
        (["a.png"], "has images but no class folder"),
        (["normal/a.png", "empty/"], "no image in .*empty: add some"),
        (["normal/a.txt"], r"no image in .*normal \(left out: files of other kinds 1 \(.txt\)\)"),
        (["train/good/a.png"], "has train/ but no test/"),
        (["test/good/a.png"], "has test/ but no train/"),
        (["train/good/a.png", "test/a.png"], "test has images but no class folder"),
        (["train/good/a.png", "test/good/"], "no image in .*good"),
    ],
)
def test_no_layout(tmp_path: Path, draw: Draw, files: list[str], message: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(parents=True)
        elif name.endswith(".png"):
            draw(name)
        else:
            path.write_text("x")
    with pytest.raises(InputError, match=message) as caught:
        load_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere: name the folder that holds the images"):
        load_folder(tmp_path / "nowhere")


def test_unreadable_folder(tmp_path: Path, draw_classes: DrawClasses) -> None:
    draw_classes(".", normal=1, abnormal=1)
    locked = tmp_path / "normal"
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(InputError, match=r"cannot read the folder .*normal"):
            load_folder(tmp_path)
    finally:
        locked.chmod(0o755)


@pytest.mark.parametrize("below", ["", "chest_xray"])
def test_chest_xray(tmp_path: Path, draw_classes: DrawClasses, below: str) -> None:
    draw_classes("chest_xray/train", NORMAL=4, PNEUMONIA=2)
    draw_classes("chest_xray/test", NORMAL=2, PNEUMONIA=3)
    draw_classes("chest_xray/val", NORMAL=1)
    source = load_chest_xray(tmp_path / below)
    assert (source.default_normal, source.default_protocol) == (("NORMAL",), "folder")
    split = make_split(source, None, ())
    assert [len(part) for part in (split.train, split.held_out, split.test)] == [3, 1, 5]
    assert sum(split.is_anomalous(sample) for sample in split.test) == 3


def test_chest_xray_errors(tmp_path: Path, draw_classes: DrawClasses) -> None:
    with pytest.raises(
        InputError, match=r"no chest X-rays in .*: put train/ and test/, each with NORMAL/ and PNEUMONIA/"
    ):
        load_chest_xray(tmp_path)
    draw_classes("train", normal=1)
    draw_classes("test", normal=1)
    with pytest.raises(InputError, match="has the classes normal instead of NORMAL, PNEUMONIA"):
        load_chest_xray(tmp_path)
