"""The benchmarks: the rows of each, and published figures to compare with. Imports no torch.

A row is one trained model: one variant of the table's configuration, one choice of normal classes, one seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raccgan.config import Config, make_config
from raccgan.data.splits import closest
from raccgan.errors import InputError

SEEDS = (0, 1, 2)

DEFAULT = "default"

VARIANTS: Mapping[str, Mapping[str, Any]] = {  # one change at a time to a table's configuration
    DEFAULT: {},
    # Where attention stands.
    "no-attention": {"attention_generator": "none"},
    "attention-everywhere": {f"attention_{network}": "all" for network in ("generator", "discriminator", "encoder")},
    # What the blocks convolve with.
    "dense-convolution": {"convolution": "dense"},
    # How the class enters the encoder, and what leaves it.
    "scalar-encoder": {"encoder_conditioning": "scalar"},
    "tanh-latent": {"encoder_latent": "tanh"},
    "authors-encoder": {"encoder_conditioning": "scalar", "encoder_latent": "tanh"},
    "authors": {
        "encoder_conditioning": "scalar",
        "encoder_latent": "tanh",
        "encoder_head": "bare",
        "generator_head": "1x1",
        "features": "sums",
        "attention_generator": "none",
        "augmentation": "both",
    },
    # The feature term, which the encoder's loss and the score have in common.
    "no-feature-term": {"kappa": 0.0},
    "kappa-0.1": {"kappa": 0.1},
    "kappa-10": {"kappa": 10.0},
    # Whether the generator learns beside the encoder: it does for screws, and for nothing else.
    "frozen-generator": {"generator_tuning": 0.0},
    "tuned-generator": {"generator_tuning": 1.0},
    # The generator's moving average.
    "no-average": {"ema": 0.0},
}


class Published(NamedTuple):
    """A figure from elsewhere: image AUROC, mean over the same classes."""

    name: str
    auroc: float
    source: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its configuration, and the normal classes of each of its rows."""

    preset: str
    settings: Mapping[str, Any]
    normal: Sequence[str]  # one entry a row, as --normal takes it
    published: Sequence[Published] = ()
    note: str = ""  # what to know before trusting a number


_SMALL = {"image_size": 16, "protocol": "one-vs-rest"}
_DIGITS = tuple(str(digit) for digit in range(10))
_GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip

# Sized for a CPU, an hour or less a row. On a GPU the published widths are given as settings.
BENCHMARKS: Mapping[str, Benchmark] = {
    "digits": Benchmark("digits", {"protocol": "one-vs-rest"}, _DIGITS),
    "mnist": Benchmark(
        "mnist-small",
        _SMALL,
        _DIGITS,
        (
            Published("AnoGAN", 0.937, "Schlegl et al., IPMI 2017"),
            Published("OCGAN", 0.975, "Perera et al., CVPR 2019"),
            Published("GeoTrans", 0.980, "Golan, El-Yaniv, NeurIPS 2018"),
            Published("ARNet", 0.983, "Fei et al., 2020"),
        ),
    ),
    "fashion-mnist": Benchmark(
        "mnist-small",
        {**_SMALL, "dataset": "fashion-mnist", "score": "all"},
        _GARMENTS,
        (
            Published("OCGAN", 0.92, "Perera et al., CVPR 2019"),
            Published("GeoTrans", 0.935, "Golan, El-Yaniv, NeurIPS 2018"),
            Published("ARNet", 0.938, "Fei et al., 2020"),
            Published("ESAD", 0.940, "Huang et al., 2020"),
        ),
    ),
    "chest-xray": Benchmark(
        "mnist-small",
        {
            "dataset": "chest-xray",
            "protocol": "folder",
            "score": "learned",
            "image_size": 64,
            "base_width": 16,
            "multipliers": "4,4,2,2,1",
            "batch_size": 16,
            "gan_steps": 2000,
            "encoder_steps": 2000,
        },
        ("NORMAL",),
        (
            Published("f-AnoGAN", 0.75, "as compared with in SQUID, Xiang et al., CVPR 2023"),
            Published("GANomaly", 0.78, "as compared with in SQUID, Xiang et al., CVPR 2023"),
            Published("SQUID", 0.88, "Xiang et al., CVPR 2023"),
        ),
    ),
    "screw": Benchmark(
        "parts",
        {"dataset": "mvtec", "category": "screw", "channels": 1, "protocol": "folder"},
        ("good",),
        note="screws turned upright, brightness levelled: in some copies of this data it alone tells good from defect",
    ),
}


@dataclass(frozen=True)
class Trial:
    """One row of a benchmark: a model to train and to test."""

    variant: str
    normal: str
    seed: int
    config: Config

    @property
    def digest(self) -> str:
        """Eight digits that change with every setting that a result depends on, and with no other."""
        known = self.config.to_dict().items()
        settings = {name: value for name, value in known if name not in _HOW and _LATER.get(name) != value}
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes the row's result that row's: variant, normal classes, seed, digest."""
        return self.variant, self.normal, str(self.seed), self.digest

    @property
    def folder(self) -> str:
        """A name for the folder that it runs in."""
        plain = "".join(c if c.isalnum() or c in "-." else "_" for c in self.normal)
        return f"{self.variant}-{plain}-{self.seed}-{self.digest}"


# Settings that change how a result is computed and not the result; and those that are younger than published rows, at
# the value that those had without them.
_HOW = ("kernels", "threads", "score_batch", "checkpoint_every", "rank_timeout")
_LATER: Mapping[str, Any] = {
    "generator_tuning": 0.0,
    "pathology_steps": 1000,
    "pathology_width": 32,
    "encoder_head": "relu",
    "generator_head": "3x3",
    "features": "places",
    "augmentation": "none",
}


def trials(
    name: str,
    *,
    variants: Sequence[str] = (DEFAULT,),
    normal: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    settings: Mapping[str, Any] | None = None,
) -> list[Trial]:
    """The rows of a table, seed by seed, so that every class is there once before one is there twice.

    ``normal`` are the only normal classes, empty for all of the table; ``settings`` replace the table's own. An
    InputError if there is no such table, variant or class, or if the settings make no configuration.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no experiment called {name!r}{closest(name, BENCHMARKS, 'experiments')}")
    table = BENCHMARKS[name]
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"no variant called {variant!r}{closest(variant, VARIANTS, 'variants')}")
    for wanted in normal:
        if wanted not in table.normal:
            raise InputError(f"{name} has no row for {wanted!r}{closest(wanted, table.normal)}")
    found = []
    for seed, variant, wanted in itertools.product(seeds, variants, normal or table.normal):
        own = {**table.settings, **(settings or {}), **VARIANTS[variant], "normal": wanted, "seed": seed}
        found.append(Trial(variant, wanted, seed, make_config(table.preset, own)))
    return found
