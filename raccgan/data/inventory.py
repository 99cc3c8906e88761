"""What was understood of a data set, in a few lines: images by part and class, masks, what is left out, depth, size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raccgan.data.images.decode import is_colour, read_mask, read_unit
from raccgan.data.images.opening import open_image
from raccgan.data.listing import left_out_line
from raccgan.data.samples import Pixels, Sample, Source, natural_key, spread
from raccgan.data.splits import Split
from raccgan.errors import InputError

DARK = 1 / 16  # images of which none passes this share of its scale have fewer bits than their files
MOST_HEADERS = 200
MOST_DECODED = 50


def lines_of(source: Source, split: Split | None, brightness: str = "keep") -> list[str]:
    """The lines for a source and its split, or for a source whose normal classes are not known."""
    lines = [f"{source.name} has {_parts(source, split)}", f"masks: {_masks(source, split)}"]
    images = about_images([sample.image for sample in source.samples], source.left_out, brightness)
    return [*lines, *images, *(f"note: {note}" for note in (*source.notes, *_odd_masks(source, split)))]


def about_images(
    images: Sequence[Path | Pixels], left_out: Mapping[str, Mapping[str, int]], brightness: str = "keep"
) -> list[str]:
    """Depth and size of images, what is left out by reason, and a note where all are nearly black and not levelled."""
    some = spread(images, MOST_HEADERS)
    found = [header for header in map(_header, some) if header is not None]
    line = f"{len(images)} images: {_depths_and_sizes(found) if found else 'none can be read'}"
    if left_out:
        line += f"; left out: {left_out_line(left_out)}"
    paged = sum(header.pages > 1 for header in found)
    pages = [f"note: {paged} TIFF files have several pages, of which the first is read"] if paged else []
    return [line, *pages, *(_darkness(images) if brightness == "keep" else ())]


def typical_side(images: Sequence[Path | Pixels]) -> int | None:
    """The median over images of the shorter side, in pixels; None where no image can be read."""
    found = [header for header in map(_header, spread(images, MOST_DECODED)) if header is not None]
    return int(np.median([min(header.width, header.height) for header in found])) if found else None


def _parts(source: Source, split: Split | None) -> str:
    if split is None:
        parts = {part: [s for s in source.samples if s.split == part] for part in ("train", "valid", "test")}
    else:
        own = any(sample.split == "valid" for sample in split.held_out)
        parts = {
            "train": list(split.train),
            f"held out for the threshold{' (validation part)' if own else ''}": list(split.held_out),
            "test": list(split.test),
            "left out, anomalous but not in the test part": list(split.spare),
        }
    return "; ".join(f"{part}: {_by_class(samples)}" for part, samples in parts.items() if samples)


def _by_class(samples: Iterable[Sample], most: int = 10) -> str:
    counts = Counter(sample.label for sample in samples)
    shown = sorted(counts, key=natural_key)[:most]
    words = [f"{label} {counts[label]}" for label in shown]
    if more := len(counts) - len(shown):
        words.append(f"{more} classes more {counts.total() - sum(counts[label] for label in shown)}")
    return ", ".join(words)


def _masks(source: Source, split: Split | None) -> str:
    if split is None:
        return f"{sum(sample.mask is not None for sample in source.samples)} found"
    anomalous = [sample for sample in split.test if split.is_anomalous(sample)]
    have = sum(sample.mask is not None for sample in anomalous)
    if have == 0:
        return "none, so that nothing is known of pixels"
    missing = len(anomalous) - have
    less = f"; the {missing} without are left out of pixel metrics" if missing else ""
    return f"{have} of the {len(anomalous)} anomalous test images have one{less}"


def _odd_masks(source: Source, split: Split | None, most: int = 100) -> list[str]:
    """Notes on masks that mark nothing, or most of the image, or something in a normal image; of ``most`` at most."""
    masked = spread([sample for sample in source.samples if sample.mask is not None], most)
    with ThreadPoolExecutor() as pool:
        shares = list(zip(masked, pool.map(_share, masked), strict=True))
    of = f"of {len(masked)} masks"
    notes = []
    normal = split.normal_classes if split is not None else source.default_normal
    if empty := sum(share == 0 for sample, share in shares if normal and sample.label not in normal):
        notes.append(f"{empty} {of} mark nothing, in images that are not normal: they are left out of pixel metrics")
    if marked := sum((share or 0) > 0 for sample, share in shares if sample.label in normal):
        notes.append(f"{marked} {of} mark pixels of a normal image: look at them, or name other normal classes")
    large = sum((share or 0) > 0.5 for _, share in shares)
    if large > len(masked) / 2:
        notes.append(f"{large} {of} mark more than half of the image: white is anomalous, so invert them if black is")
    return notes


def _share(sample: Sample) -> float | None:
    assert sample.mask is not None
    try:
        return float(read_mask(sample.mask, sample.image).mean())
    except InputError:  # named where all files are read
        return None


def _darkness(images: Sequence[Path | Pixels]) -> list[str]:
    brightest = 0.0
    some = spread(images, MOST_DECODED)
    for image in some:
        try:
            with ExitStack() as held:
                brightest = max(brightest, float(read_unit(image, held).max()))
        except InputError:  # named where all files are read
            continue
        if brightest > DARK:
            return []
    if brightest == 0:
        return []
    return [
        f"note: no image passes {brightest:.3g} of its scale ({len(some)} were read), as where 12 bits are stored in "
        "16: all are nearly black to a model; --brightness level spreads them, or save them with their full scale"
    ]


class _Header(NamedTuple):
    depth: str
    width: int
    height: int
    pages: int  # of a TIFF; frames of other files are one picture or an animation


def _header(image: Path | Pixels) -> _Header | None:
    colour = "colour" if is_colour(image) else "grey"
    if not isinstance(image, Path):
        return _Header(f"{8 * image.dtype.itemsize}-bit {colour}", image.shape[1], image.shape[0], 1)
    try:
        with open_image(image) as opened:
            mode = opened.mode
            bits = opened.info.get("bits") or {"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8)
            pages = getattr(opened, "n_frames", 1) if opened.format == "TIFF" else 1
            return _Header(f"{bits}-bit {colour}", opened.width, opened.height, pages)
    except Exception:  # a damaged file makes Pillow raise anything, and is named where all files are read
        return None


def _depths_and_sizes(found: Sequence[_Header]) -> str:
    depths = " and ".join(depth for depth, _ in Counter(header.depth for header in found).most_common())
    sizes = np.array([(header.width, header.height) for header in found])
    (width, height), (widest, highest) = sizes.min(axis=0), sizes.max(axis=0)
    largest = f" to {widest} x {highest}" if (width, height) != (widest, highest) else ""
    return f"{depths}, {width} x {height}{largest} pixels"
