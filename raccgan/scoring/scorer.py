"""The scorer: one anomaly score an image, whatever the batch. Exports run its module too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.kernels.qualification.record import Recorded, recorded
from raccgan.models import compiling
from raccgan.models.density import Density, Vectors
from raccgan.models.devices import exact, settle
from raccgan.models.evidence import Evidence
from raccgan.models.inference import frozen
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.models.pathology import Observed, Pathology
from raccgan.models.qualifying import qualify
from raccgan.models.trace import Replayed
from raccgan.scoring.record import TERMS

MINIMUM = "minimum"
Float = NDArray[np.float32]


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


# What each choice of the setting ``score`` makes of the terms.
FORMULAS: dict[str, Callable[[Evidence, Mapping[str, Tensor]], Tensor]] = {
    "learned": lambda evidence, t: evidence(t),
    "reconstruction": lambda _, t: t["reconstruction"],
    "density": lambda _, t: t["density"],
    "texture": lambda _, t: t["texture_density"],
    "defects": lambda _, t: t["defect_density"],
    "both": lambda _, t: (t["density"] * t["texture_density"]).sqrt(),
    "all": lambda _, t: t["density"] * (t["texture_density"] * t["reconstruction"]).sqrt(),
}


class ScoreModule(nn.Module):
    """Images to anomaly scores A(x | y), higher is more anomalous: ``FORMULAS[config.score]`` of its terms.

    The error of the reconstruction is R = mean (x - x')^2 + kappa mean (f(x) - f(x'))^2, as f-AnoGAN has it, with
    x' = G(E(x, y), y) and the discriminator's features f. The distances are those from normal images of class y
    (:mod:`raccgan.models.density`). The pathology head has a term too; :mod:`raccgan.models.evidence` weighs all.
    The networks are in eval mode; the lowest score of the classes ``conditions`` counts.
    """

    places: Tensor

    def __init__(self, networks: Networks, conditions: Sequence[int], config: Config) -> None:
        super().__init__()
        self.generator, self.discriminator, self.encoder = networks.average, networks.discriminator, networks.encoder
        self.pathology: Pathology = networks.pathology
        self.density: Density = networks.density
        self.evidence: Evidence = networks.evidence
        self.conditions = list(conditions)
        self.made_of, self.kappa, self.kernels = config.score, config.kappa, config.kernels
        self.register_buffer("places", torch.tensor(self.conditions), persistent=False)

    def forward(self, x: Tensor) -> tuple[Lowest, Tensor]:
        """Scores and smoothed anomaly maps [N, H, W] of images x [N, C, H, W], all pairs in one pass."""
        image_of, y = self.pairs(x)
        compared = self.compare(x[image_of], self.discriminator.features(x)[image_of], y)
        lowest = self.lowest(compared, self.pathology.observe(x))
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

    def terms(self, compared: Compared, observed: Observed) -> dict[str, Tensor]:
        """The terms of N images under K classes, [N, K] each, from all pairs and from what is seen without a class."""
        k = len(self.conditions)
        reconstruction, residual, feature = compared.terms.view(3, -1, k)
        vectors = Vectors(*(v.view(-1, k, v.shape[1]) for v in compared.vectors))
        distances = self.density.under(vectors, observed, self.conditions)
        by_name = {"reconstruction": reconstruction, "residual": residual, "feature": feature}
        return by_name | {"pathology": observed.logit[:, None].expand(-1, k)} | distances._asdict()

    def lowest(self, compared: Compared, observed: Observed) -> Lowest:
        """The lowest score of each image and its terms; arguments as of :meth:`terms`."""
        by_name = self.terms(compared, observed)
        score = FORMULAS[self.made_of](self.evidence, by_name)
        table = torch.stack([score, *(by_name[name] for name in TERMS)])  # [1 + terms, N, k]
        best = score.argmin(dim=1)
        pair = torch.arange(best.shape[0], device=best.device) * len(self.conditions) + best
        return Lowest(table.flatten(1)[:, pair], self.places[best], pair)

    @torch.no_grad()
    def calls(self, images: int, size: int) -> list[Recorded]:
        """The calls of ops in one pass over so many images of ``size`` pixels a side, listed without computing them."""
        channels = self.generator.head.out_channels

        def one_pass() -> None:
            x = torch.zeros(images, channels, size, size, device=self.places.device)
            image_of, y = self.pairs(x)
            self.compare(x[image_of], self.discriminator.features(x)[image_of], y)
            self.pathology.observe(x)

        return recorded(one_pass)


def for_inference(networks: Networks) -> Networks:
    """Copies in eval mode, with what no longer changes computed once."""
    average = frozen(networks.average)
    return Networks(
        average,
        frozen(networks.discriminator),
        frozen(networks.encoder),
        average,
        frozen(networks.pathology),
        frozen(networks.density),
        frozen(networks.evidence),
    )


@dataclass(frozen=True)
class Scored:
    """Scores of N images, on the CPU."""

    score: Tensor  # [N] float32: A(x | y), higher is more anomalous
    condition: Tensor  # [N] int64: the normal class y that the score is under
    terms: dict[str, Tensor]  # [N] float32 each: see raccgan.scoring.record.TERMS
    map: Tensor | None  # [N, H, W] float32: squared difference per pixel, mean over channels, smoothed
    reconstruction: Tensor | None  # [N, C, H, W] in [-1, 1]

    def details(self) -> tuple[Float, Float]:
        """Maps and reconstructions as arrays, of scores with details."""
        assert self.map is not None
        assert self.reconstruction is not None
        return self.map.numpy(), self.reconstruction.numpy()

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each image's score, nearest class and terms, by the names that a record has for them."""
        columns = {"score": self.score.tolist(), "nearest_class": [classes[i] for i in self.condition.tolist()]}
        columns |= {name: term.tolist() for name, term in self.terms.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def concatenate(parts: Sequence[Scored]) -> Scored:
    """Batches of scores as one, at least one batch; all with details, or none."""
    joined: dict[str, Any] = {
        name: None if getattr(parts[0], name) is None else torch.cat([getattr(part, name) for part in parts])
        for name in ("score", "condition", "map", "reconstruction")
    }
    return Scored(terms={name: torch.cat([part.terms[name] for part in parts]) for name in TERMS}, **joined)


class Scorer:
    """Scores of a trained run, by :class:`ScoreModule`, for any number of images.

    Networks are copied in eval mode, so an image's score does not depend on its batch, up to the rounding of the
    library's convolutions (a relative 1e-4 is tested). Precision is float32, whatever training used.

    Args:
        label_policy: ``minimum`` for the lowest score over all normal classes, or the name of a normal class, known
            beforehand, to score under that one alone. The image's own label never enters.
        compiled: send networks and score through torch.compile, which needs a C++ compiler. The first images take some
            twenty seconds longer, all others 1.0 to 1.4 times as long as replayed passes.

    An InputError if the label policy is no class of ``classes``, or if the density of ``networks`` is not fitted.
    """

    def __init__(
        self,
        config: Config,
        networks: Networks,
        classes: Sequence[str],
        label_policy: str = MINIMUM,
        *,
        compiled: bool = False,
    ) -> None:
        if label_policy != MINIMUM and label_policy not in classes:
            raise InputError(
                f"label policy {label_policy!r} cannot apply: it is neither {MINIMUM!r} nor a normal class of this "
                f"checkpoint ({', '.join(classes)})"
            )
        if not networks.density.fitted:
            raise InputError(
                "what the networks make of normal images is not known yet: finish the training, "
                "python -m raccgan.train --resume RUN"
            )
        self.label_policy, self.compiled = label_policy, compiled
        conditions = [i for i, name in enumerate(classes) if label_policy in (MINIMUM, name)]
        self.module = ScoreModule(for_inference(networks), conditions, config)
        self.device = next(networks.encoder.parameters()).device
        self.module.to(self.device)
        self.pairs = config.score_batch
        qualify(config.kernels, self.device, lambda: self.module.calls(self.batch, config.image_size))
        self._features = self._faster(self.module.discriminator.features, compiled)
        self._compare = self._faster(self.module.compare, compiled)
        self._observe = self._faster(self.module.pathology.observe, compiled)

    def _faster(self, function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
        """The function compiled, or replayed after 200 calls with one shape. On a GPU replaying was not measured."""
        if compiled:
            return compiling.compiled(function, "the scorer", dynamic=True, options=compiler_options(self.device))
        return Replayed(function) if self.device.type == "cpu" else function

    @property
    def batch(self) -> int:
        """As many images as make one pass, each under every condition."""
        return max(1, self.pairs // len(self.module.conditions))

    @torch.inference_mode()
    def score(self, images: Tensor, *, details: bool = False) -> Scored:
        """Score images [N, C, H, W] in [-1, 1]; with ``details``, maps and reconstructions too.

        An InputError if the images have no pixels, or are not finite or not in [-1, 1].
        """
        settle(self.device, compiled=self.compiled)
        n = images.shape[0]
        if n == 0:
            none = torch.empty(0)
            pixels, shape = (none.view(0, *images.shape[2:]), images) if details else (None, None)
            return Scored(none, none.long(), dict.fromkeys(TERMS, none), pixels, shape)
        if images.numel() == 0:
            raise InputError(f"images must have pixels, got {list(images.shape)}")
        low, high = images.aminmax()
        if not (low >= -1.0001 and high <= 1.0001):  # also false for NaN
            raise InputError(f"images must be in [-1, 1] and finite, got values from {low:.4g} to {high:.4g}")
        if details and n > self.batch:  # reconstructions under every class are kept until the best is known
            return concatenate([self.score(part, details=True) for part in images.split(self.batch)])
        x = images.to(self.device, torch.float32)
        compared, observed = self.compare(x, details=details)
        lowest = self.module.lowest(compared, observed)
        score, *parts = lowest.scores.cpu()
        map = smoothed(compared.map[lowest.pair]).cpu() if details else None
        reconstruction = compared.x_hat[lowest.pair].cpu() if details else None
        by_name = dict(zip(TERMS, parts, strict=True))
        return Scored(score, lowest.condition.cpu(), by_name, map, reconstruction)

    @torch.inference_mode()
    def terms_under(self, images: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Every term of images [N, C, H, W] in [-1, 1], each under its class y [N] (int64): [N] each, on the CPU."""
        all_terms = self.module.terms(*self.compare(images.to(self.device, torch.float32), details=False))
        place = torch.searchsorted(self.module.places, y.to(self.device))[:, None]
        return {name: term.gather(1, place)[:, 0].cpu() for name, term in all_terms.items()}

    def compare(self, x: Tensor, *, details: bool) -> tuple[Compared, Observed]:
        """What :meth:`ScoreModule.terms` is of, in passes; maps and reconstructions are empty without ``details``."""
        with exact(self.device):
            return self._compare_all(x, details=details)

    def _compare_all(self, x: Tensor, *, details: bool) -> tuple[Compared, Observed]:
        f = self._features(x)
        passes = zip(*(each.split(self.pairs) for each in self.module.pairs(x)), strict=True)
        parts = []
        for image_of, y in passes:
            part: Compared = self._compare(x[image_of], f[image_of], y)
            parts.append(part if details else part._replace(map=part.map[:0], x_hat=part.x_hat[:0]))
        terms, vectors, maps, reconstructions = zip(*parts, strict=True)
        all_vectors = Vectors(*(torch.cat(each) for each in zip(*vectors, strict=True)))
        compared = Compared(torch.cat(terms, dim=1), all_vectors, torch.cat(maps), torch.cat(reconstructions))
        return compared, self._observe(x)


def compiler_options(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile: on a CPU, C++ calls the kernels, in 0.9 of Python's time for one image at 32 px."""
    return {"cpp_wrapper": True} if device.type == "cpu" else {}
