"""Checkpoints: written whole or not at all, read without running any code they hold.

One file holds the configuration, the names of the classes, all weights (the generator's average included), the
optimisers, how far each phase has come, the loss history and, once there is one, the threshold with the scores of
the normal images that it is a quantile of: another threshold can be had from them after training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raccgan.config import MODEL_FIELDS, Config
from raccgan.errors import InputError
from raccgan.files import write_atomically
from raccgan.networks import Networks, build

FORMAT = 1
NAME = "checkpoint.pt"
LATER_FIELDS = {"held_out", "held_out_policy"}
"""Fields that checkpoints of format 1 did not have from the start; one without them gets their defaults."""

History = dict[str, list[tuple[int, float]]]


@dataclass
class Checkpoint:
    """The content of a checkpoint, as plain tensors, numbers, strings, lists and dictionaries."""

    config: dict[str, Any]
    classes: list[str]
    """Names of the normal classes; the position is the condition's index."""
    channels: int
    networks: dict[str, dict[str, Any]]
    optimisers: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    """Steps done, by phase: "gan" and "encoder"."""
    history: History = field(default_factory=dict)
    threshold: float | None = None
    seconds: float = 0.0
    """Training time so far, over all sessions."""
    held_out: dict[str, Tensor] = field(default_factory=dict)
    """What the held-out normal images got, float32 [N] each: "score", and "peak", the maximum of the anomaly map.
    Empty before calibration, and in checkpoints older than this field."""
    held_out_policy: str = "minimum"
    """The label policy that those scores are under."""

    def calibrated(self, calibration: Calibration) -> Checkpoint:
        """The same with another threshold, and the scores that it comes from."""
        return dataclasses.replace(
            self,
            threshold=calibration.threshold,
            held_out=calibration.held_out,
            held_out_policy=calibration.policy,
        )

    def restore(self, networks: Networks) -> None:
        """Copy the weights into ``networks``.

        Raises:
            InputError: they are of another shape.
        """
        for name, network in networks.items():
            try:
                network.load_state_dict(self.networks[name])
            except (KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1].strip()
                raise InputError(f"the checkpoint's {name} does not fit this configuration: {reason}") from None


@dataclass(frozen=True)
class Calibration:
    """A threshold, and the normal images' scores that it comes from."""

    threshold: float
    held_out: dict[str, Tensor]
    policy: str


def recalibrate(path: Path, calibration: Calibration) -> None:
    """Give the checkpoint at ``path`` another threshold; everything else in it stays, bit for bit.

    Raises:
        InputError: as :func:`load` and :func:`save`.
    """
    save(file_of(path), load(path).calibrated(calibration))


def file_of(path: Path) -> Path:
    """The checkpoint file that a path means: itself, or the one in a run's folder."""
    return path / NAME if path.is_dir() else path


def digest(checkpoint: Checkpoint) -> str:
    """What a checkpoint scores with, in 32 hexadecimal digits: weights, classes and settings, not the threshold."""
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(json.dumps([checkpoint.config, checkpoint.classes, checkpoint.channels], sort_keys=True).encode())
    for name, network in sorted(checkpoint.networks.items()):
        for key, value in sorted(network.items()):
            hashed.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write beside, then rename: an older checkpoint at ``path`` is replaced only by a whole new one.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    content = {"format": FORMAT, **{f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}}
    write_atomically(path, lambda stream: torch.save(content, stream))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the one in a run's folder. Nothing in it is executed.

    Raises:
        InputError: it is missing, truncated, not a checkpoint of ours, or holds code.
    """
    path = file_of(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; give a run's folder or its {NAME}")
    try:
        with warnings.catch_warnings():  # about files that are refused right after
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise InputError(
                f"{path} was refused: it holds more than tensors and plain values, so reading it could run code"
            ) from None
        raise InputError(f"{path} is no readable checkpoint: {_first_line(error)}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is truncated or no checkpoint: {_first_line(error)}") from None
    expected = {f.name for f in dataclasses.fields(Checkpoint)} | {"format"}
    if not isinstance(content, dict) or not expected - LATER_FIELDS <= set(content) <= expected:
        raise InputError(f"{path} is a torch file, but not a checkpoint of raccgan")
    if content.pop("format") != FORMAT:
        raise InputError(f"{path} is a checkpoint of another version of raccgan; this one reads format {FORMAT}")
    return Checkpoint(**content)


def config_of(checkpoint: Checkpoint, **overrides: Any) -> Config:
    """The configuration that a checkpoint was made with, with some settings of the run replaced."""
    known = {f.name for f in dataclasses.fields(Config)}
    stored = {name: value for name, value in checkpoint.config.items() if name in known}
    return Config(**{**stored, **overrides})


def networks_of(checkpoint: Checkpoint, config: Config, device: torch.device) -> Networks:
    """Networks with a checkpoint's weights, on ``device``."""
    with _NotDrawn():
        networks = build(config, channels=checkpoint.channels, classes=len(checkpoint.classes), device=device)
    checkpoint.restore(networks)
    return networks


class _NotDrawn(TorchFunctionMode):
    """Weights that are overwritten at once are not made orthogonal: 1.7 of the 2.2 s of building at 128 px."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.linalg.qr:
            return args[0], args[0].new_ones(args[0].shape[-1], args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def check_same_model(checkpoint: Checkpoint, config: Config, classes: list[str], channels: int) -> None:
    """Refuse to resume training on another model or other classes than the checkpoint's.

    Raises:
        InputError: naming each field that differs, with both values.
    """
    wanted = config.to_dict()
    differ = [
        f"{name} is {checkpoint.config.get(name)!r} there and {wanted[name]!r} here"
        for name in MODEL_FIELDS
        if checkpoint.config.get(name) != wanted[name]
    ]
    if checkpoint.classes != classes:
        differ.append(f"normal classes are {','.join(checkpoint.classes)} there and {','.join(classes)} here")
    if checkpoint.channels != channels:
        differ.append(f"channels are {checkpoint.channels} there and {channels} here")
    if differ:
        raise InputError(f"the checkpoint is of another configuration: {'; '.join(differ)}; use another --out")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
