"""Files are whole or not there, and what the machine refuses is one clear line."""

import csv
import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raccgan.errors import InputError
from raccgan.outputs.files import cell_text, prepare_out, write_atomically, write_csv, write_json, write_text


def disk_full(file: BinaryIO) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disk_full_as_torch_says_it(file: BinaryIO) -> None:
    try:
        disk_full(file)
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def test_a_new_file_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model.pt", lambda file: file.write(b"weights"))
    assert (tmp_path / "model.pt").read_bytes() == b"weights"
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("writer", [disk_full, disk_full_as_torch_says_it])
def test_a_full_disk_leaves_the_older_file_and_no_temporary_one(
    tmp_path: Path, writer: Callable[[BinaryIO], None]
) -> None:
    place = tmp_path / "model.pt"
    place.write_bytes(b"older")
    with pytest.raises(InputError, match=r"model\.pt: No space left on device; free some space$") as caught:
        write_atomically(place, writer)
    assert "\n" not in str(caught.value)
    assert place.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("reason", [KeyError("ours"), KeyboardInterrupt()])
def test_other_exceptions_pass_unchanged_and_clean_up(tmp_path: Path, reason: BaseException) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise reason

    with pytest.raises(type(reason)):
        write_atomically(tmp_path / "model.pt", fail)
    assert os.listdir(tmp_path) == []


def test_the_name_appears_only_when_the_content_is_complete(tmp_path: Path) -> None:
    place = tmp_path / "model.pt"

    def look(file: BinaryIO) -> None:
        file.write(b"all")
        assert not place.exists()

    write_atomically(place, look)
    assert place.exists()


def test_places_that_take_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null and its like, which must never be replaced
    for place in ("file/below.json", "missing/a.json", "folder", "pipe"):
        with pytest.raises(InputError, match=f"cannot write .*{place}: .*; name "):
            write_text(tmp_path / place, "{}")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_long_name_and_the_usual_permissions(tmp_path: Path) -> None:
    place = tmp_path / ("n" * 250)
    write_text(place, "x")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(place.stat().st_mode) == 0o666 & ~mask


def test_text_keeps_any_name(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Lunge 肺\r\n" + os.fsdecode(b"bad\xff"))
    assert (tmp_path / "a.txt").read_bytes() == "Lunge 肺\r\n".encode() + b"bad\\udcff"


def test_json_keeps_the_order_allows_null_and_refuses_nan(tmp_path: Path) -> None:
    place = tmp_path / "metrics.json"
    write_json(place, {"z": 1, "a": None, "name": "肺"})
    assert list(json.loads(place.read_text("utf-8")).items()) == [("z", 1), ("a", None), ("name", "肺")]
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(place, {"a": number})
    assert json.loads(place.read_text("utf-8"))["z"] == 1
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_csv_reads_back_and_no_file_name_is_a_formula(tmp_path: Path) -> None:
    place = tmp_path / "scores.csv"
    rows: list[list[object]] = [
        ["=cmd|' /C calc'!A0", -1.5, None],
        ["-0.5", "-dash.png", "@at"],
        ['with, comma "and" quote', "+1e-3", "two\nlines"],
        ["-", "\t=1", "plain=1"],
        ["'=1", "'plain", "\uff1d1"],
        ["\n=1", "''", "'-0.5"],
    ]
    write_csv(place, ["path", "score", "map"], rows)
    with open(place, newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read == [
        ["path", "score", "map"],
        ["'=cmd|' /C calc'!A0", "-1.5", ""],
        ["-0.5", "'-dash.png", "'@at"],
        ['with, comma "and" quote', "+1e-3", "two\nlines"],
        ["'-", "'\t=1", "plain=1"],
        ["''=1", "'plain", "'\uff1d1"],
        ["'\n=1", "''", "''-0.5"],
    ]
    back = [[cell_text(cell) for cell in row] for row in read[1:]]
    assert back == [["" if cell is None else str(cell) for cell in row] for row in rows]
    assert b"\r\n" not in place.read_bytes()


@given(st.text(alphabet=st.sampled_from("'=+-@\t\r\n\uff1d1.ea"), max_size=8))
def test_every_cell_reads_back_and_none_is_a_formula(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    place = tmp_path_factory.getbasetemp() / "cell.csv"
    write_csv(place, ["cell", "other"], [[text, 0]])
    with open(place, newline="", encoding="utf-8") as file:
        _, (cell, _) = csv.reader(file)
    assert cell_text(cell) == text
    assert not re.match("[=+\\-@\t\r\n\uff1d]", cell) or float(cell) == float(text)


def test_csv_refuses_a_ragged_row_and_keeps_the_older_table(tmp_path: Path) -> None:
    place = tmp_path / "scores.csv"
    place.write_text("older")
    with pytest.raises(ValueError, match="row 1 has 1 cells, the header 2"):
        write_csv(place, ["path", "score"], [["a", 1], ["b"]])
    assert place.read_text() == "older"


def test_the_run_folder_is_created_proven_and_left_clean(tmp_path: Path) -> None:
    folder = prepare_out(str(tmp_path / "runs" / "one"))
    assert folder == tmp_path / "runs" / "one"
    assert folder.is_dir()
    assert os.listdir(folder) == []
    (folder / "kept.txt").write_text("x")
    assert os.listdir(prepare_out(folder)) == ["kept.txt"]


def test_a_run_folder_that_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="ordinary file"):
        prepare_out(tmp_path / "file")
    with pytest.raises(InputError, match="file/below as the output folder: Not a directory"):
        prepare_out(tmp_path / "file" / "below")


def test_a_read_only_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(probe: Path, _: bytes) -> int:
        probe.touch()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(InputError, match="Read-only file system"):
        prepare_out(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []
