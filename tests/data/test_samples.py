import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raccgan.data.samples import Sample, natural_key, path_of, printable
from raccgan.outputs.terminal import one_line


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["b", "B2", "b10", "a", "A1"], ["a", "A1", "b", "B2", "b10"]),
        (["img12.png", "img2.png", "img.png"], ["img2.png", "img12.png", "img.png"]),
        (["01", "1", "001"], ["001", "01", "1"]),
        (["²", "2", "x"], ["2", "x", "²"]),
    ],
)
def test_natural_order(given: list[str], ordered: list[str]) -> None:
    assert sorted(given, key=natural_key) == ordered
    given.reverse()
    assert sorted(given, key=natural_key) == ordered


def test_printable_survives_names_that_are_no_utf8() -> None:
    name = b"caf\xe9/\xff.png".decode("utf-8", "surrogateescape")
    assert printable(Path(name)) == r"caf\xe9/\xff.png"
    assert printable(Path("größe/1.png")) == "größe/1.png"


@given(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name))
@example(rb"\xff").via("what the next one shows")
@example(b"\xff")
@example("\u202e\u2028\x85".encode())
@example(b"\xed\xb2\x80")  # a surrogate, which is no UTF-8
def test_a_printed_name_is_one_line_and_leads_back(name: bytes) -> None:
    path = Path(os.fsdecode(name))
    shown = printable(path)
    assert shown == one_line(shown)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert path_of(shown) == path


def test_samples_compare_without_their_pixels() -> None:
    one, other = (Sample("test/1", "3", "test", Path(name)) for name in "ab")
    assert one == other
    assert len({one, other}) == 1
