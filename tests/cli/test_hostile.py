"""Folders that somebody else made: names, links and images that are meant to do harm, through the commands.

What cannot be used costs one line; the rest goes on; no terminal, table, page or spreadsheet obeys a name.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import detect, evaluate, train
from raccgan.data.images.opening import MOST_PIXELS
from raccgan.data.samples import path_of
from raccgan.outputs.files import cell_text
from tests.cli.test_commands import refused, run, shapes, table
from tests.cli.test_crash import ROOT
from tests.conftest import TINY_OPTIONS

ODD = (
    b"\x1b[31mred\x1b]0;title\x07.png",
    b"two\nlines\r.png",
    b"=cmd|'C calc'!A0.png",
    b"+1.png",
    b"@SUM(1).png",
    b"-2.png",
    b"'=quoted.png",
    b"\ttab.png",
    b"\xff\xfe.png",
    rb"\xff\xfe.png",  # what a table shows of the one before, if it does not take care
    "\u202egnp.exe".encode() + b".png",
    "\u2028line.png".encode(),
    b'comma, "quote";semicolon.png',
    b"<b>bold&amp;.png",
    b"%s%n{0}$(touch ran)`touch ran`.png",
    "größe 肺 👨\u200d👩.png".encode(),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with an image of its own for every odd name, and an empty file for each."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, name in enumerate(ODD):
        Image.new("L", (8, 8), 15 * i).save(folder / "plain.png")
        os.rename(folder / "plain.png", os.fsencode(folder) + b"/" + name)
        open(os.fsencode(folder) + b"/empty " + name, "wb").close()
    return folder


def is_harmless(said: str) -> None:
    """Printable, but for the ends of lines."""
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", said), repr(said)


def test_odd_names_through_journal_tables_page_and_terminal(
    trained: Path, odd: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(detect, trained, odd, "--out", out, "--report", "--maps", "--overlays") == 1
    said = capfd.readouterr()
    is_harmless(said.out + said.err)
    assert len([line for line in said.err.splitlines() if line.startswith("skipped: ")]) == len(ODD), "one line each"
    assert len(said.out.splitlines()) == 1
    rows, records = table(out / "scores.csv"), json.loads((out / "scores.json").read_text())
    assert len(rows) == len(records) == len(ODD)
    for name in ("scores.csv", "scores.json", "summary.json", "report.html"):
        is_harmless((out / name).read_text("utf-8", errors="strict"))
    assert len((out / "scores.csv").read_text().splitlines()) == len(ODD) + 1
    for row, record in zip(rows, records, strict=True):
        assert not re.match(r"[=+\-@\t\r]", row["path"])
        path = path_of(cell_text(row["path"]))
        assert path == path_of(record["path"])
        assert path.is_file(), "the name leads back to the file"
        assert float(row["score"]) == record["score"]
        assert (out / record["map"]).is_file()
        assert (out / record["overlay"]).is_file()
    assert len({record["path"] for record in records}) == len({record["score"] for record in records}) == len(ODD)


def test_a_list_of_ours_leads_back_to_odd_files(trained: Path, odd: Path, tmp_path: Path) -> None:
    """Our own table, read by pandas, written by pandas with two columns more, and read as a data set."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    assert run(detect, trained, odd, "--out", tmp_path / "out") == 1
    frame = pandas.read_csv(tmp_path / "out" / "scores.csv")
    assert len(frame) == len(ODD)
    frame["label"], frame["split"] = ["good", "=bad"] * (len(ODD) // 2), "test"
    frame.loc[:7, "split"] = "train"
    frame.to_csv(tmp_path / "list.csv", index=False)
    small = ["--image-size", "8", "--multipliers", "1,1", "--batch-size", "2", "--channels", "1"]
    assert run(train, "--dataset", tmp_path / "list.csv", *TINY_OPTIONS, *small, "--out", tmp_path / "run") == 0
    rows = table(tmp_path / "run" / "scores.csv")
    assert len(rows) == len(ODD) // 2
    assert {cell_text(row["class"]) for row in rows} == {"good", "=bad"}
    assert {row["class"] for row in rows} == {"good", "'=bad"}
    assert all(path_of(cell_text(row["path"])).is_file() for row in rows)


def test_two_files_whose_names_look_alike_are_scored_apart(trained: Path, tmp_path: Path) -> None:
    dark, bright = tmp_path / os.fsdecode(b"\xff.png"), tmp_path / r"\xff.png"
    for path, grey in ((dark, 0), (bright, 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / "plain.png")
        os.rename(tmp_path / "plain.png", path)
    assert run(detect, trained, dark, bright, "--out", tmp_path / "out") == 0
    first, second = table(tmp_path / "out" / "scores.csv")
    assert first["path"] != second["path"]
    assert first["score"] != second["score"]


def png(width: int, height: int, colour: int, depth: int = 8) -> bytes:
    """Zeros only, so that it is a thousandth of its pixels; colour 0 is grey, 6 has alpha."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + width * {0: 1, 6: 4}[colour] * depth // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_canvas(side: int) -> bytes:
    """An animation that is two small frames on a canvas of that side."""
    extended = bytes([0x02, 0, 0, 0]) + 2 * (side - 1).to_bytes(3, "little")
    content = b"WEBPVP8X" + struct.pack("<I", 10) + extended + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def test_images_that_claim_to_be_huge_cost_a_line_and_no_memory(trained: Path, tmp_path: Path) -> None:
    """Eight of them beside one good image; the process says itself how much memory it took at the most."""
    folder = tmp_path / "bombs"
    folder.mkdir()
    Image.new("L", (8, 8), 80).save(folder / "good.png")
    for i in range(4):
        (folder / f"bits-{i}.png").write_bytes(png(30_000, 30_000, 0, 1))
    (folder / "header.png").write_bytes(
        png(1, 1, 0).replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1))
    )
    (folder / "canvas.webp").write_bytes(webp_canvas(1 << 24))
    (folder / "screen.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;")
    (folder / "grey.pgm").write_bytes(b"P5 2000000 2000000 255\n\0")
    with (folder / "sparse.webp").open("wb") as sparse:  # Pillow reads such a file whole before it looks at it
        sparse.write(b"RIFF\xf0\xff\xff\xffWEBPVP8L")
        sparse.truncate(4 << 30)
    measured = (
        "import resource, sys; from raccgan import detect; from raccgan.cli import options\n"
        "status = options.call(detect.main, sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", measured, str(trained), str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    found, *lines, most = done.stderr.splitlines()
    assert found == "10 images: 8-bit grey, 8 x 8 pixels"
    assert len(lines) == 9, lines
    assert all(line.startswith("skipped: ") for line in lines)
    assert sum(f"has more than {MOST_PIXELS} pixels" in line for line in lines) >= 6
    assert [Path(row["path"]).name for row in table(tmp_path / "out" / "scores.csv")] == ["good.png"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert int(most) < before + 300_000, "kilobytes; one of these images would take gigabytes"


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """``data``, a folder that has 2500 others one in the other; the last thousand are past what a path may be long."""
    folder = tmp_path / "data"
    folder.mkdir()
    where = os.open(folder, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=where)
        below = os.open("d", os.O_RDONLY, dir_fd=where)
        os.close(where)
        where = below
    os.close(where)
    yield folder
    subprocess.run(["rm", "-rf", str(folder / "d")], check=True)  # Python's own removal does not get that deep


def test_links_and_depth_end(trained: Path, deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links to the folder that they lie in, to each other and to nothing; folders nested past Python's recursion."""
    Image.new("L", (8, 8), 80).save(deep / "good.png")
    (deep / "here").symlink_to(".")
    (deep / "again").symlink_to(".")
    (deep / "one.png").symlink_to("two.png")
    (deep / "two.png").symlink_to("one.png")
    (deep / "gone.png").symlink_to("nowhere")
    (deep / "zero.png").symlink_to("/dev/zero")
    (deep / "chain-0.png").symlink_to("good.png")
    for i in range(30):
        (deep / f"chain-{i + 1}.png").symlink_to(f"chain-{i}.png")
    os.mkfifo(deep / "pipe.png")
    for i, argument in enumerate((deep, f"{deep}/**/*.png", f"{deep}/**")):
        capsys.readouterr()
        assert run(detect, trained, argument, "--out", tmp_path / f"out-{i}") == 1
        said = capsys.readouterr().err
        for name in ("one.png", "two.png", "gone.png", "zero.png"):
            assert len(re.findall(rf"^skipped: .*data/{name}", said, re.MULTILINE)) == 1, said
        assert len(re.findall(r"^skipped: cannot read the folder .*: File name too long$", said, re.MULTILINE)) == 1
        names = [Path(row["path"]).name for row in table(tmp_path / f"out-{i}" / "scores.csv")]
        assert names == [*(f"chain-{i}.png" for i in range(31)), "good.png"]


def test_a_journal_and_results_that_somebody_laid(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8), 80).save(tmp_path / "a.png")
    out = tmp_path / "out"
    out.mkdir()
    for content in (
        b"{}\n\xff\xfe\n",
        b"[1]\n5\n",
        b"{}\n[1]\n",
        b'{}\n[{"path": 1}]\n',
        b"[" * 100_000 + b"\n",
        b"\0\n",
    ):
        (out / "scores.part").write_bytes(content)
        assert "is damaged: add --restart" in refused(capsys, detect, trained, tmp_path / "a.png", "--out", out)
    (out / "scores.part").unlink()
    for content in (b"[1]", b'{"made_with": 1}', b"\xff", b"[" * 100_000, b"{}"):
        (out / "summary.json").write_bytes(content)
        assert "is not of this command" in refused(capsys, detect, trained, tmp_path / "a.png", "--out", out)
    (out / "summary.json").unlink()
    (out / "maps").write_text("in the way")
    line = refused(capsys, detect, trained, tmp_path / "a.png", "--out", out, "--maps")
    assert f"{out / 'maps'}: File exists" in line
    (out / "maps").unlink()
    (out / "scores.part").unlink()
    (out / "scores.part").mkdir()
    assert "cannot write" in refused(capsys, detect, trained, tmp_path / "a.png", "--out", out)


def test_a_picture_in_a_journal_that_is_none(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page made of a journal that somebody changed would hold what they wrote there."""
    Image.new("L", (8, 8), 80).save(tmp_path / "a.png")
    command = [trained, tmp_path / "a.png", "--out", tmp_path / "out", "--report"]
    with monkeypatch.context() as patch:
        patch.setattr("raccgan.scoring.record.Table.of", lambda *arguments: stop())
        assert run(detect, *command) == 130
    journal = tmp_path / "out" / "scores.part"
    text = journal.read_text()
    hostile = re.sub(r"data:image/[^\"]*", "</script><script>window.ran=1</script>", text)
    assert hostile != text
    journal.write_text(hostile)
    assert "a picture of it is no picture; add --restart" in refused(capsys, detect, *command)
    assert not (tmp_path / "out" / "report.html").exists()
    assert run(detect, *command, "--restart") == 0


def stop() -> None:
    raise KeyboardInterrupt


def test_nothing_readable_leaves_no_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    for more in ([], ["--maps", "--overlays", "--report"]):
        out = tmp_path / "a" / "out"
        assert "none of the 1 files" in refused(capsys, detect, trained, tmp_path / "bad.png", "--out", out, *more)
        assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    refused(capsys, detect, trained, tmp_path / "bad.png", "--out", tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_broken_test_image_is_named_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes(tmp_path / "train", ["good"], 20)
    shapes(tmp_path / "test", ["good", "bad"], 3)
    data = ["--dataset", tmp_path, "--normal", "good", *TINY_OPTIONS, "--image-size", "8", "--multipliers", "1,1"]
    (tmp_path / "test" / "bad" / "1.png").write_bytes(b"")
    line = refused(capsys, train, *data, "--out", tmp_path / "run")
    assert "test/bad/1.png is empty" in line
    assert not (tmp_path / "run").exists()


def test_training_and_evaluation_go_on_without_what_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by default, before anything is trained; with --unreadable skip one line each, and the rest goes on."""
    shapes(tmp_path, ["good", "bad"], 24)
    rows = [f"{label}/{i}.png,{label},{'train' if i < 12 else 'test'}" for label in ("good", "bad") for i in range(24)]
    rows += ["good/99.png,good,train", "good/0.png", ",good,train", "good/1.png,good,test", "good/2.png,good,later"]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    (tmp_path / "good" / "3.png").write_bytes(b"")
    (tmp_path / "bad" / "20.png").write_bytes(b"no image")
    small = [*TINY_OPTIONS, "--image-size", "8", "--multipliers", "1,1", "--batch-size", "4"]
    command = [train, "--dataset", tmp_path / "list.csv", *small, "--out", tmp_path / "run"]
    assert "line 50: no file good/99.png" in refused(capsys, *command)
    assert not (tmp_path / "run").exists()
    assert run(*command, "--unreadable", "skip") == 0
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 7
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sum(metrics["images"].values()) == 11 + 12 + 11, "training images, and those to test"
    rows_of_training = table(tmp_path / "run" / "scores.csv")
    assert len(rows_of_training) == 23
    (tmp_path / "bad" / "21.png").write_bytes(b"")
    assert run(evaluate, tmp_path / "run", "--out", tmp_path / "judged") == 0, "the run's own setting"
    assert len(table(tmp_path / "judged" / "scores.csv")) == 22
    assert "none of the" in refused(capsys, train, *broken_everywhere(tmp_path), "--out", tmp_path / "other")


def broken_everywhere(place: Path) -> list[object]:
    shapes(place / "other", ["good", "bad"], 9)
    for path in (place / "other" / "good").iterdir():
        path.write_bytes(b"")
    small = [*TINY_OPTIONS, "--image-size", "8", "--multipliers", "1,1", "--batch-size", "4"]
    return ["--dataset", place / "other", *small, "--unreadable", "skip"]


def test_odd_classes_to_the_last_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Folders of classes with such names, through training, evaluation and the page."""
    for name in (b"=1+1", b"\x1b[31m", b"a\nb", b"\xff", b"<script>window.ran=1<script>"):
        shapes(tmp_path / "data", ["plain"], 6)
        os.rename(tmp_path / "data" / "plain", os.fsencode(tmp_path / "data") + b"/" + name)
    small = [*TINY_OPTIONS, "--image-size", "8", "--multipliers", "1,1", "--batch-size", "2", "--normal", r"=1+1,\xff"]
    protocol = ["--dataset", tmp_path / "data", "--protocol", "one-vs-rest"]
    assert run(train, *protocol, *small, "--out", tmp_path / "run") == 0
    assert run(evaluate, tmp_path / "run", "--out", tmp_path / "judged", "--report") == 0
    said = capfd.readouterr()
    is_harmless(said.out + said.err)
    for name in ("scores.csv", "metrics.json", "report.html"):
        is_harmless((tmp_path / "judged" / name).read_text("utf-8"))
    classes = {cell_text(row["class"]) for row in table(tmp_path / "judged" / "scores.csv")}
    assert classes == {"=1+1", r"\x1b[31m", r"a\x0ab", r"\xff", "<script>window.ran=1<script>"}
    assert not re.search(r"^[^,]*,=", (tmp_path / "judged" / "scores.csv").read_text(), re.MULTILINE)
    np.testing.assert_equal(
        json.loads((tmp_path / "judged" / "metrics.json").read_text())["normal_classes"], ["=1+1", r"\xff"]
    )
