"""Controls of ten lines that train no network. A model that does not beat them on some data has learned nothing there.

Each takes normal training images and test images, float32 [N, C, S, S] and [M, C, S, S] in [-1, 1], and returns float64
scores [M], higher is more anomalous. They have been ahead of well-known GANs on X-rays and on textures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from raccgan.models.density import Gaussian
from raccgan.models.maps import contrasts
from raccgan.models.pathology import GRIDS

Scores = NDArray[np.float64]

COMPONENTS = 128
PATCH = 8  # pixels a side
PATCHES = 10_000  # the most that are known


def contrast(train: Tensor, test: Tensor, *, grid: int) -> Scores:
    """Mahalanobis distance, from the training images, of the logarithms of contrast in ``grid`` x ``grid`` regions."""
    grid = min(grid, train.shape[-1] // 2)
    known, asked = (torch.cat([contrasts(part, grid) for part in images.split(256)]) for images in (train, test))
    gaussian = Gaussian(1, known.shape[1])
    gaussian.fit(known, 0)
    return gaussian(asked, 0).double().numpy()


def pca(train: Tensor, test: Tensor, *, largest: bool) -> Scores:
    """Squared error of the projection on the training images' principal components: its mean, or largest region's mean.

    An image has 8 x 8 regions, or as many as leave two pixels a side.
    """
    known, asked = (images.flatten(1).numpy() for images in (train, test))
    mean = known.mean(axis=0)
    _, _, directions = randomized_svd(known - mean, min(COMPONENTS, *known.shape), random_state=0)
    left = asked - mean - (asked - mean) @ directions.T @ directions
    errors = torch.from_numpy(left).square().view(test.shape).mean(dim=1, keepdim=True)
    if largest:
        errors = F.avg_pool2d(errors, max(2, test.shape[-1] // 8)).amax(dim=(2, 3), keepdim=True)
    return errors.mean(dim=(1, 2, 3)).double().numpy()


def patches(train: Tensor, test: Tensor) -> Scores:
    """The largest distance of a patch of the image from its nearest patch anywhere in the training images."""
    known = torch.cat([_patches(part).flatten(0, 1) for part in train.split(256)])
    known = known[torch.linspace(0, len(known) - 1, min(PATCHES, len(known))).round().long()]
    index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(known.numpy())
    found = []
    for part in test.split(64):
        asked = _patches(part)
        distances, _ = index.kneighbors(asked.flatten(0, 1).numpy())
        found.append(distances.reshape(asked.shape[:2]).max(axis=1))
    return np.concatenate(found).astype(np.float64)


PLAIN: Mapping[str, Callable[[Tensor, Tensor], Scores]] = {
    **{f"contrast_{grid}": partial(contrast, grid=grid) for grid in GRIDS},
    "pca_mean": partial(pca, largest=False),
    "pca_largest": partial(pca, largest=True),
    "patches": patches,
}
"""By the names that results have for them."""


def _patches(images: Tensor) -> Tensor:
    """[N, L, C PATCH²]: patches that overlap by half; an image of fewer pixels is one."""
    side = min(PATCH, images.shape[-1])
    return F.unfold(images.float(), side, stride=max(1, side // 2)).mT
