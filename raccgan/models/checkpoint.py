"""Checkpoints: written whole or not at all, read without running any code they hold.

One file holds the configuration, the names of the classes, all weights (the generator's average included), the
optimisers, how far each phase has come, the loss history and, once there is one, the threshold with the scores of
the normal images that it is a quantile of: another threshold can be had from them after training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raccgan.config import MODEL_FIELDS, Config
from raccgan.errors import InputError
from raccgan.models import harmless
from raccgan.models.networks import Networks, build
from raccgan.outputs.files import sync_folder, write_atomically

FORMAT = 4
NAME = "checkpoint.pt"

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
    """What the held-out normal images got, float32 [N] each: "score", and "peak", the maximum of the anomaly map. Empty
    before calibration."""
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

    def restore_optimiser(self, name: str, optimiser: torch.optim.Optimizer) -> None:
        """Copy the state of one into ``optimiser``.

        Raises:
            InputError: it is of other weights.
        """
        try:
            optimiser.load_state_dict(self.optimisers[name])
            fits = all(
                not isinstance(value, Tensor) or value.dim() == 0 or value.shape == weight.shape
                for weight, state in optimiser.state.items()
                for value in state.values()
            )
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise InputError(f"the checkpoint's optimiser of the {name} does not fit its weights")


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
    save(path, load(path).calibrated(calibration))


def existing(path: Path) -> Path:
    """The checkpoint file that a path means: itself, or the one in a run's folder.

    Raises:
        InputError: there is none.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}; give a run's folder or its {NAME}")
    return file


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

    When this returns, the new one survives a power cut: its bytes were on the disk before it took its name, and the
    name is now. Both together took 0.3 ms more for 2 MB, and nothing that could be told from the noise for 60 MB.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    content = {"format": FORMAT, **{f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}}
    write_atomically(path, lambda stream: torch.save(content, stream))
    sync_folder(path.parent)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the one in a run's folder. Nothing in it is executed, whoever made it.

    What is read takes no more memory than a few times the file's size.

    Raises:
        InputError: it is missing, truncated, not a checkpoint of ours, or wants to call something.
    """
    path = existing(path)
    try:
        with warnings.catch_warnings():  # about files that are refused right after
            warnings.simplefilter("ignore")
            harmless.check(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the readers of archives and pickles raise anything
        reason = "its pickle is damaged" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise InputError(f"{path} is truncated or no checkpoint: {reason}") from None
    expected = {f.name for f in dataclasses.fields(Checkpoint)} | {"format"}
    if not isinstance(content, dict) or set(content) != expected:
        raise InputError(f"{path} is a torch file, but not a checkpoint of raccgan")
    if content.pop("format") != FORMAT:
        raise InputError(f"{path} is a checkpoint of another version of raccgan; this one reads format {FORMAT}")
    for name, value in content.items():
        if not _IS_VALID[name](value):
            raise InputError(f"{path} was refused: its {name} is not what a checkpoint of raccgan holds")
    return Checkpoint(**content)


def config_of(checkpoint: Checkpoint, **overrides: Any) -> Config:
    """The configuration that a checkpoint was made with, with some settings of the run replaced."""
    known = {f.name for f in dataclasses.fields(Config)}
    stored = {name: value for name, value in checkpoint.config.items() if name in known}
    return Config(**{**stored, **overrides})


def networks_of(checkpoint: Checkpoint, config: Config, device: torch.device) -> Networks:
    """Networks with a checkpoint's weights, on ``device``."""
    with _NotDrawn(checkpoint):
        networks = build(config, channels=checkpoint.channels, classes=len(checkpoint.classes), device=device)
    checkpoint.restore(networks)
    return networks


class _NotDrawn(TorchFunctionMode):
    """Builds networks whose weights are overwritten at once, in no more memory than the checkpoint's weights take.

    They are not made orthogonal: 1.7 of the 2.2 s of building at 128 px.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.left = sum(value.numel() for network in checkpoint.networks.values() for value in network.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.linalg.qr:
            return args[0], args[0].new_ones(args[0].shape[-1], args[0].shape[-1])
        if func is torch.empty:  # how torch.nn makes a weight
            self.left -= math.prod(args[0] if isinstance(args[0], Sequence) else args)
            if self.left < 0:
                raise InputError("the checkpoint's weights do not fit this configuration: it is of a larger network")
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


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any, inner: Callable[[Any], bool], names: Iterable[str] | None = None) -> bool:
    return (
        isinstance(value, dict)
        and all(map(_is_text, value))
        and (names is None or value.keys() == set(names))
        and all(map(inner, value.values()))
    )


def _is_list(value: Any, inner: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(inner, value))


def _is_tensor(value: Any) -> bool:
    """One whose every element is stored: strides of zero make a terabyte out of a byte."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _are_scores(value: Any) -> bool:
    finite = _is_tensor(value) and value.dtype == torch.float32 and bool(value.isfinite().all())
    return finite and value.dim() == 1 and len(value) > 0


def _is_point(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_count(value[0]) and _is_number(value[1])


_IS_VALID: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: _is_dict(value, lambda setting: _is_text(setting) or _is_number(setting)),
    "classes": lambda value: _is_list(value, _is_text) and 0 < len(value) == len(set(value)),
    "channels": lambda value: type(value) is int and value in (1, 3),
    "networks": lambda value: _is_dict(value, lambda network: _is_dict(network, _is_tensor)),
    "optimisers": lambda value: _is_dict(value, lambda state: _is_dict(state, lambda part: type(part) in (dict, list))),
    "steps": lambda value: _is_dict(value, _is_count),
    "history": lambda value: _is_dict(value, lambda points: _is_list(points, _is_point)),
    "threshold": lambda value: value is None or _is_number(value),
    "seconds": _is_number,
    "held_out": lambda value: (
        value == {} or (_is_dict(value, _are_scores, ("score", "peak")) and len(value["score"]) == len(value["peak"]))
    ),
    "held_out_policy": _is_text,
}
"""What the commands rely on, by field."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
