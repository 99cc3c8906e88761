"""Images in folders, one folder a class; the names of the folders tell the layouts apart.

``train/<class>`` and ``test/<class>`` is an official split, perhaps with ``validation/<class>``; MVTec AD, MVTec AD 2
and MVTec LOCO are this with ``train/good`` alone. ``<class>`` alone, such as ``normal`` and ``abnormal``, is split
here, 60% of each class for training. Masks lie in folders such as ``ground_truth`` anywhere beside or below these, or
as ``x_mask.png`` beside ``x.png``; ``masks.py`` finds their images. Where every image has a mask and no folder names a
normal class, as in Kolektor's sets, the masks say which images are normal. Several folders of either kind are
categories, of which one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raccgan.data.layouts import NORMAL_NAMES, is_container, is_mask_folder, is_unlabelled, split_of
from raccgan.data.listing import RESULTS, holds_results, list_files, subfolders
from raccgan.data.samples import Source, SplitName, printable
from raccgan.data.sources.reading import Reading, one_category
from raccgan.errors import InputError

SPLITS: tuple[SplitName, SplitName] = ("train", "test")


def load_folder(root: Path, category: str | None = None) -> Source:
    """Load a folder of any layout above, or one ``category`` of several below it.

    No such folder or layout, an empty class, or a category that is missing or unknown is an InputError.
    """
    if not root.is_dir():
        raise InputError(f"no folder {printable(root)}: name the folder that holds the images")
    folder = root
    if category is not None or _has_categories(root):
        folder = choose_category(root, category)
    name = printable(folder.resolve().name)
    if is_split(folder):
        return load_split(folder, base=root, name=name)
    if parts := split_folders(_inmost(folder)[-1]):
        missing = "/ and ".join(split for split in SPLITS if split not in parts)
        first = printable(next(iter(parts.values())).name)
        raise InputError(f"{printable(folder)} has {first}/ but no {missing}/: add it, or rename {first}/")
    reading = Reading(root)
    if _has_parts_in_classes(folder):
        for path in subfolders(folder):
            if is_mask_folder(path):
                reading.take_masks(path)
            else:
                for split, part in split_folders(path).items():
                    reading.add(part, path.name, split)
        return reading.source(name)
    reading.read(folder, None)
    return reading.source(name, official_split=False)


def is_split(folder: Path) -> bool:
    """True where ``folder`` has ``train/`` and ``test/``, by any of their names."""
    return folder.is_dir() and split_folders(_inmost(folder)[-1]).keys() >= set(SPLITS)


def split_folders(folder: Path) -> dict[SplitName, Path]:
    """The parts of an official split; one part under two names is an InputError."""
    found: dict[SplitName, Path] = {}
    for path in subfolders(folder):
        split = split_of(path.name)
        if split is not None and split in found and path.resolve() != found[split].resolve():
            raise InputError(
                f"{printable(folder)} has {found[split].name}/ and {path.name}/, which mean the same: make one of them"
            )
        if split is not None:
            found[split] = path
    return found


def _inmost(folder: Path) -> list[Path]:
    """The folder, and the ``images/`` or ``data/`` in it that holds all but masks, and so on."""
    holders = [folder]
    while True:
        inside = _without_masks(holders[-1])
        if len(inside) != 1 or not is_container(inside[0].name):
            return holders
        holders.append(inside[0])


def choose_category(folder: Path, category: str | None) -> Path:
    """The folder of one category: the named one, or the only one."""
    categories = {
        printable(path.name): path
        for path in subfolders(folder)
        if is_split(path) or (_is_sorted(path) and not split_of(path.name))
    }
    if not categories:
        raise InputError(f"{printable(folder)} has no category: no folder in it has train/ and test/")
    return categories[one_category(folder, list(categories), category)]


def load_split(folder: Path, *, base: Path, name: str, but: Sequence[str] = ()) -> Source:
    """Load ``train/<class>`` and ``test/<class>``, ``validation/<class>`` and the masks where they are.

    The keys of the samples are paths relative to ``base``; folders called as in ``but`` are left out.
    """
    reading = Reading(base)
    holders = _inmost(folder)
    parts = {path: split for split, path in split_folders(holders[-1]).items() if path.name not in but}
    for path in sorted(parts, key=lambda path: ("train", "test", "valid").index(parts[path])):
        reading.read(path, parts[path])
    taken = {path.resolve() for path in parts}
    for path in (path for holder in holders for path in subfolders(holder)):
        if path in holders or path.resolve() in taken:
            continue
        if is_mask_folder(path):
            reading.take_masks(path)
        elif holds_results(path):
            reading.left_out.add(RESULTS, f"{printable(path.name)}/")
        elif (files := list_files(path)).images:
            why = "images of a test part without labels" if is_unlabelled(path.name) else "images beside the parts"
            reading.left_out.add(why, f"{printable(path.name)}/", len(files.images))
        else:
            reading.left_out.merge(files.left_out)
    return reading.source(name)


def _has_parts_in_classes(folder: Path) -> bool:
    """True where a folder holds classes, and each of these its images in ``train/`` and ``test/``, or one of them."""
    classes = _without_masks(folder)
    inside = [subfolders(path) for path in classes]
    if not classes or not all(parts and all(split_of(part.name) for part in parts) for parts in inside):
        return False
    return not any(subfolders(part) for parts in inside for part in parts if not is_mask_folder(part))


def _has_categories(folder: Path) -> bool:
    """True where the folders in ``folder`` are data sets of their own."""
    if is_split(folder) or _has_parts_in_classes(folder):
        return False
    inside = [path for path in _without_masks(folder) if not is_container(path.name)]
    return any(map(is_split, inside)) or (bool(inside) and all(map(_is_sorted, inside)))


def _is_sorted(folder: Path) -> bool:
    """True where a folder holds a normal class by its usual name, and another class beside it."""
    inside = _without_masks(_inmost(folder)[-1])
    return len(inside) > 1 and any(path.name.casefold() in NORMAL_NAMES for path in inside)


def _without_masks(folder: Path) -> list[Path]:
    return [path for path in subfolders(folder) if not is_mask_folder(path)]
