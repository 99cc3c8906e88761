"""MNIST and Fashion-MNIST, 28 x 28: 60000 training and 10000 test images, in the IDX format of the MNIST database."""

from __future__ import annotations

import gzip
import hashlib
import struct
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raccgan.data.samples import Sample, Source, printable
from raccgan.data.sources.folder import SPLITS
from raccgan.errors import InputError
from raccgan.outputs.files import write_atomically

DIGITS = tuple("0123456789")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

MIRRORS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # compared by checksum
}
MD5 = {  # of the compressed file, as its authors and torchvision give it
    "MNIST": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}


def load_mnist(root: Path) -> Source:
    """Load MNIST from ``root/MNIST/raw``; its classes are "0" to "9". Raises :class:`InputError`, as does the next."""
    return _load(root / "MNIST" / "raw", "mnist", "MNIST", DIGITS)


def load_fashion_mnist(root: Path) -> Source:
    """Load Fashion-MNIST from ``root/FashionMNIST/raw``; its classes are named, in the order of the official labels."""
    return _load(root / "FashionMNIST" / "raw", "fashion-mnist", "FashionMNIST", GARMENTS)


def _load(raw: Path, name: str, kind: str, classes: tuple[str, ...]) -> Source:
    _download_absent(raw, kind)
    samples: list[Sample] = []
    for split, prefix in zip(SPLITS, ("train", "t10k"), strict=True):
        images, labels = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        try:
            pixels, targets = _read_idx(raw / images, 3), _read_idx(raw / labels, 1)
            samples += [
                Sample(f"{split}/{index}", classes[label], split, image)
                for index, (image, label) in enumerate(zip(pixels, targets.tolist(), strict=True))
            ]
        except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
            reason = str(error).strip() or type(error).__name__
            raise InputError(f"{printable(raw)} is damaged ({reason}): replace {images}, {labels}") from None
    return Source(name, tuple(samples), classes, 1, classes[:1], "one-vs-rest")


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes, compressed or not."""
    content = path.read_bytes() if path.is_file() else gzip.decompress(Path(f"{path}.gz").read_bytes())
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
    if magic != 0x800 + dimensions:
        raise ValueError(f"{path.name} is no IDX file of {dimensions} dimensions")
    return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape)


def _download_absent(raw: Path, kind: str) -> None:
    absent = [raw / name for name in MD5[kind] if not any((raw / file).is_file() for file in (name, f"{name}.gz"))]
    try:
        for path in absent:
            _download(path, kind)
    except OSError as error:
        missing = ", ".join(path.name for path in absent if not path.is_file())
        raise InputError(
            f"{kind} is not complete and cannot be downloaded ({error}): put {missing} into {printable(raw)}"
        ) from None


def _download(path: Path, kind: str) -> None:
    with urllib.request.urlopen(f"{MIRRORS[kind]}{path.name}.gz", timeout=60) as answer:
        content = answer.read()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[kind][path.name]:
        raise OSError(f"{path.name}.gz came with another checksum")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(gzip.decompress(content)))
