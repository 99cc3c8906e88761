"""The report: one HTML page that shows a table of scores, without network, server or library; its parts lie beside.

Names of files and classes come from outside. They reach the page as JSON in a block that is no script, and the page
shows them as text. A content security policy lets nothing run but our own script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raccgan.errors import InputError
from raccgan.outputs.files import write_atomically
from raccgan.outputs.overlays import PREDICTED, Float, MapScale, outlined, overlay, to_uint8

TILE = 128  # the largest side of a picture in the page, in pixels
LOSSLESS = 64  # pictures up to this side keep every pixel; larger ones are photographs more often, and many
BLOCK = 100  # images whose pictures share a block of the page; a block is read when the first of them comes into sight


@dataclass(frozen=True)
class Shown:
    """One image in the page."""

    record: Mapping[str, Any]
    """Values by the columns of a table: path, score, nearest_class, map_max, map_x, map_y, every term of the report,
    and where the truth is known class and label."""
    strip: str  # of :func:`strip`


@dataclass(frozen=True)
class Report:
    """What the page says."""

    title: str
    threshold: float
    terms: Mapping[str, str]  # columns of records that an enlarged image lists, and the page's name for each
    images: Sequence[Shown]
    held_out: Sequence[float] = ()  # scores of the held-out normal images
    skipped: Sequence[dict[str, str]] = ()  # path and reason
    facts: dict[str, str] = field(default_factory=dict)  # shown below the title
    run: str = ""  # for the command that keeps a threshold
    auroc: float | None = None
    auprc: float | None = None


_STRIP = re.compile(r"data:image/(png|webp);base64,[A-Za-z0-9+/]+=*")


def write_report(path: Path, report: Report) -> None:
    """Write the page: images with the highest score first."""
    images = sorted(report.images, key=lambda image: -image.record["score"])
    data = {**vars(report), "images": [dict(image.record) for image in images], "block": BLOCK}
    if not all(_STRIP.fullmatch(image.strip) for image in images):  # a journal that somebody else began, for instance
        raise InputError(f"{path}: a picture of it is no picture; add --restart to score anew")
    style, script = _part("page.css"), _part("page.js")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    parts = {
        "title": html.escape(report.title),
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "style": style,
        "script": script,
        # JSON that no HTML parser can leave early: it holds no angle bracket and no ampersand.
        "data": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
    }

    def write(file: BinaryIO) -> None:
        # Text and the names of parts in turn. The pictures are most of the page: nothing holds two copies of them.
        for place, text in enumerate(re.split(r"\{\{(\w+)\}\}", _part("page.html"))):
            for piece in _strips(images) if text == "strips" and place % 2 else [parts[text] if place % 2 else text]:
                file.write(piece.encode("utf-8", errors="backslashreplace"))

    write_atomically(path, write)


def _strips(images: Sequence[Shown]) -> Iterator[str]:
    for number, start in enumerate(range(0, len(images), BLOCK)):
        block = "\n".join(image.strip for image in images[start : start + BLOCK])
        yield f'<script type="text/plain" id="strips-{number}">{block}</script>\n'


def strip(
    image: Float,
    reconstruction: Float,
    map: Float,
    scale: MapScale,
    mask: NDArray[np.bool_] | None = None,
    *,
    predicted: NDArray[np.bool_] | None = None,
) -> str:
    """Original, reconstruction and overlay side by side, as a data URI.

    ``image`` and ``reconstruction`` are [C, S, S] in [-1, 1], ``map`` is [S, S]. On original and overlay ``predicted``
    [S, S], the anomalous pixels, is outlined, and on the overlay ``mask`` [S, S], what is truly anomalous.
    """
    original = to_uint8(image)
    shown = overlay(original, map, scale)
    if predicted is not None:
        original, shown = (outlined(picture, predicted, PREDICTED) for picture in (original, shown))
    shown = shown if mask is None else outlined(shown, mask)
    picture = Image.fromarray(np.concatenate([original, to_uint8(reconstruction), shown], axis=1))
    side = min(TILE, len(map))
    if side < len(map):
        picture = picture.resize((3 * side, side), Image.Resampling.BOX)
    kind = "png" if side <= LOSSLESS else "webp"
    stream = io.BytesIO()
    picture.save(stream, kind, **({} if kind == "png" else {"quality": 75, "method": 2}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
