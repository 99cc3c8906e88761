"""Finds the image that each mask belongs to: by its name, and by the folders that both lie in.

``test/crack/a/0.png`` lies in crack/a; names of parts, of folders of masks, and of folders that only hold images do
not count. So its mask is ``ground_truth/crack/a/0_mask.png`` or ``test/crack/a/masks/0.png``, and where only one class
has an image of that name, ``mask/0.png``. A folder that is called like the image may hold several masks of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from raccgan.data.layouts import NORMAL_NAMES, bare, is_container, split_of
from raccgan.data.listing import is_image_name
from raccgan.data.samples import MaskFiles, Sample, SplitName, printable
from raccgan.errors import InputError

Place = tuple[str, ...]


def pair(samples: Sequence[Sample], masks: Iterable[Path], base: Path) -> tuple[dict[str, MaskFiles], list[Path]]:
    """The masks of samples by their keys, and the masks that belong to none; paths are below ``base``.

    A mask that fits images of several classes, or several of one, is an InputError.
    """
    by_stem: dict[str, list[tuple[Place, Sample]]] = {}
    by_place: dict[Place, list[tuple[Place, Sample]]] = {}
    for sample in samples:
        assert isinstance(sample.image, Path)
        known = place_of(sample.image, base), sample
        by_stem.setdefault(sample.image.stem.casefold(), []).append(known)
        by_place.setdefault(known[0], []).append(known)
    found: dict[str, list[Path]] = {}
    alone = []
    for mask in masks:
        partner = _partner(mask, base, by_stem)
        if partner is None and not bare(mask.stem):  # mask.png, in a folder with one image
            place = place_of(mask, base)
            partner = _one(mask, place, _split(mask, base), by_place[place]) if place in by_place else None
        if partner is None:
            alone.append(mask)
        else:
            found.setdefault(partner.key, []).append(mask)
    return {key: tuple(paths) if len(paths) > 1 else paths[0] for key, paths in found.items()}, alone


def place_of(path: Path, base: Path) -> Place:
    """The folders that a file lies in, below ``base``, which tell its class: without those that all layouts add."""
    return _place_of_folder(path.parent, base)


@functools.lru_cache(maxsize=1 << 12)
def _place_of_folder(folder: Path, base: Path) -> Place:
    names = map(bare, folder.relative_to(base).parts)
    return tuple(name.casefold() for name in names if name and not split_of(name) and not is_container(name))


def _partner(mask: Path, base: Path, known: dict[str, list[tuple[Place, Sample]]]) -> Sample | None:
    place, stem, split = place_of(mask, base), mask.stem.casefold(), _split(mask, base)
    names = [(stem, place), (bare(stem), place)]
    if is_image_name(bare(stem)):  # 0.png_mask.png
        names.append((Path(bare(stem)).stem, place))
    if place:
        names.append((place[-1], place[:-1]))
    for name, at in names:
        fitting = [(where, sample) for where, sample in known.get(name, ()) if _fits(where, at)]
        if fitting:
            return _one(mask, at, split, fitting)
    return None


def _one(mask: Path, at: Place, split: SplitName | None, fitting: list[tuple[Place, Sample]]) -> Sample:
    """The one that a mask means of the samples that it fits: of its part, else tested; in its folders; anomalous."""
    for wanted in (
        lambda where, sample: sample.split == (split or "test"),
        lambda where, sample: where == at,
        lambda where, sample: sample.label.casefold() not in NORMAL_NAMES,
    ):
        fitting = [one for one in fitting if wanted(*one)] or fitting
    if len(fitting) > 1:
        (_, first), (_, second), *_ = fitting
        raise InputError(
            f"{printable(mask)} may be the mask of {first.key} or of {second.key}: put the masks into folders that are "
            "called like those of the images"
        )
    return fitting[0][1]


def _fits(image: Place, mask: Place) -> bool:
    """True where the folders of one end with those of the other."""
    short, long = sorted((image, mask), key=len)
    return long[len(long) - len(short) :] == short and (bool(image) or not mask)


def _split(path: Path, base: Path) -> SplitName | None:
    names = [bare(name) or name for name in path.relative_to(base).parent.parts]
    return next((split for split in map(split_of, names) if split), None)
