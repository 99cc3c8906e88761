"""Scoring: one anomaly score an image, whatever the batch, and the threshold that turns it into a decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.kernels.anomaly_score import AnomalyScore, anomaly_score
from raccgan.models import compiling
from raccgan.models.density import Density, Distances, Vectors
from raccgan.models.inference import frozen
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.models.trace import Replayed

MINIMUM = "minimum"

TERMS = {
    "residual": "the image term of the score",
    "feature": "the feature term of the score, kappa not applied",
    "density": "distance of the descriptor from those of normal images",
    "texture_density": "distance of the texture from that of normal images",
    "defect_density": "distance of the largest errors from those of normal images",
}
"""What stands beside every score, whatever kind it is of: the columns of all tables, in this order."""


@dataclass(frozen=True)
class Scored:
    """Scores of N images, on the CPU."""

    score: Tensor  # [N] float32: A(x | y), higher is more anomalous
    condition: Tensor  # [N] int64: the normal class y that the score is under
    residual: Tensor  # [N] float32, like all terms: see TERMS
    feature: Tensor
    density: Tensor
    texture_density: Tensor
    defect_density: Tensor
    map: Tensor | None  # [N, H, W] float32: squared difference per pixel, mean over channels, smoothed
    reconstruction: Tensor | None  # [N, C, H, W] in [-1, 1]

    def terms(self) -> list[dict[str, Any]]:
        """The terms of each image, by their names."""
        columns = (getattr(self, name).tolist() for name in TERMS)
        return [dict(zip(TERMS, row, strict=True)) for row in zip(*columns, strict=True)]


class Scorer:
    """Scores of a trained run: A(x | y), higher is more anomalous.

    With x' = G(E(x, y), y) and the discriminator's features f, ``score`` says what A is:

    - ``reconstruction``: R = mean (x - x')^2 + kappa mean (f(x) - f(x'))^2, as f-AnoGAN has it;
    - ``density``: D, the distance of the encoder's descriptor of x from those of normal images of class y
      (:mod:`raccgan.models.density`);
    - ``texture``: T, the distance of the image's texture, which is its contrast and the reconstruction's error region
      by region, from that of normal images;
    - ``defects``: the same distance with the largest errors of the regions instead of their means;
    - ``both``: sqrt(D T), the geometric mean;
    - ``all``: D sqrt(T R).

    Label policy: with ``minimum``, the default, the score is the minimum over all *normal* classes y, the one under
    which the image looks most normal; with the name of a normal class, known beforehand, it is under that class.
    The image's own label never enters.

    Networks are put in eval mode, so an image's score does not depend on its batch, up to the rounding of the
    library's convolutions (a relative 1e-4 is tested). Precision is float32, whatever training used.

    ``compiled``: the networks and the score go through torch.compile, which needs a C++ compiler. The first images
    take some twenty seconds longer, all others 0.95 to 1.2 of the time of recorded passes, which those of one shape are
    after 200 (:class:`raccgan.models.trace.Replayed`).
    """

    def __init__(
        self,
        networks: Networks,
        classes: Sequence[str],
        *,
        kappa: float,
        kernels: str,
        pairs: int = 64,
        score: str = "density",
        label_policy: str = MINIMUM,
        compiled: bool = False,
    ) -> None:
        if label_policy == MINIMUM:
            self.conditions = list(range(len(classes)))
        elif label_policy in classes:
            self.conditions = [list(classes).index(label_policy)]
        else:
            raise InputError(
                f"label policy {label_policy!r} cannot apply: it is neither {MINIMUM!r} nor a normal class of this "
                f"checkpoint ({', '.join(classes)})"
            )
        self.generator = frozen(networks.average)
        self.discriminator = frozen(networks.discriminator)
        self.encoder = frozen(networks.encoder)
        if not networks.density.fitted:
            raise InputError(
                "what the networks make of normal images is not known yet: finish the training, "
                "python -m raccgan.train --resume RUN"
            )
        self.density: Density = frozen(networks.density)
        self.made_of = score
        self.device = next(self.encoder.parameters()).device
        self.kappa = kappa
        self.kernels = kernels
        self.pairs = pairs
        self._features: Callable[[Tensor], Tensor] = self.discriminator.features
        self._compare: Callable[..., Any] = self._compared
        if compiled:
            options = {"dynamic": True, "options": compiler_options(self.device)}
            self._features = compiling.compiled(self._features, "the scorer", **options)
            self._compare = compiling.compiled(self._compare, "the scorer", **options)
        elif self.device.type == "cpu":  # on a GPU it was not measured
            self._features, self._compare = Replayed(self._features), Replayed(self._compare)

    @classmethod
    def of(
        cls,
        config: Config,
        networks: Networks,
        classes: Sequence[str],
        label_policy: str = MINIMUM,
        *,
        compiled: bool = False,
    ) -> Scorer:
        """A scorer with a configuration's settings."""
        return cls(
            networks,
            classes,
            kappa=config.kappa,
            kernels=config.kernels,
            score=config.score,
            pairs=config.score_batch,
            label_policy=label_policy,
            compiled=compiled,
        )

    @torch.inference_mode()
    def score(self, images: Tensor, *, details: bool = False) -> Scored:
        """Score images [N, C, H, W] in [-1, 1]; with ``details``, maps and reconstructions too.

        Raises:
            InputError: the images are not finite or not in [-1, 1].
        """
        _check_range(images)
        k, n = len(self.conditions), images.shape[0]
        if n == 0:
            none = torch.empty(0)
            pixels, shape = (none.view(0, *images.shape[2:]), images) if details else (None, None)
            return Scored(none, none.long(), **dict.fromkeys(TERMS, none), map=pixels, reconstruction=shape)
        if details and n > self.batch:  # reconstructions under every class are kept until the best is known
            return concatenate([self.score(part, details=True) for part in images.split(self.batch)])
        x = images.to(self.device, torch.float32)
        f = self._features(x)
        # Every image under every condition, image by image: [n * k], in passes of at most `pairs`.
        image_of = torch.arange(n, device=self.device).repeat_interleave(k)
        condition_of = torch.tensor(self.conditions, device=self.device).repeat(n)
        terms, known, maps, reconstructions = [], [], [], []
        for i, y in zip(image_of.split(self.pairs), condition_of.split(self.pairs), strict=True):
            result, x_hat, vectors = self._compare(x[i], f[i], y)
            terms.append(torch.stack([result.score, result.residual, result.feature]))
            known.append(vectors)
            if details:
                maps.append(result.map)
                reconstructions.append(x_hat)
        reconstruction, residual, feature = torch.cat(terms, dim=1).view(3, n, k)
        under = Vectors(*(torch.cat(each).view(n, k, -1) for each in zip(*known, strict=True)))
        distances = self.density.under(under, self.conditions)
        score = combined(self.made_of, reconstruction, distances)
        table = torch.stack([score, residual, feature, *distances])  # [1 + terms, n, k]
        best = table[0].argmin(dim=1)  # [n]
        place = torch.arange(n, device=self.device) * k + best  # in [n * k]
        score, *terms = table.flatten(1)[:, place].cpu()
        map = smoothed(torch.cat(maps)[place]).cpu() if details else None
        reconstructed = torch.cat(reconstructions)[place].cpu() if details else None
        by_name = dict(zip(TERMS, terms, strict=True))
        return Scored(score, condition_of[place].cpu(), **by_name, map=map, reconstruction=reconstructed)

    @property
    def batch(self) -> int:
        """As many images as make one pass, each under every condition."""
        return max(1, self.pairs // len(self.conditions))

    def score_batches(
        self,
        read: Callable[[list[int]], Tensor],
        count: int,
        *,
        details: bool = False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Scored:
        """Score ``count`` images that ``read(indices)`` delivers, as many at a time as make one pass."""
        parts = []
        for start in range(0, count, self.batch):
            indices = list(range(start, min(count, start + self.batch)))
            parts.append(self.score(read(indices), details=details))
            progress(len(indices))
        return concatenate(parts)

    def _compared(self, x: Tensor, f: Tensor, y: Tensor) -> tuple[AnomalyScore, Tensor, Vectors]:
        """R with its parts and map for each image x with features f under its condition y; its x', h, t and w."""
        z, h = self.encoder.describe(x, y)
        x_hat: Tensor = self.generator(z, y)
        f_hat = self.discriminator.features(x_hat)
        result = anomaly_score(x, x_hat, f, f_hat, kappa=self.kappa, want_map=True, kernels=self.kernels)
        assert result.map is not None
        return result, x_hat, Vectors.of(h, x, result.map)


def combined(made_of: str, reconstruction: Tensor, distances: Distances) -> Tensor:
    """The score, by its name in the choices of the setting ``score``."""
    d, t, w = distances
    match made_of:
        case "reconstruction":
            return reconstruction
        case "density":
            return d
        case "texture":
            return t
        case "defects":
            return w
        case "both":
            return (d * t).sqrt()
        case "all":
            return d * (t * reconstruction).sqrt()
    raise ValueError(f"no score called {made_of!r}")


def compiler_options(device: torch.device) -> dict[str, Any]:
    """What torch.compile is told of a scorer: on a CPU, that C++ calls one kernel after the other.

    Of one image at 32 px that takes 0.9 of the time with Python between the kernels.
    """
    return {"cpp_wrapper": True} if device.type == "cpu" else {}


def concatenate(parts: Sequence[Scored]) -> Scored:
    """Batches of scores as one."""
    joined: dict[str, Any] = {
        name: None if first is None else torch.cat([getattr(part, name) for part in parts])
        for name, first in vars(parts[0]).items()
    }
    return Scored(**joined)


def threshold_of(held_out_scores: np.ndarray, quantile: float) -> float:
    """The threshold: a quantile of the scores of normal images that were held out of training.

    Raises:
        InputError: there are no such scores.
    """
    if len(held_out_scores) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    return float(np.quantile(held_out_scores, quantile))


def threshold_at(held_out_scores: np.ndarray, sensitivity: float) -> float:
    """The lowest of the held-out scores that at most a share ``sensitivity`` of them exceeds.

    A quantile interpolates between two scores; this one never flags more normal images than were accepted.

    Raises:
        InputError: there are no such scores, or the share is not in [0, 1).
    """
    if not 0 <= sensitivity < 1:
        raise InputError(f"the sensitivity is {sensitivity}; it is a share of normal images, at least 0 and below 1")
    ordered = np.sort(held_out_scores)
    if len(ordered) == 0:
        raise InputError("no held-out normal images, so there is no threshold; raise --held-out")
    accepted = int(np.floor(sensitivity * len(ordered) + 1e-9))  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.99
    return float(ordered[len(ordered) - 1 - accepted])


def decision(anomalous: bool) -> str:
    """The word in tables and pictures."""
    return "anomalous" if anomalous else "normal"


def _check_range(images: Tensor) -> None:
    if images.numel() == 0:
        return
    low, high = images.aminmax()
    if not (low >= -1.0001 and high <= 1.0001):  # also false for NaN
        raise InputError(f"images must be in [-1, 1] and finite, got values from {low:.4g} to {high:.4g}")
