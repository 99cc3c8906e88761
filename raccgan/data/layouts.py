"""What a folder is by its name: a part of a split, a folder of masks, a folder of results, or a class.

Names are told apart in any case and with any of ``_ - .`` and spaces between words.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raccgan.data.images.opening import open_image
from raccgan.data.samples import SplitName

NORMAL_NAMES = frozenset({"normal", "good", "ok", "healthy"})  # normal unless the user says otherwise

SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train", "training": "train", "trn": "train",
    "test": "test", "testing": "test", "tst": "test",
    "valid": "valid", "val": "valid", "validation": "valid", "validate": "valid", "dev": "valid",
}  # fmt: skip

# Words beside the name of a part that change nothing: test_public, train-set.
BESIDE_SPLIT = frozenset({"set", "data", "dataset", "part", "split", "public", "images", "image", "imgs", "img"})

# Folders that only hold the images of the folder they lie in, or its classes.
CONTAINERS = frozenset({"images", "image", "imgs", "img", "data", "pictures", "photos", "rgb"})

MASK_WORDS = r"ground[ _.-]?truths?|gts?|masks?"
WEAK_MASK_WORDS = r"labels?|annotations?|annos?|segmentations?|segs?"  # or names of classes: the files decide

_WORD = rf"(?:{MASK_WORDS}|{WEAK_MASK_WORDS})"
_AT_END = re.compile(rf"(?:^{_WORD}|[ _.-]+{_WORD}(?:[ _.-]?[0-9]+)?)$", re.IGNORECASE)
_AT_START = re.compile(rf"^{_WORD}(?:[ _.-]+|$)", re.IGNORECASE)
_STRONG = re.compile(MASK_WORDS, re.IGNORECASE)
_NEVER_A_CLASS = re.compile(r"ground[ _.-]?truths?|gts?", re.IGNORECASE)

OUR_FILES = (  # a folder that holds all of one of these is a run of ours, or its results
    frozenset({".raccgan-lock"}), frozenset({"scores.part"}), frozenset({"summary.json", "scores.csv"}),
    frozenset({"metrics.json", "scores.csv"}), frozenset({"checkpoint.safetensors"}),
)  # fmt: skip
OUR_PICTURES = frozenset({"samples.png", "reconstructions.png", "roc.png", "losses.png"})
OUR_FOLDERS = frozenset({"overlays", "maps"})


def split_of(name: str) -> SplitName | None:
    """The part of a split that a folder, or a cell of a list, of this name holds; None where it is none."""
    words = [word for word in re.split(r"[ _.-]+", name.casefold()) if word and word not in BESIDE_SPLIT]
    return SPLIT_NAMES.get(words[0].removesuffix("set")) if len(words) == 1 else None


def is_unlabelled(name: str) -> bool:
    """True for a test part whose labels nobody but its authors has, such as MVTec AD 2's ``test_private_mixed``."""
    words = re.split(r"[ _.-]+", name.casefold())
    return SPLIT_NAMES.get(words[0]) == "test" and "private" in words


def is_container(name: str) -> bool:
    return name.casefold() in CONTAINERS


def bare(name: str) -> str:
    """A name without a word for masks at its start or end: ``000_mask_1`` is ``000``, ``GT`` is empty."""
    found = _AT_END.search(name)
    if found:
        return name[: found.start()]
    found = _AT_START.search(name)
    return name[found.end() :] if found else name


def is_weak(name: str) -> bool:
    """True where the word for masks in a name may as well name a class."""
    found = _AT_END.search(name) or _AT_START.search(name)
    return found is not None and not _STRONG.search(found[0])


def is_mask_folder(folder: Path) -> bool:
    """True where a folder's name says that it holds masks: ``ground_truth``, ``test_mask``, ``crack_mask`` beside
    ``crack``. Colour photographs in ``mask`` say that it does not; where the word is weak, the files have to look like
    masks.
    """
    rest = bare(folder.name)
    if rest == folder.name:
        return False
    if rest and not split_of(rest) and not is_container(rest) and not (folder.parent / rest).is_dir():
        return False
    if _NEVER_A_CLASS.fullmatch(folder.name):
        return True
    return look_like_masks(_some_files(folder), weak=is_weak(folder.name))


def look_like_masks(files: list[Path], *, weak: bool) -> bool:
    """True unless the first files are colour photographs; with ``weak``, only where all of these have mask's levels."""
    seen = [kind for kind in map(content, files[:3]) if kind != "unknown"]
    return all(kind == "mask" for kind in seen) if weak else "photograph" not in seen


def content(path: Path) -> str:
    """``mask``, ``photograph`` or ``picture`` by the values of an image; ``unknown`` where it cannot be read.

    A mask has few values, or nearly all of them near its darkest and brightest; a photograph has many colours.
    """
    pixels = _pixels(path)
    if pixels is None:
        return "unknown"
    values = np.unique(pixels, axis=0)
    grey = bool((values == values[:, :1]).all())
    low, high = values.min(), values.max()
    near = np.minimum(pixels - low, high - pixels) <= 0.1 * (high - low)
    if len(values) <= 8 or (grey and near.mean() > 0.9):
        return "mask"
    return "picture" if grey or len(values) <= 64 else "photograph"


def is_two_valued(path: Path) -> bool:
    """True where an image has two values exactly, as masks have and photographs do not."""
    pixels = _pixels(path)
    return pixels is not None and len(np.unique(pixels)) == 2


def _pixels(path: Path) -> NDArray[np.float64] | None:
    """Evenly spread pixels of an image, [n, 1 or 3]; None where it cannot be read, or is very large."""
    try:
        with open_image(path) as opened:
            if opened.width * opened.height > 1 << 26:
                return None
            step = -(-max(opened.size) // 512)
            pixels = np.asarray(opened if opened.mode[:1] in "IF" else opened.convert("RGB"))[::step, ::step]
    except Exception:  # as where images are decoded: a damaged file makes Pillow raise anything, and is named there
        return None
    return pixels.reshape(-1, pixels.shape[2] if pixels.ndim == 3 else 1).astype(np.float64)


def is_results(names: Set[str]) -> bool:
    """True where a folder with files of these names is a run of ours, or holds the results of a command."""
    return any(names >= ours for ours in OUR_FILES)


def _some_files(folder: Path) -> list[Path]:
    """The first few files below a folder, at most three folders deep."""
    for pattern in ("*", "*/*", "*/*/*"):
        files = sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))
        if files:
            return files[:3]
    return []
