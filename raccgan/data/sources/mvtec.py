"""MVTec AD: categories of ``train/good``, ``test/good``, ``test/<defect>`` and masks, at the official split."""

from __future__ import annotations

from pathlib import Path

from raccgan.data.samples import Source, printable
from raccgan.data.sources.folder import choose_category, is_split, load_split
from raccgan.errors import InputError


def load_mvtec(root: Path, category: str | None = None) -> Source:
    """Load one category, which may be left out where there is one only.

    ``root`` holds ``mvtec/<category>`` or ``<category>``, or is the folder of a category itself; else InputError.
    """
    if is_split(root) and category in (None, root.name):
        folder = root
    else:
        where = root / "mvtec" if (root / "mvtec").is_dir() else root
        if not where.is_dir():
            raise InputError(
                f"no folder {printable(root)}: the data root holds mvtec/<category>/train/good and so on, "
                "as mvtec.com/company/research/datasets/mvtec-ad offers it"
            )
        folder = choose_category(where, category)
    source = load_split(folder, base=root, name=f"mvtec/{printable(folder.name)}")
    if source.default_normal != ("good",):
        raise InputError(
            f"{printable(folder)} has no class good: it is no category of MVTec AD; try the dataset folder"
        )
    return source
