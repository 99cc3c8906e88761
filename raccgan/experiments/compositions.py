"""Image scores that one trained model gives beside its own: which of them detects best is a question for the table.

Each is computed from the residual r = mean (x - x')^2, the feature distance d = mean (f(x) - f(x'))^2, the map
(x - x')^2 of a pixel, the critic's value D(x, y), the latent z = E(x, y) and the two distances of
:mod:`raccgan.density`, all under the condition that the model's own score chose. What has to be put on one scale is
standardised by the held-out normal images, never by test images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from raccgan.data.dataset import ImageDataset
from raccgan.progress import Progress
from raccgan.scoring import Scored, Scorer

Floats = NDArray[np.float64]

SMOOTHING = 1 / 32
"""Standard deviation of the Gaussian that smooths a map, as a share of the image's side."""
TOP = 0.01
"""Share of a map's pixels that the mean of the largest ones is over."""


@dataclass(frozen=True)
class Terms:
    """What the compositions are made of, [N] each."""

    residual: Floats
    feature: Floats
    map_maximum: Floats  # of the smoothed map
    map_top: Floats  # mean of its largest pixels
    critic: Floats  # -D(x, y): higher is less real
    latent: Floats  # mean of z^2: 1 for a latent of the prior
    reconstruction: Floats  # residual + kappa feature
    density: Floats
    error_density: Floats


COMPOSITIONS: dict[str, Callable[[Terms, Terms], Floats]] = {
    "reconstruction": lambda t, normal: t.reconstruction,
    "density": lambda t, normal: t.density,
    "error-density": lambda t, normal: t.error_density,
    "both": lambda t, normal: np.sqrt(t.density * t.error_density),
    "all": lambda t, normal: t.density * np.sqrt(t.error_density * t.reconstruction),
    "residual": lambda t, normal: t.residual,
    "feature": lambda t, normal: t.feature,
    "standardised": lambda t, normal: _z(t.residual, normal.residual) + _z(t.feature, normal.feature),
    "map-maximum": lambda t, normal: t.map_maximum,
    "map-top": lambda t, normal: t.map_top,
    "critic": lambda t, normal: t.critic,
    "latent": lambda t, normal: t.latent,
    "all-standardised": lambda t, normal: sum(
        (_z(getattr(t, name), getattr(normal, name)) for name in ("residual", "feature", "map_top", "critic")),
        np.zeros(len(t.residual)),
    ),
}
"""Scores [N] from the terms of the images and of the held-out normal ones."""


def terms_of(scorer: Scorer, data: ImageDataset, scored: Scored, title: str) -> Terms:
    """The terms of every image of ``data``, of which ``scored`` are the scores with details.

    Raises:
        ValueError: scored without details.
    """
    if scored.map is None:
        raise ValueError("the compositions need the maps: score with details")
    smoothed = np.stack([_smooth(m) for m in scored.map.numpy()]).reshape(len(data), -1)
    count = max(1, round(TOP * smoothed.shape[1]))
    critic, latent = _networks(scorer, data, scored.condition, title)
    return Terms(
        residual=scored.residual.double().numpy(),
        feature=scored.feature.double().numpy(),
        map_maximum=smoothed.max(axis=1),
        map_top=np.partition(smoothed, -count, axis=1)[:, -count:].mean(axis=1),
        critic=critic,
        latent=latent,
        reconstruction=(scored.residual + scorer.kappa * scored.feature).double().numpy(),
        density=scored.density.double().numpy(),
        error_density=scored.error_density.double().numpy(),
    )


def composed(terms: Terms, normal: Terms) -> dict[str, Floats]:
    """Every composition's scores."""
    return {name: compose(terms, normal) for name, compose in COMPOSITIONS.items()}


def _smooth(map: NDArray[np.float32]) -> Floats:
    smoothed: Floats = gaussian_filter(map.astype(np.float64), SMOOTHING * map.shape[-1])
    return smoothed


@torch.inference_mode()
def _networks(scorer: Scorer, data: ImageDataset, condition: Tensor, title: str) -> tuple[Floats, Floats]:
    """-D(x, y) and the mean of E(x, y)^2."""
    critic, latent = [], []
    with Progress(title, len(data), unit="image") as progress:
        for indices in torch.arange(len(data)).split(scorer.pairs):
            x = data.images(indices.tolist()).to(scorer.device)
            y = condition[indices].to(scorer.device)
            critic.append(-scorer.discriminator(x, y).double().cpu())
            latent.append(scorer.encoder(x, y).double().square().mean(dim=1).cpu())
            progress.update(len(indices))
    return torch.cat(critic).numpy(), torch.cat(latent).numpy()


def _z(values: Floats, normal: Floats) -> Floats:
    """Standard deviations above the mean of the normal ones."""
    result: Floats = (values - normal.mean()) / max(float(normal.std()), np.finfo(np.float64).tiny)
    return result
