"""The sources by name. To add one, write a module with a function from a folder to a ``Source``, and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raccgan.data.samples import Source, printable
from raccgan.data.sources.csv_list import load_csv
from raccgan.data.sources.digits import load_digits
from raccgan.data.sources.folder import load_folder
from raccgan.data.sources.mnist import load_fashion_mnist, load_mnist
from raccgan.data.sources.published import load_chest_xray, load_mvtec
from raccgan.data.sources.pulmonary import load_covid_xray, load_lung_ct
from raccgan.data.splits import closest
from raccgan.errors import InputError


@dataclass(frozen=True)
class Entry:
    """How a source is loaded, from the data root and the category, and what it is, in a line."""

    load: Callable[[Path, str | None], Source]
    help: str


def without_categories(load: Callable[[Path], Source]) -> Callable[[Path, str | None], Source]:
    """The loader of a source without categories."""

    def loader(root: Path, category: str | None) -> Source:
        if category is not None:
            raise InputError(f"this dataset has no categories, so {category!r} names nothing: leave --category out")
        return load(root)

    return loader


SOURCES: dict[str, Entry] = {
    "digits": Entry(without_categories(load_digits), "8x8 digits that come with scikit-learn; nothing to download"),
    "mnist": Entry(without_categories(load_mnist), "MNIST in ROOT/MNIST/raw, downloaded where absent"),
    "fashion-mnist": Entry(without_categories(load_fashion_mnist), "the same in ROOT/FashionMNIST/raw"),
    "mvtec": Entry(load_mvtec, "MVTec AD in ROOT/mvtec/<category>; needs a category where there are several"),
    "chest-xray": Entry(without_categories(load_chest_xray), "chest X-rays in ROOT/chest_xray/{train,test}/<class>"),
    "lung-ct": Entry(without_categories(load_lung_ct), "slices in ROOT/lung_ct/<class>, split by patients"),
    "covid-xray": Entry(without_categories(load_covid_xray), "ROOT/COVID-19_Radiography_Dataset, split by patients"),
    "folder": Entry(load_folder, "ROOT itself: {train,test}/<class>, or one folder a class"),
    "csv": Entry(
        lambda root, category: load_csv(root, category=category),
        "ROOT is a .csv file with columns path, label, split and perhaps mask, category",
    ),
}


def load_source(dataset: str, root: Path, *, category: str | None = None, problems: list[str] | None = None) -> Source:
    """Load a source by name, from the data root, or from a path, which ``root`` has nothing to do with.

    The path is a folder or a .csv file; a folder that is called like a source is meant by ``./name``. ``category`` is
    for a source that has several. Where ``problems`` is given, a line of a .csv file that cannot be used adds a line
    to it, and the others go on. An InputError says what else is wrong.
    """
    if dataset == "csv":
        return load_csv(root, problems, category)
    if dataset in SOURCES:
        return SOURCES[dataset].load(root, category)
    path = Path(dataset)
    if path.is_dir():
        visa = path / "split_csv" / "1cls.csv"  # VisA's own split for training on normal images alone
        return load_csv(visa, problems, category) if visa.is_file() else load_folder(path, category)
    if path.suffix.lower() == ".csv":
        return load_csv(path, problems, category)
    relative = "" if path.is_absolute() else f", seen from {printable(Path.cwd())}"
    raise InputError(
        f"no dataset, folder or .csv file {printable(path)!r}{closest(dataset, list(SOURCES), 'names')}; "
        f"--dataset names where it lies{relative}"
    )


def place_of(dataset: str) -> str:
    """The absolute path of a data set that is a folder or a list; empty where it is a name, or nothing is there."""
    path = Path(dataset)
    return str(path.resolve()) if dataset not in SOURCES and path.exists() else ""
