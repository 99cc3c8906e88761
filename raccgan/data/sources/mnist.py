"""MNIST and Fashion-MNIST, 28 x 28, through torchvision: 60000 training and 10000 test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raccgan.data.samples import Sample, Source, SplitName, printable
from raccgan.data.sources.torchvision_import import import_torchvision_datasets
from raccgan.errors import InputError

DIGITS = tuple(str(digit) for digit in range(10))
GARMENTS = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


def load_mnist(root: Path) -> Source:
    """Load MNIST from ``root/MNIST/raw``; its classes are "0" to "9"."""
    return _load(root, "mnist", "MNIST", DIGITS)


def load_fashion_mnist(root: Path) -> Source:
    """Load Fashion-MNIST from ``root/FashionMNIST/raw``; its classes are named, in the order of the official labels."""
    return _load(root, "fashion-mnist", "FashionMNIST", GARMENTS)


def _load(root: Path, name: str, kind: str, classes: tuple[str, ...]) -> Source:
    """Read both parts, downloading them where they are absent.

    Raises:
        InputError: torchvision cannot be imported, or the files are absent and cannot be downloaded, or damaged.
    """
    dataset = getattr(import_torchvision_datasets(), kind)
    samples: list[Sample] = []
    for split in ("train", "test"):
        samples += _read(dataset, root, split, classes)
    return Source(name, tuple(samples), classes, 1, classes[:1], "one-vs-rest")


def _read(dataset: Any, root: Path, split: SplitName, classes: tuple[str, ...]) -> list[Sample]:
    raw = root / dataset.__name__ / "raw"
    files = [name.removesuffix(".gz") for name, _ in dataset.resources]
    try:
        part = dataset(root=root, train=split == "train", download=True)
        pixels, labels = part.data.numpy(), part.targets.tolist()
        return [
            Sample(f"{split}/{index}", classes[label], split, image)
            for index, (image, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    except Exception as error:  # a failed download and damaged files raise anything in torchvision
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        absent = [name for name in files if not (raw / name).is_file()]
        if absent:
            raise InputError(
                f"{dataset.__name__} is not complete and cannot be downloaded ({reason}): "
                f"put {', '.join(absent)} into {printable(raw)}"
            ) from None
        raise InputError(f"{printable(raw)} is damaged ({reason}): replace {', '.join(files)}") from None
