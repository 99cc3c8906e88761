"""What is on the disk: class folders and the images in them, in a natural order that no file system changes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from raccgan.data.samples import natural_key, printable
from raccgan.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"})
"""Files with other endings are no images and are ignored; upper and lower case are one."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder, and how many other files lie beside them."""

    images: tuple[Path, ...]
    ignored: int


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in ``folder``, natural order; a link that leads back to ``folder`` or above is none."""
    above = [folder.resolve(), *folder.resolve().parents]
    paths = [path for path in visible(folder) if path.is_dir()]
    return [path for path in paths if not (path.is_symlink() and path.resolve() in above)]


def list_images(folder: Path) -> Listing:
    """The visible images in ``folder`` and the folders below it, natural order; linked folders are not entered.

    Raises:
        InputError: there is none, or a folder cannot be read.
    """
    images: list[Path] = []
    ignored = 0
    for where, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if _is_visible(name)]
        for path in (Path(where, name) for name in files if _is_visible(name)):
            # A broken link stays, so that it is named as a file that cannot be read; a pipe would block for ever.
            if path.suffix.lower() in IMAGE_SUFFIXES and (path.is_symlink() or path.is_file()):
                images.append(path)
            else:
                ignored += 1
    if not images:
        beside = f" ({ignored} other files are ignored)" if ignored else ""
        known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(f"no image in {printable(folder)}{beside}: add some ({known}) or remove the folder")
    images.sort(key=lambda path: natural_key(path.relative_to(folder).as_posix()))
    return Listing(tuple(images), ignored)


def has_images(folder: Path) -> bool:
    """True where images lie directly in ``folder``."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in visible(folder))


def visible(folder: Path) -> list[Path]:
    """Everything in ``folder`` that is not hidden, natural order."""
    try:
        paths = [path for path in folder.iterdir() if _is_visible(path.name)]
    except OSError as error:
        _refuse(error)
    return sorted(paths, key=lambda path: natural_key(path.name))


def _is_visible(name: str) -> bool:
    # __MACOSX is what a zip from a Mac leaves beside the data: hidden files by another name.
    return not name.startswith(".") and name != "__MACOSX"


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"cannot read the folder {printable(error.filename)}: {error.strerror}") from None
