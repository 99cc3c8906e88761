"""Lists class folders and the images in them in natural order, whatever order the file system gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from raccgan.data.samples import natural_key, printable
from raccgan.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"})
"""Files with other endings are no images and are ignored; upper and lower case are one."""


def visible(folder: Path) -> list[Path]:
    """Everything in ``folder`` that is not hidden, in natural order; an InputError where it cannot be read."""
    paths = [Path(entry.path) for entry in _entries(folder, None) if _is_visible(entry.name)]
    return sorted(paths, key=lambda path: natural_key(path.name))


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in ``folder``, in natural order, without links that lead back to ``folder`` or above it."""
    above = [folder.resolve(), *folder.resolve().parents]
    paths = [path for path in visible(folder) if path.is_dir()]
    return [path for path in paths if not (path.is_symlink() and path.resolve() in above)]


def list_images(folder: Path, problems: list[str] | None = None) -> list[Path]:
    """The visible images in ``folder`` and all folders below it, in natural order; linked folders are not entered.

    A folder that cannot be read adds a line to ``problems``, or is an InputError without that list. No image at all is
    an InputError.
    """
    images: list[Path] = []
    ignored = 0
    waiting = [folder]
    while waiting:
        for entry in _entries(waiting.pop(), problems):
            if not _is_visible(entry.name):
                continue
            if _is_folder(entry):
                if not entry.is_symlink():
                    waiting.append(Path(entry.path))
            # A broken link stays, so that it is named as a file that cannot be read; a pipe would block for ever.
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):
                images.append(Path(entry.path))
            else:
                ignored += 1
    if not images:
        beside = f" ({ignored} other files are ignored)" if ignored else ""
        known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise InputError(f"no image in {printable(folder)}{beside}: add some ({known}) or remove the folder")
    return sorted(images, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def matching(pattern: str, problems: list[str]) -> list[Path]:
    """The visible files and folders that match a pattern, in natural order: ``*``, ``?`` and ``[...]`` within a name.

    ``**`` matches any number of folders. It does not follow links: two links to the folder that they lie in would lead
    in a circle without end. A folder that cannot be read adds a line to ``problems``.
    """
    parts = Path(pattern).parts
    first = next(place for place, part in enumerate(parts) if has_magic(part))
    found: set[Path] = set()
    base = Path(*parts[:first])
    waiting, seen = [(base, first)] if base.is_dir() else [], set()
    while waiting:
        where, place = waiting.pop()
        if (where, place) in seen:
            continue
        seen.add((where, place))
        part, last = parts[place], place == len(parts) - 1
        if part == "**" and not last:
            waiting.append((where, place + 1))
        names = [Path(part)] if not has_magic(part) else []
        for entry in [] if names else _entries(where, problems):
            if not _is_visible(entry.name) and not part.startswith("."):
                continue
            if part != "**":
                names += [Path(entry.name)] if fnmatchcase(entry.name, part) else []
            elif not _is_folder(entry):
                names.append(Path(entry.name))
            elif not entry.is_symlink():
                waiting.append((Path(entry.path), place))
        if last:
            found.update(where / name for name in names if os.path.lexists(where / name))
        elif part != "**":
            waiting += [(where / name, place + 1) for name in names if os.path.isdir(where / name)]
    return sorted(found, key=lambda path: natural_key(str(path)))


def _is_visible(name: str) -> bool:
    # __MACOSX is what a zip from a Mac leaves beside the data: hidden files by another name.
    return not name.startswith(".") and name != "__MACOSX"


def _entries(folder: Path, problems: list[str] | None) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder; nothing and a line where it cannot be read, or an InputError where no lines are wanted."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        line = f"cannot read the folder {printable(folder)}: {error.strerror}"
        if problems is None:
            raise InputError(line) from None
        if line not in problems:
            problems.append(line)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
