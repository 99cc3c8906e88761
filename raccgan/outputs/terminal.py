"""Prints lines for a person with control characters escaped: no name can break a line or send codes to the terminal."""

from __future__ import annotations

import re
import sys

# What moves a cursor, ends a line, turns the order of writing round, or has no UTF-8: control characters, the
# separators of lines and paragraphs, the marks of direction, and lone surrogates.
STEERING = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"

_STEERING = re.compile(f"[{STEERING}]")


def one_line(text: str) -> str:
    r"""The text with everything that steers a terminal escaped: a line's end as ``\x0a``, an escape as ``\x1b``."""
    return _STEERING.sub(lambda found: escaped(found[0]), text)


def escaped(character: str) -> str:
    r"""``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``; a byte of a file name that is no text is ``\xNN`` too."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        code -= 0xDC00
    elif code >= 0x80:
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return f"\\x{code:02x}"


def say(line: str) -> None:
    """A line on standard error."""
    print(one_line(line), file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """A line of the result, on standard output."""
    print(one_line(line))
