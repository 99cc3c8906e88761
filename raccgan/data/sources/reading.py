"""Reads the classes in folders into samples, gives each its masks, and counts what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from raccgan.data.images.decode import count_channels, read_mask
from raccgan.data.layouts import (
    NORMAL_NAMES,
    OUR_FOLDERS,
    is_container,
    is_mask_folder,
    is_two_valued,
    look_like_masks,
    split_of,
)
from raccgan.data.listing import (
    LINKS,
    RESULTS,
    LeftOut,
    holds_results,
    images_in,
    list_files,
    masks_beside,
    no_image,
    subfolders,
)
from raccgan.data.samples import Sample, Source, SplitName, natural_key, printable, spread
from raccgan.data.sources.masks import pair, place_of
from raccgan.data.splits import closest, split_by_class
from raccgan.errors import InputError

BY_MASK = ("good", "anomalous")  # the classes of images that only their masks tell apart


class Reading:
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
        elif loose := images_in(inner):
            self.left_out.add("images beside the folders of classes", f"{printable(inner.name)}/", len(loose))
        for path in folders:
            self.add(path, path.name, split)

    def add(self, folder: Path, label: str, split: SplitName | None) -> None:
        """Add the images below a folder, which are of the class ``label``, and their masks."""
        files = list_files(folder)
        self.left_out.merge(files.left_out)
        if not files.images and RESULTS not in files.left_out:
            raise no_image(folder, files.left_out)
        _refuse_data_sets(folder, files.images)
        self._add(files.images, printable(label), split)
        self.masks += files.masks

    def take_masks(self, folder: Path) -> None:
        """Take all files below a folder as masks; a linked folder in it is one of a class, which is followed."""
        linked = [path for path in subfolders(folder) if path.is_symlink()]
        for where in (folder, *linked):
            files = list_files(where)
            if not look_like_masks(files.images, weak=False):
                raise InputError(
                    f"{printable(where)} has colour photographs, such as {printable(files.images[0].name)}, where "
                    "masks are expected: move it away, or rename it if it is a class"
                )
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
            bare = [sample.key for sample in samples if not sample.label and sample.mask is None]
            raise InputError(
                f"{bare[0]} in {printable(self.base)} has neither a class folder nor a mask ({len(bare)} such "
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
        ours = holds_results(folder)
        for path in subfolders(folder):
            if is_mask_folder(path):
                self.take_masks(path)
            elif holds_results(path) or (ours and path.name in OUR_FOLDERS):
                self.left_out.add(RESULTS, f"{printable(path.name)}/")
            else:
                classes.append(path)
        if len(classes) == 1 and is_container(classes[0].name):
            return self._classes(classes[0])
        return folder, classes

    def _without_classes(self, folder: Path, split: SplitName | None) -> None:
        """Take images that lie in no folder of a class, if there are masks: they then tell normal from anomalous."""
        images = images_in(folder)
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
        by_label: dict[str, list[Path]] = {}
        for sample in self.samples:
            assert isinstance(sample.image, Path)
            by_label.setdefault(sample.label, []).append(sample.image)
        if len(by_label) < 2:
            return
        odd = [images[0].parent for images in by_label.values() if all(map(is_two_valued, spread(images, most)))]
        if odd and len(odd) < len(by_label):
            raise InputError(
                f"the images in {printable(odd[0])} are black and white like masks, and those of other "
                "classes are not: rename the folder to ground_truth if they are masks, or move it away"
            )


def _by_mask(sample: Sample) -> Sample:
    assert sample.mask is not None
    return replace(sample, label=BY_MASK[bool(read_mask(sample.mask, sample.image).any())])


def _refuse_data_sets(folder: Path, images: Sequence[Path]) -> None:
    """The folder of a class that holds parts, or a normal class and others, is a data set: its images are not alike."""
    for image in images:
        parents = image.relative_to(folder).parent.parts
        normal = NORMAL_NAMES if folder.name.casefold() not in NORMAL_NAMES else ()
        found = next((name for name in parents if split_of(name) or name.casefold() in normal), None)
        if found is not None:
            above = folder.joinpath(*parents[: parents.index(found)])
            raise InputError(
                f"{printable(above)} has {printable(found)}/ in it, so {printable(folder)} is no class: "
                f"name {printable(above)} as the dataset, or move the images of {printable(found)}/ up"
            )


def one_category(where: Path, categories: Sequence[str], category: str | None) -> str:
    """The category that is asked for, or the only one; an InputError where there are several, or none of that name."""
    if category is None and len(categories) > 1:
        raise InputError(
            f"{printable(where)} has several categories: name one, for example --category {categories[0]}; "
            f"there are {', '.join(categories)}"
        )
    if category is not None and category not in categories:
        hint = closest(category, categories, "categories") if categories else ": leave --category out"
        raise InputError(f"{printable(where)} has no category {category!r}{hint}")
    return category or categories[0]


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
