"""The arithmetic of the anomaly score as one module: :class:`raccgan.scoring.scorer.Scorer` and every export run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raccgan.config import Config
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.models.density import Density, Distances, Vectors
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.scoring.record import TERMS


class Compared(NamedTuple):
    """P images beside their reconstructions, each under one class."""

    terms: Tensor  # [3, P]: reconstruction error R, its image term, its feature term
    vectors: Vectors  # [P, ...] each
    map: Tensor  # [P, H, W]: squared difference, mean over channels
    x_hat: Tensor  # [P, C, H, W]: the reconstruction


class Lowest(NamedTuple):
    """N images, each under the class that gives it the lowest score."""

    scores: Tensor  # [1 + terms, N]: the score, then the terms in the order of TERMS
    condition: Tensor  # [N] int64: the class
    pair: Tensor  # [N] int64: the index of (image, class) among all pairs


FORMULAS: dict[str, Callable[[Tensor, Distances], Tensor]] = {
    "reconstruction": lambda r, d: r,
    "density": lambda r, d: d.density,
    "texture": lambda r, d: d.texture_density,
    "defects": lambda r, d: d.defect_density,
    "both": lambda r, d: (d.density * d.texture_density).sqrt(),
    "all": lambda r, d: d.density * (d.texture_density * r).sqrt(),
}
"""What each choice of the setting ``score`` makes of the reconstruction error and the distances."""


class ScoreModule(nn.Module):
    """Images to anomaly scores A(x | y), higher is more anomalous.

    With x' = G(E(x, y), y) and the discriminator's features f, ``config.score`` says what A is:

    - ``reconstruction``: R = mean (x - x')^2 + kappa mean (f(x) - f(x'))^2, as f-AnoGAN has it;
    - ``density``: D, the distance of the encoder's descriptor of x from those of normal images of class y
      (:mod:`raccgan.models.density`);
    - ``texture``: T, the distance of the image's texture, which is its contrast and the reconstruction's error region
      by region, from that of normal images;
    - ``defects``: the same distance with the largest errors of the regions instead of their means;
    - ``both``: sqrt(D T), the geometric mean;
    - ``all``: D sqrt(T R).

    Args:
        networks: whose average generator, discriminator, encoder and density score; in eval mode.
        conditions: the classes y of which the lowest score counts.
        config: kind of score, kappa and kernels.
    """

    places: Tensor

    def __init__(self, networks: Networks, conditions: Sequence[int], config: Config) -> None:
        super().__init__()
        self.generator, self.discriminator, self.encoder = networks.average, networks.discriminator, networks.encoder
        self.density: Density = networks.density
        self.conditions = list(conditions)
        self.made_of, self.kappa, self.kernels = config.score, config.kappa, config.kernels
        self.register_buffer("places", torch.tensor(self.conditions), persistent=False)

    def forward(self, x: Tensor) -> tuple[Lowest, Tensor]:
        """Scores and smoothed anomaly maps [N, H, W] of images x [N, C, H, W], all pairs in one pass."""
        image_of, y = self.pairs(x)
        compared = self.compare(x[image_of], self.discriminator.features(x)[image_of], y)
        lowest = self.lowest(compared.terms, compared.vectors)
        return lowest, smoothed(compared.map[lowest.pair])

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the image and class of every pair, [N k] each: all k classes of an image, then the next image's."""
        n, k = x.shape[0], len(self.conditions)
        image_of = torch.arange(n, device=x.device)[:, None].expand(n, k).reshape(-1)
        return image_of, self.places.expand(n, k).reshape(-1)

    def compare(self, x: Tensor, f: Tensor, y: Tensor) -> Compared:
        """Images x [P, C, H, W] with features f, each under its class y [P] (int64)."""
        z, h = self.encoder.describe(x, y)
        x_hat: Tensor = self.generator(z, y)
        f_hat = self.discriminator.features(x_hat)
        found = anomaly_score(x, x_hat, f, f_hat, kappa=self.kappa, want_map=True, kernels=self.kernels)
        assert found.map is not None
        terms = torch.stack([found.score, found.residual, found.feature])
        return Compared(terms, Vectors.of(h, x, found.map), found.map, x_hat)

    def lowest(self, terms: Tensor, vectors: Vectors) -> Lowest:
        """The lowest score of each image and its terms, from the terms and vectors of all pairs."""
        k = len(self.conditions)
        reconstruction, residual, feature = terms.view(3, -1, k)
        distances = self.density.under(Vectors(*(v.view(-1, k, v.shape[1]) for v in vectors)), self.conditions)
        by_name = {"residual": residual, "feature": feature, **distances._asdict()}
        score = FORMULAS[self.made_of](reconstruction, distances)
        table = torch.stack([score, *(by_name[name] for name in TERMS)])  # [1 + terms, N, k]
        best = score.argmin(dim=1)
        pair = torch.arange(best.shape[0], device=best.device) * k + best
        return Lowest(table.flatten(1)[:, pair], self.places[best], pair)
