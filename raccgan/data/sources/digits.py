"""The 8 x 8 digits that come with scikit-learn: no download, 1797 images, the set for a first try."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raccgan.data.samples import Sample, Source
from raccgan.data.splits import split_by_class
from raccgan.errors import InputError


def load_digits_source(root: Path) -> Source:
    """Load the digits; ``root`` is not read.

    Pixels are float32 in [0, 1]: the set's 17 grey levels 0..16, divided by 16.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    bunch = load_digits()
    pixels = (np.asarray(bunch.images) / 16).astype(np.float32)
    samples = [
        Sample(key=f"digits/{i}", label=str(label), split="train", image=image)
        for i, (image, label) in enumerate(zip(pixels, bunch.target, strict=True))
    ]
    return Source(
        name="digits",
        samples=split_by_class(samples),
        classes=tuple(str(digit) for digit in range(10)),
        channels=1,
        default_normal=("0", "1", "2", "3", "4"),
        default_protocol="one-vs-rest",
        official_split=False,
    )
