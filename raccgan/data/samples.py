"""A source of images before anything is decoded: samples, their labels and their split."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from numpy.typing import NDArray

from raccgan.outputs.terminal import STEERING, escaped

Pixels = NDArray[Any]
"""H x W or H x W x C pixels: uint8, uint16, or float in [0, 1]."""

MaskFiles = Path | tuple[Path, ...]
"""The ground truth of an image: a file, or several that mark a part each."""

T = TypeVar("T")

SplitName = Literal["train", "test", "valid"]
"""Images of ``valid`` are neither trained on nor tested; normal ones calibrate the threshold."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it. Two samples are equal where everything but the pixels is."""

    key: str  # what scores.csv shows: the path relative to the data root, or "test/17"
    label: str  # class name: "3", "good", "NORMAL"
    split: SplitName
    image: Path | Pixels = field(compare=False, repr=False)  # a file, or pixels already in memory
    mask: MaskFiles | None = None  # ground truth, bright = anomalous
    group: str = ""  # such as a patient: images of one group are in one part; empty: the image is on its own


@dataclass(frozen=True)
class Source:
    """A named set of samples, with what it takes as normal when the user names nothing."""

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]  # natural order, or the order of the official labels
    channels: int  # 1 where the images are grey, else 3
    default_normal: tuple[str, ...]  # empty: the user has to say
    default_protocol: str
    official_split: bool = True  # False: the 60/40 split is ours
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # reason -> what -> how many
    notes: tuple[str, ...] = ()  # what a person should know of how it was read, a line each


def files_of(mask: MaskFiles | None) -> tuple[Path, ...]:
    """The files of a mask; none where there is no mask."""
    return () if mask is None else mask if isinstance(mask, tuple) else (mask,)


def spread(samples: Sequence[T], most: int) -> list[T]:
    """At most that many samples, or images, at even distances over their order: each part of it keeps its share."""
    step = max(1, len(samples) / most)
    return [samples[int(i * step)] for i in range(min(most, len(samples)))]


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts "9" before "10"; the name itself breaks ties such as "1" and "01"."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts], name


def printable(path: Path | str) -> str:
    r"""The path with forward slashes, as one line of text: what tables, reports and messages call a file.

    Bytes that are no UTF-8 show as ``\xff``, control characters and marks of direction as ``\x1b`` or ``\u202e``, and a
    backslash as two, so that no two paths look alike and :func:`path_of` finds the file again.
    """
    name = os.fsdecode(Path(path).as_posix())
    return _TO_ESCAPE.sub(lambda found: "\\\\" if found[0] == "\\" else escaped(found[0]), name)


def path_of(name: str) -> Path:
    """The path that :func:`printable` gave this name."""
    return Path(_ESCAPED.sub(_meant, name))


_TO_ESCAPE = re.compile(rf"[{STEERING}\\]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|\\)")


def _meant(found: re.Match[str]) -> str:
    byte, character = found[1], found[2] or found[3]
    if byte:
        return os.fsdecode(bytes.fromhex(byte))
    return chr(int(character, 16)) if character else "\\"
