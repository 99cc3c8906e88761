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

from raccgan.data.samples import printable
from raccgan.errors import InputError

# Named, because some of Pillow's other readers start programs (EPS) or are rarely used and as rarely looked after.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

MOST_PIXELS = 1 << 27  # of one image, 11585 x 11585 for instance, and of all that threads decode at a time
MOST_BYTES = 1 << 29  # of one file; some of Pillow's readers go through all of a damaged one


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image with its header read and nothing decoded.

    An empty file, or one that is too large to be decoded, is an InputError; else this raises what Pillow raises.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{printable(path)} is empty (0 bytes): remove it or copy it again")
    if size > MOST_BYTES:
        raise InputError(f"{printable(path)} has more than {MOST_BYTES} bytes: make it smaller first")
    try:
        # As a stream: from a path, Pillow 13 maps raw TIFF files into memory and garbles those that lie on their side.
        with _quiet(), path.open("rb") as stream, Image.open(stream, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise Image.DecompressionBombError  # as Pillow does, by a larger limit of its own
            yield opened
    except Image.DecompressionBombError:
        raise InputError(f"{printable(path)} has more than {MOST_PIXELS} pixels: make it smaller first") from None


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
