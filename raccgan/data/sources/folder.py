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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from raccgan.data.images.decode import count_channels, read_mask
from raccgan.data.layouts import (
    NORMAL_NAMES,
    is_container,
    is_mask_folder,
    is_results,
    is_two_valued,
    is_unlabelled,
    split_of,
)
from raccgan.data.listing import (
    LINKS,
    RESULTS,
    LeftOut,
    is_image_name,
    list_files,
    masks_beside,
    names_in,
    no_image,
    subfolders,
    visible,
)
from raccgan.data.samples import Sample, Source, SplitName, natural_key, printable, spread
from raccgan.data.sources.masks import pair, place_of
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError

SPLITS: tuple[SplitName, SplitName] = ("train", "test")

BY_MASK = ("good", "anomalous")
"""The classes of images that only their masks tell apart."""


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
    reading = _Reading(root)
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
        inside = [path for path in subfolders(holders[-1]) if not is_mask_folder(path)]
        if len(inside) != 1 or not is_container(inside[0].name):
            return holders
        holders.append(inside[0])


def choose_category(folder: Path, category: str | None) -> Path:
    """The folder of one category: the named one, or the only one."""
    categories = {printable(path.name): path for path in subfolders(folder) if is_split(path) or _is_sorted(path)}
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


def load_split(folder: Path, *, base: Path, name: str, but: Sequence[str] = ()) -> Source:
    """Load ``train/<class>`` and ``test/<class>``, ``validation/<class>`` and the masks where they are.

    The keys of the samples are paths relative to ``base``; folders called as in ``but`` are left out.
    """
    reading = _Reading(base)
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
        elif is_results(names_in(path)):
            reading.left_out.add(RESULTS, f"{printable(path.name)}/")
        elif (files := list_files(path)).images:
            why = "images of a test part without labels" if is_unlabelled(path.name) else "images beside the parts"
            reading.left_out.add(why, f"{printable(path.name)}/", len(files.images))
        else:
            reading.left_out.merge(files.left_out)
    return reading.source(name)


def describe(
    name: str, samples: Sequence[Sample], *, official_split: bool = True, left_out: LeftOut | None = None
) -> Source:
    """The source of these samples: classes in natural order, channels from the headers, normal by its usual name."""
    classes = tuple(sorted({sample.label for sample in samples}, key=natural_key))
    usual = tuple(label for label in classes if label.lower() in NORMAL_NAMES)
    _refuse_two_spellings(name, samples, classes)
    return Source(
        name=name,
        samples=tuple(samples),
        classes=classes,
        channels=count_channels(samples),
        default_normal=usual if len(usual) == 1 else (),
        default_protocol="folder" if len(usual) == 1 else "one-vs-rest",
        official_split=official_split,
        left_out=left_out or {},
    )


def _refuse_two_spellings(name: str, samples: Sequence[Sample], classes: Sequence[str]) -> None:
    """One class that is spelt ``Good`` in one part and ``good`` in another would be two."""
    parts: dict[str, set[str]] = {}
    for sample in samples:
        parts.setdefault(sample.label, set()).add(sample.split)
    spelt: dict[str, str] = {}
    for label in classes:
        other = spelt.setdefault(label.casefold(), label)
        if other != label and (parts[other].isdisjoint(parts[label]) or label.casefold() in NORMAL_NAMES):
            raise InputError(f"{name} has the classes {other} and {label}: give both the same spelling, or other names")


class _Reading:
    """Samples, masks and what is left out, as one folder after the other is read."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.samples: list[Sample] = []
        self.masks: list[Path] = []
        self.left_out = LeftOut()

    def read(self, folder: Path, split: SplitName | None) -> None:
        """Read the classes in a folder, whose images are of this part of an official split, or of none."""
        inner, folders = self._classes(folder)
        if not folders:
            self._without_classes(inner, split)
        for path in folders:
            files = list_files(path)
            self.left_out.merge(files.left_out)
            if not files.images and RESULTS not in files.left_out:
                raise no_image(path, files.left_out)
            self._add(files.images, printable(path.name), split)
            self.masks += files.masks

    def take_masks(self, folder: Path) -> None:
        """Take all files below a folder as masks; a linked folder in it is one of a class, which is followed."""
        linked = [path for path in subfolders(folder) if path.is_symlink()]
        for where in (folder, *linked):
            files = list_files(where)
            self.masks += files.images + files.masks
            self.left_out.merge({why: counts for why, counts in files.left_out.items() if why != LINKS})

    def source(self, name: str, *, official_split: bool = True) -> Source:
        """The source of what was read, each sample with its masks."""
        self._refuse_masks_as_classes()
        masks, alone = pair(self.samples, self.masks, self.base)
        self._refuse_strangers(alone)
        samples = [replace(sample, mask=masks.get(sample.key)) for sample in self.samples]
        labels = {sample.label.casefold() for sample in samples}
        if samples and all(sample.mask is not None for sample in samples) and labels.isdisjoint(NORMAL_NAMES):
            with ThreadPoolExecutor() as pool:
                samples = list(pool.map(_by_mask, samples))
        elif "" in labels:
            bare = [sample for sample in samples if not sample.label and sample.mask is None]
            raise InputError(
                f"{bare[0].key} in {printable(self.base)} has neither a class folder nor a mask ({len(bare)} such "
                "images): put the images into one folder a class, for example normal/ and anomalous/"
            )
        for mask in alone:
            self.left_out.add("masks of no image", printable(mask.relative_to(self.base)))
        done = samples if official_split else split_by_class(samples)
        return describe(name, done, official_split=official_split, left_out=self.left_out)

    def _add(self, images: Sequence[Path], label: str, split: SplitName | None) -> None:
        keys = (printable(image.relative_to(self.base)) for image in images)
        self.samples += [Sample(key, label, split or "train", image) for key, image in zip(keys, images, strict=True)]

    def _classes(self, folder: Path) -> tuple[Path, list[Path]]:
        """The folders of classes, and the folder that holds them: this one, or ``images/`` or ``data/`` in it.

        Those of masks and results are set apart.
        """
        classes = []
        for path in subfolders(folder):
            if is_mask_folder(path):
                self.take_masks(path)
            elif is_results(names_in(path)):
                self.left_out.add(RESULTS, f"{printable(path.name)}/")
            else:
                classes.append(path)
        if len(classes) == 1 and is_container(classes[0].name):
            return self._classes(classes[0])
        return folder, classes

    def _without_classes(self, folder: Path, split: SplitName | None) -> None:
        """Take images that lie in no folder of a class, if there are masks: they then tell normal from anomalous."""
        images = [path for path in visible(folder) if is_image_name(path.name) and not path.is_dir()]
        beside = masks_beside(images)
        if not images or not (beside or self.masks):
            what = "images but no class folder" if images else "neither images nor class folders"
            raise InputError(
                f"{printable(folder)} has {what}: put the images into one folder a class, "
                f"for example {printable(folder / 'normal')}"
            )
        self.masks += beside
        self._add([path for path in images if path not in beside], "", split)

    def _refuse_strangers(self, alone: Sequence[Path]) -> None:
        """Masks of a class of which none belongs to an image are more likely misnamed than needless."""
        places = {place_of(sample.image, self.base) for sample in self.samples if isinstance(sample.image, Path)}
        folders: dict[Path, list[Path]] = {}
        for mask in self.masks:
            folders.setdefault(mask.parent, []).append(mask)
        strange = set(alone)
        for folder, inside in folders.items():
            known = place_of(inside[0], self.base) in places or len(strange) == len(self.masks)
            if known and strange.issuperset(inside):
                raise InputError(
                    f"{printable(folder)} has {len(inside)} masks, and none belongs to an image: call each like its "
                    "image (0.png or 0_mask.png for 0.jpg), or move the folder away; if it is a class, rename it"
                )

    def _refuse_masks_as_classes(self, most: int = 5) -> None:
        """A class of black and white images among classes of photographs is masks under a name not known here."""
        by_label: dict[str, list[Sample]] = {}
        for sample in self.samples:
            by_label.setdefault(sample.label, []).append(sample)
        if len(by_label) < 2:
            return
        binary = {
            label: all(
                is_two_valued(sample.image) for sample in spread(samples, most) if isinstance(sample.image, Path)
            )
            for label, samples in by_label.items()
        }
        odd = [label for label, only in binary.items() if only]
        if odd and len(odd) < len(binary):
            where = Path(by_label[odd[0]][0].key).parent
            raise InputError(
                f"the images in {printable(self.base / where)} are black and white like masks, and those of other "
                "classes are not: rename the folder to ground_truth if they are masks, or move it away"
            )


def _by_mask(sample: Sample) -> Sample:
    assert sample.mask is not None
    return replace(sample, label=BY_MASK[bool(read_mask(sample.mask, sample.image).any())])


def _has_categories(folder: Path) -> bool:
    """True where the folders in ``folder`` are data sets of their own."""
    if is_split(folder):
        return False
    inside = [path for path in subfolders(folder) if not is_mask_folder(path) and not is_container(path.name)]
    return any(map(is_split, inside)) or (bool(inside) and all(map(_is_sorted, inside)))


def _is_sorted(folder: Path) -> bool:
    """True where a folder holds a normal class by its usual name, and another class beside it."""
    inside = [path for path in subfolders(_inmost(folder)[-1]) if not is_mask_folder(path)]
    return len(inside) > 1 and any(path.name.casefold() in NORMAL_NAMES for path in inside)
