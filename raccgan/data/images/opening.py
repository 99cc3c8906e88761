"""Opens image files, with limits on their size and on the pixels that all threads decode at a time.

A header may claim any size, and a small file may hold a huge image: both limits hold before anything is decoded.
Decoding took at most 28 bytes a pixel (colour with alpha; 8 bytes for 8-bit grey).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image

from raccgan.data.images import medical
from raccgan.data.samples import printable
from raccgan.errors import InputError

# Named, because some of Pillow's other readers start programs (EPS) or are rarely used and as rarely looked after.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

MOST_PIXELS = 1 << 27  # of one image, 11585 x 11585 for instance, and of all that threads decode at a time
MOST_BYTES = 1 << 29  # of one file; some of Pillow's readers go through all of a damaged one


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and nothing decoded; of a medical file, decoded.

    An empty file, or one that is too large to be decoded, is an InputError; else this raises what Pillow raises.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{printable(path)} is empty (0 bytes): remove it or copy it again")
    if size > MOST_BYTES:
        raise InputError(f"{printable(path)} has more than {MOST_BYTES} bytes: make it smaller first")
    if kind := medical.kind_of(path):
        with _quiet():
            image = medical.read(path, kind, MOST_PIXELS)
        yield image
        return
    try:
        # As a stream: from a path, Pillow 13 maps raw TIFF files into memory and garbles those that lie on their side.
        with _quiet(), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError  # as Pillow does, by a larger limit of its own
            yield opened
    except Image.DecompressionBombError:
        raise InputError(f"{printable(path)} has more than {MOST_PIXELS} pixels: make it smaller first") from None


# The first bytes of files that are often taken for images of the kinds above: (place, bytes, what the file is).
_KINDS = (
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphei", "an HEIC image"),
    (4, b"ftyphev", "an HEIC image"),
    (4, b"ftypmif1", "an HEIC or AVIF image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"II*\0", "a TIFF of an unusual kind"),
    (0, b"MM\0*", "a TIFF of an unusual kind"),
    (0, b"II+\0", "a BigTIFF"),
    (0, b"MM\0+", "a BigTIFF"),
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a pointer of Git LFS without its content"),
)


def kind_of(path: Path) -> str:
    """What a file is that is no image of FORMATS, in words; empty where that is not known, or it cannot be read."""
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError:
        return ""
    lower = start.lower()  # of tags in any case; no other signature loses by it
    return next((what for at, mark, what in _KINDS if lower[at : at + len(mark)] == mark.lower()), "")


_in_work = 0
_less_in_work = threading.Condition()


@contextmanager
def room(pixels: int) -> Iterator[None]:
    """Wait until so many pixels more are within what all threads may have in work."""
    global _in_work
    with _less_in_work:
        _less_in_work.wait_for(lambda: _in_work + pixels <= MOST_PIXELS)
        _in_work += pixels
    try:
        yield
    finally:
        with _less_in_work:
            _in_work -= pixels
            _less_in_work.notify_all()


_quiet_lock = threading.Lock()
_quiet_users = 0
_quiet_filters = ExitStack()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings from Pillow while any thread decodes: what matters is raised.

    ``warnings.catch_warnings`` alone is not safe in threads: overlapping ones restore each other's filters. Here the
    first thread in changes the filters and the last one out restores them.
    """
    global _quiet_users
    with _quiet_lock:
        if _quiet_users == 0:
            _quiet_filters.enter_context(warnings.catch_warnings(action="ignore"))
        _quiet_users += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                _quiet_filters.close()


def _afresh() -> None:
    """No image is in work in a forked child: the threads that had some, and held the locks, are its parent's."""
    global _in_work, _less_in_work, _quiet_lock, _quiet_users
    _in_work, _less_in_work = 0, threading.Condition()
    _quiet_lock, _quiet_users = threading.Lock(), 0
    _quiet_filters.close()


os.register_at_fork(after_in_child=_afresh)
