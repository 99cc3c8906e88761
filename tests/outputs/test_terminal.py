"""No line that is printed steers a terminal."""

import pytest

from raccgan.outputs.terminal import one_line, say, tell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain größe 肺 👩\u200d🔬", "plain größe 肺 👩\u200d🔬"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\n", r"two\x0alines\x0d\x0a"),
        ("\x85\x9b\x7f\0", r"\u0085\u009b\x7f\x00"),
        ("\u202eabc\u2066\u200f\u2028", r"\u202eabc\u2066\u200f\u2028"),
        (b"bad\xff".decode("utf-8", "surrogateescape"), r"bad\xff"),
        ("\ud800", r"\ud800"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_steers_is_shown(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(text) == shown
    say(text)
    tell(text)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")
