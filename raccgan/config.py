"""All settings of a run with defaults, help and limits, and the presets. Importing this module imports no torch.

A field here is a field of ``config.json``, of the checkpoint and an option of the commands, by the same name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from raccgan.errors import InputError


def _setting(
    group: str,
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field of :class:`Config`; ``group`` is the heading of its option in ``--help``."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "low": low, "high": high})


_data = partial(_setting, "data")
_model = partial(_setting, "model")
_gan = partial(_setting, "training of the generator and the discriminator")
_encoder = partial(_setting, "training of the encoder")
_scoring = partial(_setting, "scoring")
_run = partial(_setting, "run")

# raccgan.scoring.scorer has the formulas.
SCORES = ("learned", "reconstruction", "density", "texture", "defects", "both", "all")


@dataclass(frozen=True)
class Config:
    """The settings of a run. The fields in MODEL_FIELDS decide whether a checkpoint fits."""

    dataset: str = _data("digits", "digits, mnist, fashion-mnist, mvtec, chest-xray; or a folder, or a .csv list")
    category: str = _data("", "which category of an MVTec folder, such as screw")
    protocol: str = _data("", "one-vs-rest, leave-one-out or folder (default: what suits the data set)")
    normal: str = _data(
        "", "normal classes, comma-separated, a name with a comma in quotes (default: what suits the data set)"
    )
    held_out: float = _data(0.15, "share of the normal training images kept for the threshold", low=0.01, high=0.9)
    fit: str = _data(
        "stretch",
        "how an image becomes square; align turns the one object on a plain ground upright and cuts it out",
        choices=("stretch", "crop", "pad", "align"),
    )
    brightness: str = _data(
        "keep",
        "level: every image is brought to the same mean and contrast, where lamps or exposure vary",
        choices=("keep", "level"),
    )
    unreadable: str = _data(
        "refuse", "what becomes of images, and of lines of a list, that cannot be used", choices=("refuse", "skip")
    )

    image_size: int = _model(
        32, "side of the square that images are resized to: 4 times a power of two", low=8, high=1024
    )
    channels: int = _model(0, "1 for grey, 3 for colour, 0 for what the data set has", low=0, high=3)
    base_width: int = _model(64, "channels that the multipliers multiply", low=1, high=1024)
    multipliers: str = _model(
        "", "generator widths at 4x4 and after each block, in units of base_width, such as 4,4,2,1"
    )
    latent: int = _model(0, "latent size; 0 for 32 a chunk up to 64 px and 20 a chunk above", low=0, high=65536)
    embedding: int = _model(128, "size of the class embedding", low=1, high=4096)
    convolution: str = _model(
        "depthwise-separable", "convolutions of the blocks", choices=("depthwise-separable", "dense")
    )
    attention_generator: str = _model("last-4", "blocks that CBAM follows: none, all, last-N, or numbers such as 0,2")
    attention_discriminator: str = _model("none", "the same, in the discriminator")
    attention_encoder: str = _model("none", "the same, in the encoder")
    discriminator_head: str = _model(
        "auto", "sum over pixels, or flatten; auto flattens up to 32 px", choices=("auto", "sum", "flatten")
    )
    encoder_conditioning: str = _model(
        "film", "how the class enters the encoder; scalar is the authors' form", choices=("film", "scalar")
    )
    encoder_latent: str = _model(
        "linear", "output of the encoder; tanh is the authors' form", choices=("linear", "tanh")
    )
    encoder_head: str = _model(
        "relu",
        "what precedes the encoder's last layer; bare, the authors' form, has no ReLU there, and spectral norm on the "
        "class embedding, up to 32 px on that layer too",
        choices=("relu", "bare"),
    )
    generator_head: str = _model(
        "3x3", "the generator's last convolution; 1x1 is the authors' form above 32 px", choices=("3x3", "1x1")
    )
    features: str = _model(
        "places",
        "the discriminator's features that the encoder's loss and the score compare: at each place, or their sums over "
        "places, the authors' form above 32 px",
        choices=("places", "sums"),
    )

    pathology_width: int = _model(
        32, "channels of the pathology head after its first block, a quarter of those after its last", low=1, high=512
    )

    augmentation: str = _gan(
        "none",
        "what each image may become in a step, of the encoder too: mirrored, or a part of half its area to all of it; "
        "both is the authors' form",
        choices=("none", "flip", "crop", "both"),
    )
    gan_steps: int = _gan(20000, "generator steps", low=0)
    batch_size: int = _gan(64, "images a step", low=1)
    critic_steps: int = _gan(1, "discriminator steps a generator step", low=1, high=100)
    penalty: float = _gan(10.0, "weight of the gradient penalty", low=0)
    generator_lr: float = _gan(1e-4, "learning rate of the generator (Adam)", low=0, high=1)
    discriminator_lr: float = _gan(4e-4, "learning rate of the discriminator (Adam)", low=0, high=1)
    ema: float = _gan(0.999, "decay of the generator's moving average", low=0, high=0.999999)

    encoder_steps: int = _encoder(10000, "encoder steps", low=0)
    encoder_lr: float = _encoder(
        1e-3, "learning rate of the encoder (Adam), brought to zero on a cosine", low=0, high=1
    )
    generator_tuning: float = _encoder(
        0.0,
        "learning rate of the generator beside the encoder, as a share of the encoder's: above 0 for objects with fine "
        "detail, which a generator trained briefly does not draw; 0 leaves it as it is",
        low=0,
        high=10,
    )
    kappa: float = _encoder(1.0, "weight of the feature term in the encoder's loss and in the score", low=0)

    pathology_steps: int = _setting(
        "training of the pathology head", 1000, "steps on normal images and synthetic pathologies of them", low=0
    )

    score: str = _scoring(
        "learned",
        "what the score is: all of its terms, as held-out normal images and synthetic pathologies of them weigh them "
        "(learned); or the error of the reconstruction alone, the distance of the image's descriptor from those of "
        "normal images (density), that of its contrast and errors (texture), or of its largest errors (defects), the "
        "first two distances (both), or these and the error (all)",
        choices=SCORES,
    )
    quantile: float = _scoring(0.95, "quantile of the held-out normal scores that is the threshold", low=0, high=1)
    score_batch: int = _scoring(64, "images scored at once, all normal classes of each beside it", low=1)
    control_steps: int = _scoring(1500, "training steps of the autoencoder that results are compared with", low=1)

    kernels: str = _run(
        "fused",
        "backend of the ops; fused chooses one for each call",
        choices=("reference", "fused", "native", "triton"),
    )
    # float32 is the default because of accuracy. Measured at 32 px on a CPU with AVX512-BF16: a step in bfloat16 took
    # 0.66 of the time and 0.54 of the memory, and its losses differed by up to 0.09.
    precision: str = _run(
        "float32", "arithmetic of training; scores are always float32", choices=("float32", "bfloat16")
    )
    threads: int = _run(0, "threads of PyTorch on a CPU; 0 for its own choice", low=0, high=1024)
    seed: int = _run(0, "seed of everything random", low=0, high=2**31 - 1)
    checkpoint_every: int = _run(500, "steps between checkpoints", low=1)
    # Rank 0 may take this long to write a checkpoint. A rank whose process ends is noticed at once.
    rank_timeout: int = _run(
        300, "under torchrun: seconds that a rank waits for the others before the job ends", low=1, high=86400
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        blocks = (self.image_size // 4).bit_length() - 1
        if self.image_size != 4 * 2**blocks:
            raise InputError(
                f"image_size {self.image_size} is not 4 times a power of two (8, 16, 32, 64, 128, 256 ...)"
            )
        if self.multipliers and len(self.widths) != blocks + 1:
            raise InputError(
                f"multipliers {self.multipliers!r} are {len(self.widths)} numbers, "
                f"{self.image_size} px need {blocks + 1}"
            )
        if self.channels not in (0, 1, 3):
            raise InputError(f"channels must be 0, 1 or 3, got {self.channels}")
        for network in ("generator", "discriminator", "encoder"):
            self.attended(network)
        if self.latent_size % (blocks + 1):
            raise InputError(
                f"latent {self.latent} does not divide into the {blocks + 1} equal chunks of {self.image_size} px"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Generator channels at 4 x 4 and after each block; the other two networks mirror them."""
        if self.multipliers:
            try:
                factors = tuple(float(part) for part in self.multipliers.split(","))
            except ValueError:
                raise InputError(f"multipliers {self.multipliers!r} are not numbers such as 4,4,2,1") from None
        else:  # the published 4-4-2-1 at 32 px and 16-16-8-4-2-1 at 128 px, and their pattern at every other size
            halvings = [float(2**i) for i in range((self.image_size // 4).bit_length() - 1)]
            factors = tuple(min(16.0, factor) for factor in (halvings[-1], *reversed(halvings)))
        widths = tuple(int(self.base_width * factor) for factor in factors)
        if min(widths) < 1:
            raise InputError(
                f"multipliers {self.multipliers!r} times base_width {self.base_width} leave a layer without channels"
            )
        return widths

    def attended(self, network: str) -> frozenset[int]:
        """The blocks of ``generator``, ``discriminator`` or ``encoder``, counted from 0, that CBAM follows."""
        blocks = len(self.widths) - (network != "discriminator")
        try:
            return attention_blocks(getattr(self, f"attention_{network}"), blocks)
        except ValueError as error:
            raise InputError(f"attention_{network}: {error}") from None

    @property
    def latent_size(self) -> int:
        chunks = len(self.widths)
        return self.latent or chunks * (32 if self.image_size <= 64 else 20)

    @property
    def head(self) -> str:
        if self.discriminator_head != "auto":
            return self.discriminator_head
        return "flatten" if self.image_size <= 32 else "sum"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def attention_blocks(which: str, blocks: int) -> frozenset[int]:
    """The members of 0 .. ``blocks`` - 1 meant by "none", "all", "last-2" or numbers like "0,2"; else a ValueError."""
    if which in ("none", "all"):
        return frozenset(range(blocks if which == "all" else 0))
    if which.startswith("last-") and which[5:].isdigit():
        return frozenset(range(max(0, blocks - int(which[5:])), blocks))
    parts = [part.strip() for part in which.split(",")]
    if all(part.isdigit() and int(part) < blocks for part in parts):
        return frozenset(map(int, parts))
    raise ValueError(
        f'attention {which!r} is not "none", "all", "last-N" or block numbers from 0 to {blocks - 1} such as "0,2"'
    )


MODEL_FIELDS = tuple(
    f.name for f in dataclasses.fields(Config) if f.metadata["group"] == "model" and f.name != "channels"
)
"""Fields that shape the weights, beside the channels and the classes of the data."""

# Of the presets for a CPU.
_SMALL = {"batch_size": 32, "generator_lr": 2e-4, "discriminator_lr": 8e-4, "ema": 0.995, "threads": 1}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # These digits have 8 px. Steps and rates: a few minutes on two CPU cores. One thread, because of a measurement on
    # two cores: a second thread took a step from 81 to 65 ms while both were free, and to 340 ms while one was busy.
    # 90 images a class are few for a Gaussian of 192 coordinates: AUROC 0.992 by density, 0.996 by reconstruction.
    "digits": {
        **_SMALL, "dataset": "digits", "image_size": 8, "multipliers": "2,1", "gan_steps": 2500, "encoder_steps": 500,
        "pathology_steps": 300, "score": "reconstruction",
    },
    # One core trains this in about three minutes. Results: docs/results.md.
    "mnist-small": {
        **_SMALL, "dataset": "mnist", "image_size": 16, "base_width": 32, "gan_steps": 3000, "encoder_steps": 1500,
        "score": "density",
    },
    # The score that told the training part's other classes from held-out images best: docs/results.md.
    "mnist": {"dataset": "mnist", "score": "density"},
    "fashion-mnist": {"dataset": "fashion-mnist", "score": "all"},
    # The published widths, and the score with the highest mean over three data sets. Not run here.
    "mvtec": {"dataset": "mvtec", "image_size": 128, "base_width": 96, "batch_size": 16},
    # Parts on a plain ground, with small defects. On MVTec screws only these settings told good from bad.
    "parts": {
        **_SMALL, "batch_size": 16, "fit": "align", "brightness": "level", "image_size": 64, "base_width": 16,
        "multipliers": "4,4,2,2,1", "gan_steps": 2000, "encoder_steps": 3000, "generator_tuning": 1.0,
        "score": "defects",
    },
    # The published widths; not run here. docs/results.md has 64 px.
    "pulmonary": {"dataset": "chest-xray", "image_size": 128, "base_width": 96, "batch_size": 16},
}  # fmt: skip


def goes_by_time(preset: str | None, dataset: str) -> bool:
    """Whether sizes and steps are still to be chosen, by :mod:`raccgan.evaluation.budget`."""
    return preset is None and dataset != "digits"


def make_config(preset: str | None, overrides: Mapping[str, Any]) -> Config:
    """The preset's configuration with ``overrides`` on top.

    Without a preset ``digits`` have theirs, and all other data have rates for small networks on a CPU. An unknown
    preset or field, or a value outside its limits, is an InputError.
    """
    if goes_by_time(preset, overrides.get("dataset", "digits")):
        start: Mapping[str, Any] = _SMALL | {"threads": 0}
    elif (preset := preset or "digits") in PRESETS:
        start = PRESETS[preset]
    else:
        raise InputError(f"no preset called {preset!r}; there are {', '.join(PRESETS)}")
    known = {f.name for f in dataclasses.fields(Config)}
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"no setting called {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return Config(**{**start, **overrides})


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    """One field against the type of its default, its choices and its limits."""
    wanted = type(f.default)
    if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
        raise InputError(f"{f.name} must be {wanted.__name__}, got {value!r}")
    choices, low, high = f.metadata["choices"], f.metadata["low"], f.metadata["high"]
    if choices and value not in choices:
        raise InputError(f"{f.name} {value!r} is not one of {', '.join(choices)}")
    if isinstance(value, float) and value != value:
        raise InputError(f"{f.name} is not a number")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{f.name} {value} is out of range: it must be {limits}")
