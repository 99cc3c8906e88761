"""Images and grids of images as PNG files, written whole or not at all, and text that fits beside them.

Images are float [1 or 3, H, W] in [-1, 1]. A file that cannot be written is an InputError, another shape a ValueError.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.font_manager import get_font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raccgan.outputs.files import write_atomically
from raccgan.outputs.overlays import to_uint8

PathLike = str | os.PathLike[str]
Array = NDArray[Any]

INK = "#1f2937"
FONT, BOLD = (Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{kind}.ttf") for kind in ("", "-Bold"))


def write_image(path: PathLike, pixels: Array) -> None:
    """One image [C, H, W] in [-1, 1] as an 8-bit PNG of its own size, grey or RGB."""
    picture = Image.fromarray(to_uint8(pixels) if len(pixels) == 3 else to_uint8(pixels)[..., 0])
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def sample_grid(path: PathLike, rows: Mapping[str, Array], *, title: str = "") -> None:
    """One row of images [K, C, H, W] in [-1, 1] a class, the class's name before it, under a title.

    All images are of one size. Small ones are enlarged to at least 64 pixels, bicubic: a person reads a small digit
    better without its squares.
    """
    gap, margin = 4, 16
    pixels = {plain(name): [to_uint8(image) for image in images] for name, images in rows.items()}
    height, width = next((images[0].shape[:2] for images in pixels.values() if images), (64, 64))
    times = math.ceil(64 / min(height, width))
    height, width = height * times, width * times
    size = max(15, height // 7)
    font, bold = ImageFont.truetype(FONT, size), ImageFont.truetype(BOLD, size)
    names = [short(name, 28) for name in pixels]
    left = margin + max((math.ceil(font.getlength(name)) for name in names), default=0) + margin
    top = margin + (size + margin if title else 0)
    step = max(height, size) + gap
    columns = max((len(images) for images in pixels.values()), default=0)
    title = plain(title)
    right = max(left + columns * (width + gap) - gap, margin + math.ceil(bold.getlength(title)))
    canvas = Image.new("RGB", (right + margin, top + max(len(names), 1) * step - gap + margin), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), title, INK, bold)
    for row, (name, images) in enumerate(zip(names, pixels.values(), strict=True)):
        y = top + row * step
        draw.text((margin, y + height / 2), name, INK, font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(tile, (left + column * (width + gap), y))
    write_atomically(path, lambda file: canvas.save(file, "PNG"))


def short(text: str, most: int) -> str:
    """The middle of a long text left out: of a path, folder and file stay readable."""
    head = most // 2 - 1
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - most + head + 1 :]}"


def plain(text: str) -> str:
    """Characters that the font lacks as a box, so that no library warns about them."""
    font = get_font(str(FONT))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "□" for c in text)
