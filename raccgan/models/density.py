"""Density: how far an image is from the normal images of a class, as the trained networks see it.

Gaussians are fitted to the normal training images of each class y. The squared Mahalanobis distance from each, over the
number of coordinates, is a term of the score: about 1 for a normal image. Three are over what the networks make of an
image under a class:

- The **descriptor** h(x, y) is the latent beside the mean activation of every channel after each block of the encoder.
- The **texture** t(x, y) is, for each of 4 x 4 regions, the logarithm of the mean squared error of the reconstruction
  and that of the image's own contrast, which the encoder's instance norms take out of the descriptor.
- The **defects** w(x, y) have the largest value of the smoothed error map in each region instead of the mean error,
  which would bury a defect of a few pixels.

The others are over what is seen of an image without a class (:class:`raccgan.models.pathology.Observed`): the features
of the pathology head's trunk, those at each place on its own, and the contrast of regions, which needs no network.

Coordinates are standardised and their covariance shrunk towards the identity by the amount of Ledoit and Wolf (2004),
so that a class may have few images. Of the eigenvectors the ``RANK`` largest are kept, all others share one variance
(probabilistic PCA, Tipping and Bishop, 1999).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from raccgan.models.maps import smoothed
from raccgan.models.pathology import GRIDS, Observed, Pathology

RANK = 256  # most eigenvectors that are kept: all for 16 px in the presets; at the published 128 px, 4.6 MB a class
PLACE_RANK = 64  # those at each place
NARROWEST = 0.01
"""Smallest deviation of a coordinate, in units of all coordinates' root mean square: else a coordinate that never moved
in training, such as a channel that is always 0, would decide alone."""
REGIONS = 4  # on each side of an image, as many as the smallest feature maps have pixels
VISIBLE = 1e-4  # added to a squared difference before its logarithm: about one grey level of 256, squared
TEXTURE = 2 * REGIONS**2  # coordinates of the texture, and of the defects


class Vectors(NamedTuple):
    """What the Gaussians are over, of N images."""

    descriptor: Tensor  # h [N, size]
    texture: Tensor  # t [N, 32]
    defects: Tensor  # w [N, 32]

    @classmethod
    def of(cls, h: Tensor, x: Tensor, map: Tensor) -> Vectors:
        """Of descriptors h [N, size], images x [N, C, S, S] in [-1, 1] and their error maps [N, S, S]."""
        side = x.shape[-1] // REGIONS
        means = F.avg_pool2d(torch.stack([map, contrast(x)], dim=1), side)  # [N, 2, 4, 4]
        largest = F.max_pool2d(smoothed(map)[:, None], side)
        regions = (means, torch.cat([largest, means[:, 1:]], dim=1))
        return cls(h, *(torch.log(each.flatten(1) + VISIBLE) for each in regions))


def contrast(x: Tensor) -> Tensor:
    """[N, S, S] of images [N, C, S, S]: squared difference to the pixels below and to the right, mean over channels; in
    the last row and column, that of the row and column before them.
    """
    down, right = x[:, :, 1:, :-1] - x[:, :, :-1, :-1], x[:, :, :-1, 1:] - x[:, :, :-1, :-1]
    inner = (down.square() + right.square()).mean(dim=1, keepdim=True)  # in three dimensions none may be 0
    return F.pad(inner, (0, 1, 0, 1), mode="replicate")[:, 0]


class Distances(NamedTuple):
    """Squared Mahalanobis distances over the number of coordinates, of one shape each."""

    density: Tensor  # of the descriptor
    texture_density: Tensor  # of the texture
    defect_density: Tensor  # of the defects
    feature_density: Tensor  # of the pathology head's features
    place_density: Tensor  # of its features at each place, root mean over places, squared
    place_peak: Tensor  # the largest of them
    contrast_4: Tensor  # of the contrast of regions
    contrast_8: Tensor
    contrast_16: Tensor


class Density(nn.Module):
    """The Gaussians of each class. Its buffers are part of a checkpoint.

    Args:
        classes: how many there are.
        size: coordinates of a descriptor.
        pathology: what images without a class are observed by.
    """

    def __init__(self, classes: int, size: int, pathology: Pathology) -> None:
        super().__init__()
        self.descriptor = Gaussian(classes, size)
        self.texture = Gaussian(classes, TEXTURE)
        self.defects = Gaussian(classes, TEXTURE)
        sizes = pathology.sizes
        self.features = Gaussian(classes, sizes["features"])
        self.places = Gaussian(classes, sizes["places"], places=pathology.places**2)
        self.contrast_4, self.contrast_8, self.contrast_16 = (
            Gaussian(classes, sizes[f"contrast_{grid}"]) for grid in GRIDS
        )

    @property
    def fitted(self) -> bool:
        """Whether every class has its Gaussians."""
        return bool((self.descriptor.images > 0).all())

    def forget(self) -> None:
        """Drop the fit: the networks whose output it describes have changed."""
        for gaussian in self._gaussians:
            gaussian.images.zero_()

    def forward(self, vectors: Vectors, observed: Observed, y: int) -> Distances:
        """Distances [N] of N images from the normal images of class y."""
        both = zip(self._gaussians, (*vectors, *observed[1:]), strict=True)
        found: list[Tensor] = [gaussian(v, y) for gaussian, v in both]
        places = found.pop(4)
        found[4:4] = [places.sqrt().mean(dim=1).square(), places.amax(dim=1)]
        return Distances(*found)

    def under(self, vectors: Vectors, observed: Observed, classes: Sequence[int]) -> Distances:
        """Distances [N, K] from each of K classes, of N images' vectors [N, K, ...] under them, and as observed."""
        each = [self(Vectors(*(v[:, j] for v in vectors)), observed, y) for j, y in enumerate(classes)]
        return Distances(*(torch.stack(parts, dim=1) for parts in zip(*each, strict=True)))

    def fit(self, vectors: Vectors, observed: Observed, y: int) -> None:
        """Fit the Gaussians of class y to its images; a ValueError if there are none."""
        for gaussian, v in zip(self._gaussians, (*vectors, *observed[1:]), strict=True):
            gaussian.fit(v, y)

    @property
    def _gaussians(self) -> tuple[Gaussian, ...]:
        own = (self.descriptor, self.texture, self.defects, self.features, self.places)
        return (*own, self.contrast_4, self.contrast_8, self.contrast_16)


class Gaussian(nn.Module):
    """One Gaussian a class over vectors of ``size`` coordinates; or one a class and place, of ``places`` above 0."""

    images: Tensor
    mean: Tensor
    deviation: Tensor
    directions: Tensor
    variances: Tensor
    rest: Tensor

    def __init__(self, classes: int, size: int, places: int = 0) -> None:
        super().__init__()
        rank = min(PLACE_RANK if places else RANK, size)
        shape = (classes, places) if places else (classes,)
        # torch.empty, because raccgan.models.checkpoint counts what it allocates.
        self.register_buffer("images", torch.empty(classes, dtype=torch.int64).zero_())  # that each was fitted to
        self.register_buffer("mean", torch.empty(*shape, size).zero_())
        self.register_buffer("deviation", torch.empty(*shape, size).fill_(1))
        self.register_buffer("directions", torch.empty(*shape, rank, size).zero_())  # of standardised coordinates
        self.register_buffer("variances", torch.empty(*shape, rank).fill_(1))  # along them
        self.register_buffer("rest", torch.empty(shape).fill_(1))  # across all of them

    def forward(self, v: Tensor, y: int) -> Tensor:
        """Squared Mahalanobis distances of vectors v [N, size] from class y, over ``size``: [N].

        With places v is [N, places, size], and the distances are [N, places].
        """
        u = (v - self.mean[y]) / self.deviation[y]
        u = u.movedim(0, -2)  # [N, size], or [places, N, size]
        along = u @ self.directions[y].mT
        across = u - along @ self.directions[y]
        squared = (along.square() / self.variances[y].unsqueeze(-2)).sum(dim=-1)
        squared = squared + across.square().sum(dim=-1) / self.rest[y].unsqueeze(-1)
        return squared.movedim(-1, 0) / v.shape[-1]

    @torch.no_grad()
    def fit(self, v: Tensor, y: int) -> None:
        """Fit to vectors v, shaped as those of :meth:`forward`, of class y; a ValueError if there are none."""
        if len(v) == 0:
            raise ValueError(f"no image of class {y} to fit a Gaussian to")
        rank = self.directions.shape[-2]
        members = v.double().cpu().numpy()
        self.images[y] = len(v)
        with threadpool_limits(1):  # or the last digits would depend on how many there are
            for place in range(v.shape[1]) if v.dim() == 3 else (...,):
                fitted = _fitted(members[:, place], rank)
                for buffer, value in zip(list(self.buffers())[1:], fitted, strict=True):
                    buffer[y][place] = torch.as_tensor(value)


def _fitted(v: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean, deviation, directions, variances along and across them, of the rows of v [N, size]."""
    from scipy.linalg import eigh
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, size = v.shape
    mean, deviation = v.mean(axis=0), v.std(axis=0)
    typical = float(np.sqrt(np.square(deviation).mean()))
    deviation = np.maximum(deviation, NARROWEST * typical if typical > 0 else 1.0)
    u = (v - mean) / deviation
    # Of two standardised vectors one is minus the other, in which the estimate of the shrinkage sees no uncertainty.
    shrinkage = max(1 / count, float(ledoit_wolf_shrinkage(u, assume_centered=True)) if count > 1 else 1.0)
    covariance = (1 - shrinkage) * (u.T @ u) / count + shrinkage * np.eye(size)
    values, vectors = eigh(covariance, subset_by_index=(size - rank, size - 1))
    left = size - rank
    rest = (np.trace(covariance) - values.sum()) / left if left else 1.0
    return mean, deviation, cast(np.ndarray, vectors.T), values, float(rest)
