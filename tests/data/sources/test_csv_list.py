import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raccgan.data.sources.csv_list import load_csv
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import make_split
from raccgan.errors import InputError

Draw = Callable[..., Path]

GOOD = """path,label,split,mask
img/0.png,good,train,
img/1.png,good,TRAIN,

img/2.png, good ,test,
"img/3, really.png",crack,test,img/m.png
"""


@pytest.fixture
def listed(tmp_path: Path, draw: Draw) -> Path:
    """A folder with the images that GOOD names."""
    for name in ("0", "1", "2", "3, really", "m"):
        draw(f"img/{name}.png")
    return tmp_path


def test_a_list(listed: Path) -> None:
    (listed / "list.csv").write_text(GOOD)
    source = load_csv(listed / "list.csv")
    assert [(s.key, s.label, s.split) for s in source.samples] == [
        ("img/0.png", "good", "train"),
        ("img/1.png", "good", "train"),
        ("img/2.png", "good", "test"),
        ("img/3, really.png", "crack", "test"),
    ]
    assert [s.mask for s in source.samples] == [None, None, None, listed / "img/m.png"]
    assert (source.name, source.classes, source.channels) == ("list.csv", ("crack", "good"), 1)
    split = make_split(source, None, ())
    assert [len(part) for part in (split.train, split.held_out, split.test)] == [1, 1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_spreadsheets_write(listed: Path, encoding: str, newline: str) -> None:
    text = "Path,Label,Split,patient\nimg/0.png,größe,train,1\nimg/1.png,b,test\n"
    (listed / "list.CSV").write_bytes(text.replace("\n", newline).encode(encoding))
    source = load_source(str(listed / "list.CSV"), Path("unused"))
    assert source.classes == ("b", "größe")
    assert source.default_normal == ()


def test_absolute_paths_and_the_only_list_of_a_folder(listed: Path) -> None:
    (listed / "list.csv").write_text(f"path,label,split\n{listed / 'img/0.png'},a,train\n")
    assert load_source("csv", listed).samples[0].image == listed / "img/0.png"
    problems: list[str] = []
    (listed / "list.csv").write_text("path,label,split\nnone.png,a,train\nimg/0.png,a,train\n")
    assert len(load_source("csv", listed, problems=problems).samples) == len(problems) == 1
    (listed / "other.csv").write_text("")
    with pytest.raises(InputError, match=r"should hold one .csv file, and holds list.csv, other.csv"):
        load_source("csv", listed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv line 1: no column path, label, split; the first line has to name"),
        ("path,label\n", "list.csv line 1: no column split"),
        ("path|label|split\n", "line 1: no column path, label, split; .* with commas"),
        (
            "image,file_name,label,split\n",
            "line 1: the columns image and file_name may both be the path: call one path",
        ),
        ("path,label,split\nC:\\gone\\9.png,a,train\n", r"line 2: no file C:.gone.9.png; paths are relative to"),
        ("path,label,split\n", "has a header but no images"),
        (
            "path,label,split\nimg/0.png,a,train\nimg/9.png,a,train\n",
            "line 3: no file img/9.png; paths are relative to",
        ),
        ("path,label,split\nimg,a,train\n", "line 2: no file img;"),
        ("path,label,split\n\nimg/0.png,a,extra\n", "line 3: the split is 'extra'; it has to be train, test or valid"),
        ("path,label,split\nimg/0.png,,train\n", "line 2: no label"),
        ("path,label,split\nimg/0.png,a\n", "line 2: no split"),
        ("path,label,split\n,a,test\n", "line 2: no path"),
        ("path,label,split,mask\nimg/0.png,a,test,img/x.png\n", "line 2: no file img/x.png"),
        (
            "path,label,split\nimg/0.png,a,train\nimg/../img/0.png,a,test\n",
            "line 3: img/../img/0.png is on line 2 already; remove one",
        ),
        ("path,label,split\n" + "x" * 200_000 + ",a,train\n", "line 2: field larger"),
        ('path,label,split,"' + "x" * 200_000, "line 1: field larger"),
        ("path,label,split\n" + "x" * 400 + ",a,train\n", "line 2: no file xxx"),  # longer than a name may be
        ("path,label,split\n" + "x," * 200_000, "line 2: longer than 262144 characters"),
        ("x" * 300_000, "line 1: longer than 262144 characters"),
        ("path,label,split\nimg/0.png,\x1b[31mred,train\n", r"line 2: the label \\x1b\[31mred holds characters"),
        ('path,label,split\nimg/0.png,"a\nb",train\n', r"the label a\\x0ab holds characters that cannot be seen"),
        ("path,label,split\nimg/\0.png,a,train\n", "line 2: no file img/"),
    ],
)
def test_lines_that_cannot_be_used(listed: Path, text: str, message: str) -> None:
    (listed / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_csv(listed / "list.csv")
    assert "list.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cells_as_our_own_tables_write_them(listed: Path, draw: Draw) -> None:
    """What a spreadsheet would run has a ' before it there, and bytes that are no text are escaped."""
    for name in ("=1.png", "'+2.png", os.fsdecode(b"\xff.png"), r"\xff.png", "'plain.png"):
        os.rename(draw("new.png"), listed / name)
    names = ["'=1.png", "''+2.png", r"\xff.png", r"\\xff.png", "'plain.png"]
    lines = [f"{name},'=label,{'test' if place else 'train'}\n" for place, name in enumerate(names)]
    (listed / "list.csv").write_text("path,label,split\n" + "".join(lines))
    source = load_csv(listed / "list.csv")
    assert [sample.image.name for sample in source.samples if isinstance(sample.image, Path)] == [
        "=1.png", "'+2.png", os.fsdecode(b"\xff.png"), r"\xff.png", "'plain.png"
    ]  # fmt: skip
    assert source.classes == ("=label",)
    assert [sample.key for sample in source.samples][2:4] == [r"\xff.png", r"\\xff.png"]


def test_another_encoding_is_refused(listed: Path) -> None:
    (listed / "list.csv").write_bytes("path,label,split\nimg/0.png,größe,train\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"list.csv is not UTF-8"):
        load_csv(listed / "list.csv")


def test_absent_list(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no file .*nowhere.csv: name a .csv file with the columns path, label, split"
    ):
        load_csv(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "header",
    ["path label split mask", "image class set mask_path", "FileName label split ground_truth",
     "filepath label split gt",
     "file_name target phase mask", "image_path defect_type subset mask_file"],
)  # fmt: skip
def test_columns_as_other_programs_call_them(listed: Path, separator: str, header: str) -> None:
    rows = [header.split(), ["img/0.png", "good", "Train", ""], ["img/1.png", "bad", "testing", "img/m.png"]]
    (listed / "list.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    found = [(s.key, s.label, s.split, s.mask) for s in load_csv(listed / "list.csv").samples]
    assert found == [("img/0.png", "good", "train", None), ("img/1.png", "bad", "test", listed / "img/m.png")]


def test_a_validation_part(listed: Path) -> None:
    lines = ["img/0.png,good,train", "img/1.png,good,val", "img/2.png,good,test"]
    (listed / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    split = make_split(load_csv(listed / "list.csv"), None, ())
    assert [sample.key for sample in split.held_out] == ["img/1.png"]


@pytest.mark.parametrize(
    ("cell", "by_end"),
    [
        (r"img\0.png", False), (r".\img\0.png", False), (r"C:\Users\me\data\img\0.png", True),
        (r"\\server\share\img\0.png", True), ("/home/somebody/data/img/0.png", True), ("D:/x/img/0.png", True),
    ],
)  # fmt: skip
def test_paths_of_another_machine(listed: Path, cell: str, by_end: bool) -> None:
    (listed / "list.csv").write_text(f"path,label,split,mask\n{cell},good,train,{cell.replace('0.png', 'm.png')}\n")
    source = load_csv(listed / "list.csv")
    assert source.samples[0].key == "img/0.png"
    assert source.samples[0].image == listed / "img/0.png"
    assert source.samples[0].mask == listed / "img/m.png"
    assert bool(source.notes) == by_end
    assert not by_end or "1 lines of" in source.notes[0]
    (listed / "list.csv").write_text(f"path,label,split\n{cell},good,train\nimg/1.png,good,train\n")
    notes = load_csv(listed / "list.csv").notes
    assert [note.endswith("such as img/0.png") for note in notes] == [True] * by_end


def test_a_list_in_a_folder_of_lists_and_its_categories(listed: Path) -> None:
    (listed / "lists").mkdir()
    path = listed / "lists/all.csv"
    path.write_text("object,path,label,split\nscrew,img/0.png,good,train\nnut,img/1.png,good,train\n")
    assert [s.key for s in load_csv(path, category="nut").samples] == ["img/1.png"]
    with pytest.raises(InputError, match=r"several categories: name one, for example --category screw; .* screw, nut"):
        load_csv(path)
    with pytest.raises(InputError, match=r"no category 'nuts'; did you mean 'nut'"):
        load_csv(path, category="nuts")
