"""Lists class folders and the images in them in natural order, whatever order the file system gives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from glob import has_magic
from pathlib import Path

from raccgan.data.images import medical
from raccgan.data.layouts import OUR_FOLDERS, OUR_PICTURES, bare, is_mask_folder, is_results, is_weak, look_like_masks
from raccgan.data.samples import natural_key, printable
from raccgan.errors import InputError

IMAGE_SUFFIXES = frozenset(  # in upper or lower case; files with other endings are left out, counted
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".bmp", ".dib", ".tif", ".tiff", ".webp",
        ".gif", ".pgm", ".ppm", ".pbm", ".pnm",
    )
)  # fmt: skip
_NO_DATA = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})  # hidden files of other systems

# Reasons to leave out.
RESULTS = "results of raccgan"
MASKS = "masks"
LINKS = "linked folders, which are not followed"


class LeftOut(dict[str, Counter[str]]):
    """What was not taken: reason -> what -> how many."""

    def add(self, reason: str, what: str, count: int = 1) -> None:
        self.setdefault(reason, Counter())[what] += count

    def merge(self, other: Mapping[str, Mapping[str, int]]) -> None:
        for reason, counts in other.items():
            for what, count in counts.items():
                self.add(reason, what, count)


def left_out_line(left_out: Mapping[str, Mapping[str, int]], most: int = 4) -> str:
    """``files of other kinds 3 (.dcm 2, .txt); masks 4``; empty where nothing was left out."""
    parts = []
    for reason, counts in left_out.items():
        names = [f"{what} {count}" if count > 1 else what for what, count in list(counts.items())[:most] if what]
        more = [f"{len(counts) - most} more"] if len(counts) > most else []
        parts.append(f"{reason} {sum(counts.values())}" + (f" ({', '.join(names + more)})" if names else ""))
    return "; ".join(parts)


@dataclass
class Files:
    """The files below a folder, in natural order: images, the masks beside and below them, and what was left out."""

    images: list[Path]
    masks: list[Path]
    left_out: LeftOut


def visible(folder: Path) -> list[Path]:
    """Everything in ``folder`` that is not hidden, in natural order; an InputError where it cannot be read."""
    paths = [Path(entry.path) for entry in _entries(folder, None) if _is_visible(entry.name)]
    return sorted(paths, key=lambda path: natural_key(path.name))


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in ``folder``, in natural order, without links that lead back to ``folder`` or above it."""
    above = [folder.resolve(), *folder.resolve().parents]
    entries = [entry for entry in _entries(folder, None) if _is_visible(entry.name) and _is_folder(entry)]
    paths = sorted((Path(entry.path) for entry in entries), key=lambda path: natural_key(path.name))
    return [path for path in paths if not (path.is_symlink() and path.resolve() in above)]


def images_in(folder: Path) -> list[Path]:
    """The visible images in ``folder`` itself, in natural order; a broken link is one."""
    return [path for path in visible(folder) if is_image(path)]


def holds_results(folder: Path) -> bool:
    """True where a folder is a run of ours, or holds the results of a command."""
    return is_results({entry.name for entry in _entries(folder, None)})


def list_images(folder: Path, problems: list[str] | None = None) -> list[Path]:
    """The images of :func:`list_files`, in natural order. No image at all is an InputError."""
    files = list_files(folder, problems)
    if not files.images:
        raise no_image(folder, files.left_out)
    return files.images


def no_image(folder: Path, left_out: LeftOut) -> InputError:
    """The error for a folder without an image."""
    beside = f" (left out: {left_out_line(left_out)})" if left_out else ""
    known = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    return InputError(f"no image in {printable(folder)}{beside}: add some ({known}) or remove the folder")


def list_files(folder: Path, problems: list[str] | None = None, *, but: Path | None = None) -> Files:
    """The visible images and masks in ``folder`` and all folders below it, in natural order.

    Linked folders are not entered, nor folders with results of ours, nor ``but``; they are left out and counted. A
    folder that cannot be read adds a line to ``problems``, or is an InputError without that list.
    """
    images: list[Path] = []
    masks: list[Path] = []
    left_out = LeftOut()
    waiting = [(folder, False)]
    while waiting:
        where, masked = waiting.pop()
        below = where != folder
        entries = list(_entries(where, problems))
        ours = is_results({entry.name for entry in entries})
        if (ours and below) or (but is not None and _same(where, but) and below):
            left_out.add(RESULTS, _relative(where, folder))
            continue
        here: list[Path] = []
        for entry in entries:
            if not _is_visible(entry.name) or (ours and entry.name in OUR_PICTURES | OUR_FOLDERS):
                continue
            path = Path(entry.path)
            if _is_folder(entry):
                if entry.is_symlink():
                    left_out.add(LINKS, _relative(path, folder))
                else:
                    waiting.append((path, masked or is_mask_folder(path)))
            elif why := _why_not(entry, path):
                left_out.add(why, path.suffix.lower() or "no ending")
            else:
                (masks if masked else here).append(path)
        beside = masks_beside(here)
        masks += beside
        images += [path for path in here if path not in beside] if beside else here
    return Files(_in_order(images, folder), _in_order(masks, folder), left_out)


def is_image_name(name: str) -> bool:
    """True where a file's ending is that of an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_image(path: Path) -> bool:
    """True where a path has the ending of an image, or begins as DICOM without one, and no folder is there."""
    return (is_image_name(path.name) or _medical(path) == "") and not path.is_dir()


def _why_not(entry: os.DirEntry[str], path: Path) -> str:
    """Why a file is left out; empty for an image."""
    # A broken link stays, so that it is named as a file that cannot be read; a pipe would block for ever.
    if is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
        return ""
    why = _medical(path) if entry.is_file() else None
    return "files of other kinds" if why is None else why


def _medical(path: Path) -> str | None:
    """Why a medical file cannot be read here, empty where it can; None for any other file."""
    kind = medical.kind_of(path)
    return None if kind is None else medical.missing(kind)


def masks_beside(files: list[Path]) -> set[Path]:
    """The masks among the images of one folder: ``x_GT.png`` beside ``x.jpg``, ``mask.png`` beside the only other."""
    stems = {path.stem.casefold() for path in files}
    groups: dict[str, list[Path]] = {}
    for path in files:
        rest = bare(path.stem)
        if rest != path.stem and (rest.casefold() in stems or (not rest and len(files) == 2)):
            groups.setdefault(path.stem.casefold().replace(rest.casefold(), "", 1), []).append(path)
    return {
        path
        for group in groups.values()
        if look_like_masks(sorted(group), weak=is_weak(group[0].stem))
        for path in group
    }


def _in_order(paths: list[Path], folder: Path) -> list[Path]:
    return sorted(paths, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def _relative(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def without_apart(images: list[Path], pattern: str, but: Path | None, left_out: LeftOut) -> list[Path]:
    """The images that match a pattern, without those that :func:`list_files` would tell apart: masks and results.

    Folders that the pattern names itself are taken as they are.
    """
    named = set(Path(pattern).parts)
    by_folder: dict[Path, list[Path]] = {}
    for path in images:
        by_folder.setdefault(path.parent, []).append(path)

    @cache
    def why_apart(folder: Path) -> str:
        if not folder.name:
            return ""
        if folder.name not in named:
            if holds_results(folder) or (but is not None and _same(folder, but)):
                return RESULTS
            if is_mask_folder(folder):
                return MASKS
        return why_apart(folder.parent)

    beside = {mask for files in by_folder.values() for mask in masks_beside(files)}
    kept = []
    for path in images:
        if reason := why_apart(path.parent) or (MASKS if path in beside else ""):
            left_out.add(reason, printable(path.parent))
        else:
            kept.append(path)
    return kept


def matching(pattern: str, problems: list[str], other_case: set[Path] | None = None) -> list[Path]:
    """The visible files and folders that match a pattern, in natural order: ``*``, ``?`` and ``[...]`` within a name.

    ``other_case`` gets the files whose own names match in upper or lower case alone.

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
                if fnmatchcase(entry.name, part):
                    names.append(Path(entry.name))
                elif last and other_case is not None and fnmatchcase(entry.name.casefold(), part.casefold()):
                    other_case.add(Path(entry.path))
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
    return not name.startswith(".") and name not in _NO_DATA


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
