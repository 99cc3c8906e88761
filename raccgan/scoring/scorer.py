"""The scorer: one anomaly score an image, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raccgan.config import Config
from raccgan.errors import InputError
from raccgan.models import compiling
from raccgan.models.density import Vectors
from raccgan.models.inference import frozen
from raccgan.models.maps import smoothed
from raccgan.models.networks import Networks
from raccgan.models.trace import Replayed
from raccgan.scoring.record import TERMS
from raccgan.scoring.score_module import ScoreModule

MINIMUM = "minimum"
Float = NDArray[np.float32]


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
    """Scores of a trained run, by :class:`raccgan.scoring.score_module.ScoreModule`, for any number of images.

    Networks are copied in eval mode, so an image's score does not depend on its batch, up to the rounding of the
    library's convolutions (a relative 1e-4 is tested). Precision is float32, whatever training used.

    Args:
        config: kind of score, kappa, kernels, and how many pairs of image and class make one pass.
        networks: trained, with a fitted density.
        classes: names of the normal classes.
        label_policy: ``minimum`` for the lowest score over all normal classes, or the name of a normal class, known
            beforehand, to score under that one alone. The image's own label never enters.
        compiled: send networks and score through torch.compile, which needs a C++ compiler. The first images take some
            twenty seconds longer, all others 1.0 to 1.4 times as long as replayed passes.

    Raises:
        InputError: the label policy is no class, or the density is not fitted.
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
        self.label_policy = label_policy
        conditions = [i for i, name in enumerate(classes) if label_policy in (MINIMUM, name)]
        average, density = frozen(networks.average), frozen(networks.density)
        copies = Networks(average, frozen(networks.discriminator), frozen(networks.encoder), average, density)
        self.device = next(networks.encoder.parameters()).device
        self.module = ScoreModule(copies, conditions, config).to(self.device)
        self.pairs = config.score_batch
        self._features = self._faster(self.module.discriminator.features, compiled)
        self._compare = self._faster(self.module.compare, compiled)

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

        Raises:
            InputError: the images are not finite or not in [-1, 1].
        """
        _check_range(images)
        n = images.shape[0]
        if n == 0:
            none = torch.empty(0)
            pixels, shape = (none.view(0, *images.shape[2:]), images) if details else (None, None)
            return Scored(none, none.long(), dict.fromkeys(TERMS, none), pixels, shape)
        if details and n > self.batch:  # reconstructions under every class are kept until the best is known
            return concatenate([self.score(part, details=True) for part in images.split(self.batch)])
        x = images.to(self.device, torch.float32)
        f = self._features(x)
        passes = zip(*(each.split(self.pairs) for each in self.module.pairs(x)), strict=True)
        terms, vectors, maps, reconstructions = [], [], [], []
        for image_of, y in passes:
            compared = self._compare(x[image_of], f[image_of], y)
            terms.append(compared.terms)
            vectors.append(compared.vectors)
            if details:
                maps.append(compared.map)
                reconstructions.append(compared.x_hat)
        all_vectors = Vectors(*(torch.cat(each) for each in zip(*vectors, strict=True)))
        lowest = self.module.lowest(torch.cat(terms, dim=1), all_vectors)
        score, *parts = lowest.scores.cpu()
        map = smoothed(torch.cat(maps)[lowest.pair]).cpu() if details else None
        reconstruction = torch.cat(reconstructions)[lowest.pair].cpu() if details else None
        by_name = dict(zip(TERMS, parts, strict=True))
        return Scored(score, lowest.condition.cpu(), by_name, map, reconstruction)


def compiler_options(device: torch.device) -> dict[str, Any]:
    """Options of torch.compile for a scorer: on a CPU, C++ calls one kernel after the other.

    For one image at 32 px that takes 0.9 of the time with Python between the kernels.
    """
    return {"cpp_wrapper": True} if device.type == "cpu" else {}


def _check_range(images: Tensor) -> None:
    if images.numel() == 0:
        return
    low, high = images.aminmax()
    if not (low >= -1.0001 and high <= 1.0001):  # also false for NaN
        raise InputError(f"images must be in [-1, 1] and finite, got values from {low:.4g} to {high:.4g}")
