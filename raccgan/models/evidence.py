"""Evidence: the terms of a score weighed against each other, by held-out normal images and what is made of them.

Each term becomes a logarithm in units of held-out normal images. The weights are those of a logistic regression, none
below zero, that tells these images from synthetic pathologies made of them (:mod:`raccgan.data.synthesis`). Neither a
real anomaly nor a test image has a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

TERMS = (
    "reconstruction",
    "density",
    "texture_density",
    "defect_density",
    "pathology",
    "feature_density",
    "place_density",
    "place_peak",
    "contrast_4",
    "contrast_8",
    "contrast_16",
)
"""What is weighed; all but the pathology's logit are positive, and enter as their logarithm."""
LOGITS = frozenset(("pathology",))
SHRINKAGE = 0.05  # pulls each weight towards the mean of all: the synthetic pathologies are not the disease
RIDGE = 1e-3  # pulls all weights towards 0
NOTHING = 0.01  # all weights together: no term tells the two apart
LEAST = 0.05  # deviation: one held-out image has none
TINY = 1e-12


class Evidence(nn.Module):
    """Weights, means and deviations of :data:`TERMS`, of all classes alike. Its buffers are part of a checkpoint."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        count = len(TERMS)
        self.register_buffer("mean", torch.empty(count).zero_())
        self.register_buffer("deviation", torch.empty(count).fill_(1))
        self.register_buffer("weight", torch.empty(count).fill_(1 / count))

    def forward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean m of the terms in deviations from their means, as a score above 0: 1 + m, or exp m below.

        Terms and result have one shape.
        """
        found = ((_stacked(terms) - self.mean) / self.deviation * self.weight).sum(dim=-1)
        return torch.where(found > 0, 1 + found, torch.exp(found.clamp(max=0)))

    @torch.no_grad()
    def fit(self, normal: Mapping[str, Tensor], synthetic: Mapping[str, Tensor]) -> None:
        """Fit to the terms of held-out normal images, [N] each, and to those of synthetic pathologies, [M] each."""
        of_normal = _stacked(normal).double()
        self.mean.copy_(of_normal.mean(dim=0))
        self.deviation.copy_(of_normal.std(dim=0, correction=0).clamp(min=LEAST))
        units = [(each - self.mean) / self.deviation for each in (of_normal, _stacked(synthetic).double())]
        weight = _logistic(*(each.cpu().numpy() for each in units))
        self.weight.copy_(torch.from_numpy(weight / weight.sum()))

    def described(self) -> str:
        """The terms by their weights, the largest first, those below a hundredth left out."""
        order: Sequence[int] = self.weight.argsort(descending=True).tolist()
        return ", ".join(f"{TERMS[i]} {self.weight[i]:.2f}" for i in order if self.weight[i] >= 0.01)


def _stacked(terms: Mapping[str, Tensor]) -> Tensor:
    """[..., len(TERMS)], as logarithms."""
    each = [terms[name] if name in LOGITS else torch.log(terms[name] + TINY) for name in TERMS]
    return torch.stack(each, dim=-1)


def _logistic(normal: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Weights, not negative, that tell rows [N, K] from rows [M, K]; both sides weigh the same."""
    from scipy.optimize import minimize

    x = np.concatenate([normal, synthetic])
    sides = np.concatenate([np.zeros(len(normal)), np.ones(len(synthetic))])
    share = np.where(sides == 0, 1 / len(normal), 1 / len(synthetic))

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w[1:] + w[0]
        apart = w[1:] - w[1:].mean()
        slope = share * (1 / (1 + np.exp(-np.clip(z, -500, 500))) - sides)
        value = (
            (share * (np.logaddexp(0, z) - sides * z)).sum() + SHRINKAGE * (apart**2).sum() + RIDGE * (w[1:] ** 2).sum()
        )
        return float(value), np.r_[slope.sum(), x.T @ slope + 2 * SHRINKAGE * apart + 2 * RIDGE * w[1:]]

    count = x.shape[1]
    start = np.r_[0.0, np.full(count, 0.1)]
    found = minimize(loss, start, jac=True, bounds=[(None, None), *[(0, None)] * count]).x[1:]
    return found if found.sum() > NOTHING else np.full(count, 1 / count)
