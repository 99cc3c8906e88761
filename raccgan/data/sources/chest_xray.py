"""Paediatric chest X-rays (Kermany et al. 2018): ``{train,test}/{NORMAL,PNEUMONIA}``, at the official split.

The ``val`` folder of some copies, 16 images, is not read.
"""

from __future__ import annotations

from pathlib import Path

from raccgan.data.samples import Source, printable
from raccgan.data.sources.folder import is_split, load_split
from raccgan.errors import InputError

CLASSES = ("NORMAL", "PNEUMONIA")


def load_chest_xray(root: Path) -> Source:
    """Load the X-rays from ``root/chest_xray``, or from ``root`` where it has ``train`` and ``test`` itself."""
    folder = next((folder for folder in (root / "chest_xray", root) if is_split(folder)), None)
    if folder is None:
        raise InputError(
            f"no chest X-rays in {printable(root)}: put train/ and test/, each with NORMAL/ and PNEUMONIA/, into "
            f"{printable(root / 'chest_xray')} (data.mendeley.com, 10.17632/rscbjbr9sj.2)"
        )
    source = load_split(folder, base=root, name="chest-xray")
    if source.classes != CLASSES:
        raise InputError(
            f"{printable(folder)} has the classes {', '.join(source.classes)} instead of {', '.join(CLASSES)}; "
            "name the folder itself as the dataset to load it as it is"
        )
    return source
