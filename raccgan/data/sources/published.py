"""Published data sets in folders, officially split: MVTec AD and paediatric chest X-rays (Kermany et al. 2018)."""

from __future__ import annotations

from pathlib import Path

from raccgan.data.samples import Source, printable
from raccgan.data.sources.folder import choose_category, is_split, load_split
from raccgan.errors import InputError

XRAY_CLASSES = ("NORMAL", "PNEUMONIA")


def load_mvtec(root: Path, category: str | None = None) -> Source:
    """Load one category of ``train/good``, ``test/good``, ``test/<defect>`` and masks; the only one may be left out.

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


def load_chest_xray(root: Path) -> Source:
    """Load ``{train,test}/{NORMAL,PNEUMONIA}`` from ``root/chest_xray``, or from ``root`` where it has these itself.

    The ``val`` folder of some copies, 16 images, is left out: too few to take a threshold from.
    """
    folder = next((folder for folder in (root / "chest_xray", root) if is_split(folder)), None)
    if folder is None:
        raise InputError(
            f"no chest X-rays in {printable(root)}: put train/ and test/, each with NORMAL/ and PNEUMONIA/, into "
            f"{printable(root / 'chest_xray')} (data.mendeley.com, 10.17632/rscbjbr9sj.2)"
        )
    source = load_split(folder, base=root, name="chest-xray", but=("val",))
    if source.classes != XRAY_CLASSES:
        raise InputError(
            f"{printable(folder)} has the classes {', '.join(source.classes)} instead of {', '.join(XRAY_CLASSES)}; "
            "name the folder itself as the dataset to load it as it is"
        )
    return source
