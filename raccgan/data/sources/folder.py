"""Images in folders, one folder a class; the content of the folder tells the layouts apart.

``train/<class>`` and ``test/<class>`` is an official split. MVTec AD is this with ``train/good`` alone, and masks in
``ground_truth/<class>/<image>_mask.png``. ``<class>`` alone, such as ``normal`` and ``abnormal``, is split here, 60% of
each class for training. Several folders with official splits are categories, of which one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raccgan.data.images.decode import count_channels
from raccgan.data.listing import IMAGE_SUFFIXES, list_images, subfolders, visible
from raccgan.data.samples import Sample, Source, SplitName, natural_key, printable
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError

NORMAL_NAMES = frozenset({"normal", "good", "ok", "healthy"})  # normal unless the user says otherwise

SPLITS: tuple[SplitName, SplitName] = ("train", "test")


def load_folder(root: Path, category: str | None = None) -> Source:
    """Load a folder of any layout above, or one ``category`` of several below it.

    No such folder or layout, an empty class, or a category that is missing or unknown is an InputError.
    """
    if not root.is_dir():
        raise InputError(f"no folder {printable(root)}: name the folder that holds the images")
    folder = root
    if category is not None or (not is_split(root) and any(map(is_split, subfolders(root)))):
        folder = choose_category(root, category)
    name = printable(folder.resolve().name)
    if is_split(folder):
        return load_split(folder, base=root, name=name)
    folders = _class_folders(root)
    for one, missing in (SPLITS, SPLITS[::-1]):
        if root / one in folders:
            raise InputError(f"{printable(root)} has {one}/ but no {missing}/: add it, or rename {one}/")
    samples = [sample for path in folders for sample in _samples(path, root, "train")]
    return describe(name, split_by_class(samples), official_split=False)


def is_split(folder: Path) -> bool:
    """True where ``folder`` has ``train/`` and ``test/``."""
    return all((folder / split).is_dir() for split in SPLITS)


def choose_category(folder: Path, category: str | None) -> Path:
    """The folder of one category: the named one, or the only one."""
    categories = {printable(path.name): path for path in subfolders(folder) if is_split(path)}
    if not categories:
        raise InputError(f"{printable(folder)} has no category: no folder in it has train/ and test/")
    first, *others = categories
    if category is None and others:
        raise InputError(
            f"{printable(folder)} has several categories: name one, for example --category {first}; "
            f"there are {', '.join(categories)}"
        )
    category = first if category is None else category
    if category not in categories:
        raise InputError(
            f"{printable(folder)} has no category {category!r}{closest(category, categories, 'categories')}"
        )
    return categories[category]


def load_split(folder: Path, *, base: Path, name: str) -> Source:
    """Load ``train/<class>`` and ``test/<class>``, with the masks of ``ground_truth/<class>`` where they are.

    The keys of the samples are paths relative to ``base``.
    """
    samples: list[Sample] = []
    for split, truth in zip(SPLITS, (None, folder / "ground_truth"), strict=True):
        for path in _class_folders(folder / split):
            samples += _samples(path, base, split, truth)
    return describe(name, samples)


def describe(name: str, samples: Sequence[Sample], *, official_split: bool = True) -> Source:
    """The source of these samples: classes in natural order, channels from the headers, normal by its usual name."""
    classes = tuple(sorted({sample.label for sample in samples}, key=natural_key))
    usual = tuple(label for label in classes if label.lower() in NORMAL_NAMES)
    return Source(
        name=name,
        samples=tuple(samples),
        classes=classes,
        channels=count_channels(samples),
        default_normal=usual if len(usual) == 1 else (),
        default_protocol="folder" if len(usual) == 1 else "one-vs-rest",
        official_split=official_split,
    )


def _class_folders(folder: Path) -> list[Path]:
    folders = subfolders(folder)
    if not folders:
        has_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in visible(folder))
        what = "images but no class folder" if has_images else "neither images nor class folders"
        raise InputError(
            f"{printable(folder)} has {what}: put the images into one folder a class, "
            f"for example {printable(folder / 'normal')}"
        )
    return folders


def _samples(folder: Path, base: Path, split: SplitName, truth: Path | None = None) -> list[Sample]:
    label, images = printable(folder.name), list_images(folder)
    masks = _masks(truth / folder.name, images) if truth else {}
    return [Sample(printable(image.relative_to(base)), label, split, image, masks.get(image)) for image in images]


def _masks(folder: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """The mask of each image: ``<image>_mask`` or ``<image>`` with any image ending. All or none."""
    if not folder.is_dir():
        return {}
    there = {path.stem: path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES}
    found = {image: there.get(f"{image.stem}_mask", there.get(image.stem)) for image in images}
    masks = {image: mask for image, mask in found.items() if mask is not None}
    if masks and len(masks) < len(images):
        first = next(image for image in images if image not in masks)
        raise InputError(
            f"no mask for {printable(first)} in {printable(folder)} ({len(images) - len(masks)} are missing): "
            "add them, or move the folder away to go without masks"
        )
    return masks
