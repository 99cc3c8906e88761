"""The shapes that are measured: the layers of the two published models, derived as the networks derive them.

A layer is named by network and image size, block, and place in the block: ``G32.2a`` is the first convolution of the
generator's second block at 32 px, ``b`` the second one, ``s`` the skip. A case adds channels, input size and batch:
``G32.2a 256-128 @8 b16``. :func:`cases` has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from raccgan.config import Config, attention_blocks, make_config

Arguments = dict[str, Any]  # of a family's ``make`` in tests/kernels/grid.py


@dataclass(frozen=True)
class Layer:
    """One op of a network on inputs [batch, channels, size, size]."""

    name: str
    channels: int
    size: int
    arguments: Arguments  # without the shape

    def at(self, batch: int) -> Arguments:
        return {"shape": (batch, self.channels, self.size, self.size), **self.arguments}

    def case(self, batch: int) -> str:
        out = f"-{self.arguments['out']}" if "out" in self.arguments else ""
        return f"{self.name} {self.channels}{out} @{self.size} b{batch}"


@dataclass(frozen=True)
class Model:
    """A published model: its configuration, its images, and the batches at which its layers are measured."""

    config: Config
    image_channels: int
    batches: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.config.image_size


# At 128 px a batch of 16 takes seconds a layer on a CPU, and minutes through a penalty.
MODELS = {
    32: Model(make_config("mnist", {}), image_channels=1, batches=(1, 16, 64)),
    128: Model(make_config("mvtec", {}), image_channels=3, batches=(1, 4)),
}


def generator(config: Config) -> list[Layer]:
    """The depthwise-separable convolutions of the generator; the skips there are plain 1 x 1 convolutions."""
    layers = []
    for i, (c, d) in enumerate(pairwise(config.widths)):
        size, name = 4 * 2**i, f"G{config.image_size}.{i + 1}"
        layers.append(Layer(f"{name}a", c, size, {"out": d, "k": 7, "upsample": 2}))
        layers.append(Layer(f"{name}b", d, 2 * size, {"out": d, "k": 7, "residual": True}))
    return layers


def discriminator(config: Config, image_channels: int) -> list[Layer]:
    """The depthwise-separable convolutions of the discriminator, whose last block does not halve the image."""
    return _residual_down("D", config, (image_channels, *config.widths[::-1]))


def encoder(config: Config) -> list[Layer]:
    """The depthwise-separable convolutions of the encoder, behind a dense stem."""
    return _residual_down("E", config, config.widths[::-1])


def _residual_down(network: str, config: Config, channels: tuple[int, ...]) -> list[Layer]:
    """Blocks from the whole image to 4 x 4 pixels."""
    layers = []
    for i, (c, d) in enumerate(pairwise(channels)):
        down = i < len(config.widths) - 1
        size, name, pool = config.image_size // 2**i, f"{network}{config.image_size}.{i + 1}", 2 if down else 1
        norm = {"norm": "instance", "affine": network == "E"}  # the encoder's norms are conditioned
        first = {"pre_relu": network != "D" or i > 0, **norm}
        layers.append(Layer(f"{name}a", c, size, {"out": d, "k": 3, **first}))
        layers.append(Layer(f"{name}b", d, size, {"out": d, "k": 3, "pool": pool, "residual": True, **norm}))
        if down or c != d:
            plain = {"affine": False, "relu": False}
            layers.append(Layer(f"{name}s", c, size, {"out": d, "k": 1, "pool": pool, **plain}))
    return layers


def attention(config: Config, norm: str) -> list[Layer]:
    """CBAM where it stands: after blocks of the generator, or of the discriminator for ``norm="instance"``.

    No published discriminator has it; ``attention_discriminator`` may put it after the same number of blocks.
    """
    if norm == "instance":
        widths, network = config.widths[::-1], "D"
        sizes = [max(4, config.image_size // 2 ** (i + 1)) for i in range(len(widths))]
    else:
        widths, network = config.widths[1:], "G"
        sizes = [8 * 2**i for i in range(len(widths))]
    return [
        Layer(f"{network}{config.image_size}.{i + 1}", widths[i], sizes[i], cbam_arguments(widths[i], norm))
        for i in sorted(attention_blocks(config.attention_generator, len(widths)))
    ]


def cbam_arguments(channels: int, norm: str) -> Arguments:
    """CBAM as the networks build it: a sixteenth of the channels in between, a spatial gate of 7 x 7."""
    return {"norm": norm, "reduced": max(1, channels // 16), "k": 7}


# A pass has the norm that it has in the networks: running moments to score, the batch's to train the generator, an
# instance's in a critic under the penalty.
NORMS = {"forward": "fixed", "backward": "batch", "penalty": "instance"}


def cases(op: str, pass_: str) -> dict[str, Arguments]:
    """Every case of an op in a pass, by its name.

    Raises:
        KeyError: the benchmarks have no such op, or no such pass of it.
    """
    return _CASES[op, pass_]()


def _convolutions() -> dict[str, Arguments]:
    return {
        layer.case(batch): layer.at(batch)
        for model in MODELS.values()
        for layer in generator(model.config) + discriminator(model.config, model.image_channels)
        for batch in model.batches
    }


def _critics_convolutions() -> dict[str, Arguments]:
    """Only the discriminator is differentiated twice."""
    return {name: arguments for name, arguments in _convolutions().items() if name.startswith("D")}


def _attentions(pass_: str) -> dict[str, Arguments]:
    return {
        layer.case(batch): layer.at(batch)
        for model in MODELS.values()
        for layer in attention(model.config, NORMS[pass_])
        for batch in model.batches
    }


def _moments() -> dict[str, Arguments]:
    """Of what the generator's norms normalise."""
    return {
        f"{layer.name} {layer.channels} @{layer.size} b{batch}": {
            "shape": (batch, layer.channels, layer.size, layer.size)
        }
        for model in MODELS.values()
        for layer in generator(model.config)
        for batch in model.batches
    }


def _scores() -> dict[str, Arguments]:
    """Images and discriminator features as scoring has them."""
    return {
        f"{size}px b{batch}{' map' if want_map else ''}": {
            "shape": (batch, model.image_channels, size, size),
            "features": (model.config.widths[0], 4, 4),
            "want_map": want_map,
        }
        for size, model in MODELS.items()
        for batch in (1, 16, 64)
        for want_map in (False, True)
    }


_CASES: dict[tuple[str, str], Callable[[], dict[str, Arguments]]] = {
    ("depthwise_separable", "forward"): _convolutions,
    ("depthwise_separable", "backward"): _convolutions,
    ("depthwise_separable", "penalty"): _critics_convolutions,
    **{("cbam", pass_): partial(_attentions, pass_) for pass_ in NORMS},
    **{("moments", pass_): _moments for pass_ in ("forward", "backward")},
    **{("anomaly_score", pass_): _scores for pass_ in NORMS},
}
