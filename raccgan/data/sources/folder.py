"""Images in folders, one folder a class.

The content of the folder tells these layouts apart:

- ``train/<class>`` and ``test/<class>``: an official split. MVTec AD is this with ``train/good`` alone, and masks in
  ``ground_truth/<class>/<image>_mask.png``.
- ``<class>`` alone, such as ``normal`` and ``abnormal``: we split it, with 60% of each class for training.
- several folders of the first kind: these are categories, of which one is loaded.

Classes called normal, good, ok or healthy are normal unless the user says otherwise.
"""

from __future__ import annotations

from pathlib import Path

from raccgan.data.images.decode import count_channels
from raccgan.data.listing import IMAGE_SUFFIXES, has_images, list_images, subfolders, visible
from raccgan.data.samples import Sample, Source, SplitName, natural_key, printable
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError

NORMAL_NAMES = frozenset({"normal", "good", "ok", "healthy"})

SPLITS: tuple[SplitName, SplitName] = ("train", "test")


def load_folder(root: Path, category: str | None = None) -> Source:
    """Load a folder of any layout above.

    Args:
        root: the folder.
        category: which of several categories below it.

    Raises:
        InputError: no such folder, no layout of the above, an empty class, or a category missing or unknown.
    """
    if not root.is_dir():
        raise InputError(f"no folder {printable(root)}: name the folder that holds the images")
    if category is None and is_split(root):
        return load_split(root, base=root, name=_name(root))
    if category is not None or any(is_split(folder) for folder in subfolders(root)):
        folder = choose_category(root, category)
        return load_split(folder, base=root, name=_name(folder))
    return _load_classes(root)


def is_split(folder: Path) -> bool:
    """True where ``folder`` has ``train/`` and ``test/``."""
    return all((folder / split).is_dir() for split in SPLITS)


def choose_category(folder: Path, category: str | None) -> Path:
    """The folder of one category: the named one, or the only one."""
    categories = {printable(path.name): path for path in subfolders(folder) if is_split(path)}
    if not categories:
        raise InputError(f"{printable(folder)} has no category: no folder in it has train/ and test/")
    if category is None:
        if len(categories) > 1:
            raise InputError(
                f"{printable(folder)} has several categories: name one, for example "
                f"--category {next(iter(categories))}; there are {', '.join(categories)}"
            )
        return next(iter(categories.values()))
    if category not in categories:
        raise InputError(
            f"{printable(folder)} has no category {category!r}{closest(category, categories, 'categories')}"
        )
    return categories[category]


def load_split(folder: Path, *, base: Path, name: str) -> Source:
    """Load ``train/<class>`` and ``test/<class>``, with the masks of ``ground_truth/<class>`` where they are.

    Args:
        folder: what holds ``train`` and ``test``.
        base: what the samples' keys are relative to.
        name: the source's name.
    """
    samples: list[Sample] = []
    ignored = 0
    for split in SPLITS:
        for path in _class_folders(folder / split):
            found = list_images(path)
            ignored += found.ignored
            masks = _masks(folder / "ground_truth" / path.name, found.images) if split == "test" else {}
            label = printable(path.name)
            samples += [
                Sample(printable(image.relative_to(base)), label, split, image, masks.get(image))
                for image in found.images
            ]
    return describe(name, samples, ignored=ignored)


def describe(name: str, samples: list[Sample], *, official_split: bool = True, ignored: int = 0) -> Source:
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
        ignored_files=ignored,
    )


def _load_classes(root: Path) -> Source:
    """Load ``<class>`` folders without an official split."""
    samples: list[Sample] = []
    ignored = 0
    for path in _class_folders(root):
        if path.name in SPLITS:
            missing = SPLITS[1 - SPLITS.index(path.name)]
            raise InputError(f"{printable(root)} has {path.name}/ but no {missing}/: add it, or rename {path.name}/")
        found = list_images(path)
        ignored += found.ignored
        label = printable(path.name)
        samples += [Sample(printable(image.relative_to(root)), label, "train", image) for image in found.images]
    return describe(_name(root), list(split_by_class(samples)), official_split=False, ignored=ignored)


def _name(folder: Path) -> str:
    return printable(folder.resolve().name)


def _class_folders(folder: Path) -> list[Path]:
    folders = subfolders(folder)
    if not folders:
        what = "images but no class folder" if has_images(folder) else "neither images nor class folders"
        raise InputError(
            f"{printable(folder)} has {what}: put the images into one folder a class, "
            f"for example {printable(folder / 'normal')}"
        )
    return folders


def _masks(folder: Path, images: tuple[Path, ...]) -> dict[Path, Path]:
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
