"""Checkpoints: written whole or not at all, and read without running any code that they hold.

A checkpoint is one safetensors file (:mod:`raccgan.models.tensor_file`). Its tensors are the weights of the networks
(``networks.generator.linear.weight``), the state of the optimisers (``optimisers.encoder.0.exp_avg``) and the held-out
scores (``held_out.score``). Its header is everything else: see :class:`Header`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch.overrides import TorchFunctionMode

from raccgan.config import MODEL_FIELDS, Config
from raccgan.errors import InputError
from raccgan.models import tensor_file
from raccgan.models.networks import Networks, build
from raccgan.models.tensor_file import Tensors, flat, form, matches
from raccgan.outputs.files import sync_folder, write_atomically

FORMAT = 6
NAME = "checkpoint.safetensors"
PICKLED_NAME = "checkpoint.pt"  # up to format 4, which was PyTorch's pickle; it is refused with a line of its own

History = dict[str, list[tuple[int, float]]]  # points (step, value) of each loss curve


@dataclass
class Header:
    """What a checkpoint holds beside tensors. The annotations are the schema that a file's JSON is checked against."""

    config: dict[str, str | int | float]
    classes: list[str]  # names of the normal classes; the position is the condition's index
    channels: int
    steps: dict[str, int] = field(default_factory=dict)  # done, by phase: "gan", "encoder" and "pathology"
    history: History = field(default_factory=dict)
    threshold: float | None = None
    seconds: float = 0.0  # of training so far, over all sessions
    held_out_policy: str = "minimum"  # the label policy that the held-out scores are under
    pixel_threshold: float | None = None  # a pixel is anomalous where its map is above it
    dataset_at: str = ""  # the absolute path of the data; empty where the data set is one that has a name


@dataclass
class Checkpoint(Header):
    """A whole checkpoint: the header and the tensors."""

    networks: dict[str, Tensors] = field(default_factory=dict)  # state dictionaries by the names in Networks
    optimisers: dict[str, Tensors] = field(default_factory=dict)  # optimiser_state of each one that has begun
    held_out: Tensors = field(default_factory=dict)
    """Of the held-out normal images, float32 [N] each: "score", and "peak", the maximum of the anomaly map. Empty
    before calibration."""

    def calibrated(self, calibration: Calibration) -> Checkpoint:
        """The same with another threshold, and the scores that the threshold comes from."""
        return dataclasses.replace(
            self,
            threshold=calibration.threshold,
            held_out=calibration.held_out,
            held_out_policy=calibration.policy,
            pixel_threshold=calibration.pixel_threshold,
        )

    def restore(self, networks: Networks) -> None:
        """Copy the weights to ``networks``; an InputError if one is missing, unknown, or of another shape or dtype."""
        for name, network in networks.items():
            stored = self.networks.get(name, {})
            if problem := _difference(stored, network.state_dict()):
                raise InputError(f"the checkpoint's {name} does not fit this configuration: {problem}")
            network.load_state_dict(stored)

    def restore_optimiser(self, name: str, optimiser: torch.optim.Optimizer) -> None:
        """Copy a state into ``optimiser``, whose settings stay; an InputError if the state is of other weights."""
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        likes = [{"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight} for weight in weights]
        stored = self.optimisers.get(name, {})
        if _difference(stored, flat({str(i): of_weight for i, of_weight in enumerate(likes)})):
            raise InputError(f"the checkpoint's optimiser of the {name} does not fit its weights")
        # Adam's fused kernel walks through a weight and its state in the order in memory: the weight's.
        state = {
            i: {kind: torch.empty_like(like).copy_(stored[f"{i}.{kind}"]) for kind, like in of_weight.items()}
            for i, of_weight in enumerate(likes)
        }
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


@dataclass(frozen=True)
class Calibration:
    """Thresholds of scores and of pixels, and the normal images' scores and map maxima that they come from."""

    threshold: float
    held_out: Tensors
    policy: str
    pixel_threshold: float | None = None  # None where no normal image's map is known


def optimiser_state(optimiser: torch.optim.Optimizer) -> Tensors:
    """The state that Adam keeps, by ``INDEX.NAME`` with the index of a weight; settings are the configuration's."""
    return flat({str(index): of_weight for index, of_weight in optimiser.state_dict()["state"].items()})


def existing(path: Path) -> Path:
    """The checkpoint file that a path means: itself, or the one in a run's folder; an InputError if there is none."""
    file = path / NAME if path.is_dir() else path
    if not file.is_file() and (path / PICKLED_NAME).is_file():
        file = path / PICKLED_NAME
    if not file.is_file():
        raise InputError(f"no checkpoint at {file}; give a run's folder or its {NAME}")
    return file


def digest(checkpoint: Checkpoint) -> str:
    """What a checkpoint scores with, in 32 hexadecimal digits: weights, classes and settings, not the threshold."""
    text = json.dumps([checkpoint.config, checkpoint.classes, checkpoint.channels], sort_keys=True)
    return tensor_file.hash_of(text, flat({"networks": checkpoint.networks}))


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint at ``path`` by one that survives a power cut; an InputError if it cannot be written."""
    header = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(Header)}
    tensors = {name: getattr(checkpoint, name) for name in ("networks", "optimisers", "held_out")}
    content = tensor_file.packed({"format": FORMAT} | header, flat(tensors))
    write_atomically(path, lambda stream: stream.write(content))
    sync_folder(path.parent)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file, or the one in a run's folder, in a few times its size of memory. No code in it is run.

    An InputError if the file is missing, truncated, damaged or not a checkpoint of ours.
    """
    path = existing(path)
    header, tensors = tensor_file.read(path)
    if header.pop("format", None) != FORMAT:
        raise InputError(
            f"{path} is no checkpoint of this version of raccgan, which reads format {FORMAT}: train anew, or use the "
            "version that wrote it"
        )
    content, expected = header | _by_part(tensors), get_type_hints(Checkpoint)
    if unknown := content.keys() - expected.keys():
        raise InputError(f"{path} was refused: a checkpoint of raccgan holds no {min(unknown)!r}")
    for name, kind in expected.items():
        valid = name in content and matches(content[name], kind)
        if not valid or (name in _RULES and not _RULES[name](content[name])):
            raise InputError(f"{path} was refused: its {name} is not what a checkpoint of raccgan holds")
    content["history"] = {name: [*map(tuple, points)] for name, points in content["history"].items()}
    return Checkpoint(**content)


def config_of(checkpoint: Checkpoint, **overrides: Any) -> Config:
    """The configuration of a checkpoint, with some settings replaced.

    Data that are no longer at the path given for training, as seen from here, are looked for where that path led then.
    """
    known = Config.__dataclass_fields__.keys() & checkpoint.config.keys()
    settings = {name: checkpoint.config[name] for name in known}
    there = checkpoint.dataset_at
    if there and not Path(str(settings["dataset"])).exists() and Path(there).exists():
        settings["dataset"] = there
    return Config(**settings | overrides)


def networks_of(checkpoint: Checkpoint, config: Config, device: torch.device) -> Networks:
    """Networks with a checkpoint's weights, on ``device``; an InputError if these do not fit the configuration."""
    with _Undrawn(sum(value.numel() for value in flat(checkpoint.networks).values())):
        networks = build(config, channels=checkpoint.channels, classes=len(checkpoint.classes), device=device)
    checkpoint.restore(networks)
    return networks


class _Undrawn(TorchFunctionMode):
    """Builds networks whose weights are replaced at once, and refuses networks of more than ``elements`` weights.

    Weights are not made orthogonal, which is 1.7 of the 2.2 s of building at 128 px; PyTorch's meta device takes 3 s.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.left = elements

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
    """Raise an InputError, with both values of each field that differs, if a checkpoint is of another model or data."""
    both = {f"{name} is": (repr(checkpoint.config.get(name)), repr(getattr(config, name))) for name in MODEL_FIELDS}
    both["normal classes are"] = (",".join(checkpoint.classes), ",".join(classes))
    both["channels are"] = (str(checkpoint.channels), str(channels))
    differ = [f"{what} {there} there and {here} here" for what, (there, here) in both.items() if there != here]
    if differ:
        raise InputError(f"the checkpoint is of another configuration: {'; '.join(differ)}; use another --out")


def _by_part(tensors: Tensors) -> dict[str, Any]:
    """The tensors of a file as the fields of :class:`Checkpoint`; a tensor of another name is one of its own."""
    parts: dict[str, Any] = {"networks": {}, "optimisers": {}, "held_out": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        of, _, key = rest.partition(".")
        if part == "held_out":
            parts[part][rest] = value
        elif part in parts:
            parts[part].setdefault(of, {})[key] = value
        else:
            parts[name] = value
    return parts


def _difference(stored: Tensors, wanted: Tensors) -> str | None:
    """The first tensor in which a stored state dictionary is not of the form wanted, in words."""
    for name in {**wanted, **stored}:
        there, here = (form(of[name]) if name in of else "absent" for of in (stored, wanted))
        if there != here:
            return f"{name!r} is {there} there and {here} here"
    return None


def _are_held_out(scores: Tensors) -> bool:
    valid = all(v.dtype == torch.float32 and v.dim() == 1 and bool(v.isfinite().all()) for v in scores.values())
    return valid and (
        not scores or (scores.keys() == {"score", "peak"} and 0 < len(scores["score"]) == len(scores["peak"]))
    )


_RULES: dict[str, Callable[[Any], bool]] = {  # what the commands rely on beyond the types
    "classes": lambda names: 0 < len(names) == len(set(names)),
    "channels": lambda count: count in (1, 3),
    "steps": lambda steps: (
        steps.keys() == {"gan", "encoder", "pathology"} and all(count >= 0 for count in steps.values())
    ),
    "held_out": _are_held_out,
}
