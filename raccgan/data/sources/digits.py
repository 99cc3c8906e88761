"""The 8 x 8 digits that come with scikit-learn: no download, 1797 images, the set for a first try."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raccgan.data.samples import Sample, Source
from raccgan.data.splits import split_by_class


def load_digits(root: Path) -> Source:
    """Load the digits; ``root`` is not read. Pixels are float32 in [0, 1]: the 17 grey levels 0..16, divided by 16."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    pixels = (np.asarray(bunch.images) / 16).astype(np.float32)
    samples = [
        Sample(f"digits/{i}", str(label), "train", image)
        for i, (image, label) in enumerate(zip(pixels, bunch.target, strict=True))
    ]
    classes = tuple("0123456789")
    return Source("digits", split_by_class(samples), classes, 1, classes[:5], "one-vs-rest", official_split=False)
