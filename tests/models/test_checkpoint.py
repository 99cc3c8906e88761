"""Checkpoints: whole or not there, and an older one survives whatever happens to its successor."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.networks import Networks
from raccgan.training.loop import Training
from raccgan.training.run import Run
from tests.conftest import CPU

Make = Callable[..., tuple[Run, Training]]


@pytest.fixture
def saved(tiny: Make) -> Training:
    _, training = tiny(gan_steps=3)
    training.run("gan")
    return training


def same(networks: Networks, stored: checkpoints.Checkpoint) -> bool:
    return all(
        torch.equal(value, stored.networks[name][key])
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    )


def test_what_is_saved_is_what_is_loaded(saved: Training) -> None:
    stored = checkpoints.load(saved.path)
    assert same(saved.networks, stored)
    assert same(saved.networks, checkpoints.load(saved.path.parent)), "a run's folder is as good as its checkpoint"
    assert stored.steps == {"gan": 3, "encoder": 0}
    assert stored.classes == ["0", "1", "2", "3", "4"]
    config = checkpoints.config_of(stored)
    assert config.to_dict() == saved.config.to_dict()
    assert same(checkpoints.networks_of(stored, config, CPU), stored)


def test_a_full_disk_leaves_the_older_checkpoint(saved: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, stream: Any) -> None:
        stream.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*checkpoint\.pt: .*[Nn]o space left"):
        saved.save("gan")
    assert saved.path.read_bytes() == before
    assert [path.name for path in saved.path.parent.iterdir()] == [saved.path.name]


def test_another_version_is_named(saved: Training) -> None:
    content = torch.load(saved.path, weights_only=True)
    torch.save(content | {"format": 99}, saved.path)
    with pytest.raises(InputError, match="another version of raccgan; this one reads format 4"):
        checkpoints.load(saved.path)


def test_weights_of_another_shape_are_named(saved: Training) -> None:
    stored = checkpoints.load(saved.path)
    larger = checkpoints.config_of(stored, base_width=8)
    with pytest.raises(InputError, match="weights do not fit this configuration: it is of a larger network"):
        checkpoints.networks_of(stored, larger, CPU)
    config = checkpoints.config_of(stored, base_width=2)
    with pytest.raises(InputError, match="the checkpoint's generator does not fit this configuration: size mismatch"):
        checkpoints.networks_of(stored, config, CPU)


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "torch"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtin.*eval"), (bytearray, "builtin.*bytearray"), (print, "builtin.*print")],
)
def test_what_a_pickle_wants_to_call_is_said_and_not_called(
    tmp_path: Path, function: Any, name: str, protocol: Any
) -> None:
    """``bytearray`` runs no code, but with a large number it takes all memory; PyTorch's reader calls it."""
    argument = {os.mkdir: str(tmp_path / "made"), eval: "1 / 0", bytearray: 1, print: "ran"}[function]
    path = tmp_path / "hostile.pt"
    if protocol == "torch":
        torch.save({"format": 1, "config": Calls(function, argument)}, path)
    else:
        path.write_bytes(pickle.dumps({"config": Calls(function, argument)}, protocol))
    with pytest.raises(InputError, match=rf"hostile\.pt was refused: it wants to call \S*{name}, .*could run code"):
        checkpoints.load(path)
    assert not (tmp_path / "made").exists()


def test_an_archive_that_claims_more_than_it_is_large(saved: Training) -> None:
    """A tensor of a gibibyte of zeros is a megabyte when compressed, and PyTorch's reader inflates it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(saved.path) as there, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as here:
        for entry in there.infolist():
            here.writestr(entry.filename, there.read(entry))
    saved.path.write_bytes(packed.getvalue())
    with pytest.raises(InputError, match=r"was refused: it has \d+ bytes and claims to hold \d+"):
        checkpoints.load(saved.path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {"image_size": [8]}),
        ("config", ["image_size"]),
        ("config", {"penalty": float("nan")}),
        ("classes", []),
        ("classes", ["a", "a"]),
        ("classes", "ab"),
        ("classes", [1]),
        ("channels", 2),
        ("channels", True),
        ("channels", 10**9),
        ("networks", {"generator": {"weight": 1.0}}),
        ("networks", {"generator": {"weight": torch.zeros(1).expand(1 << 40)}}),
        ("networks", {"generator": [torch.zeros(1)]}),
        ("optimisers", {"generator": 1}),
        ("steps", {"gan": -1}),
        ("steps", {"gan": "3"}),
        ("history", {"penalty": [(1, "x")]}),
        ("history", {"penalty": [(1, float("inf"))]}),
        ("threshold", "0.5"),
        ("threshold", float("nan")),
        ("seconds", None),
        ("held_out", {"score": torch.zeros(3)}),
        ("held_out", {"score": torch.zeros(3), "peak": torch.zeros(2)}),
        ("held_out", {"score": torch.zeros(1).expand(1 << 40), "peak": torch.zeros(1).expand(1 << 40)}),
        ("held_out", {"score": torch.full((3,), torch.nan), "peak": torch.zeros(3)}),
        ("held_out_policy", 5),
    ],
)
def test_a_field_that_holds_something_else_is_named(saved: Training, name: str, value: Any) -> None:
    torch.save(torch.load(saved.path, weights_only=True) | {name: value}, saved.path)
    with pytest.raises(
        InputError, match=f"was refused: its {name} is not what a checkpoint of raccgan holds"
    ) as caught:
        checkpoints.load(saved.path)
    assert "\n" not in str(caught.value)


def test_a_small_file_does_not_make_a_large_network(saved: Training) -> None:
    """The configuration of networks of 52 GB beside the weights of tiny ones: refused before anything is allocated."""
    stored = checkpoints.load(saved.path)
    config = checkpoints.config_of(stored, image_size=1024, base_width=1024, multipliers="", latent=0)
    with pytest.raises(InputError, match="weights do not fit this configuration"):
        checkpoints.networks_of(stored, config, CPU)


def test_a_pickle_of_any_bytes_is_read_or_refused(saved: Training) -> None:
    """Bytes changed, cut out and put in at random, in an archive that is whole: two hundred of them."""
    with zipfile.ZipFile(saved.path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    draw, said = random.Random(0), []
    for _ in range(200):
        changed = io.BytesIO()
        with zipfile.ZipFile(changed, "w") as archive:
            for name, content in entries:
                archive.writestr(name, shuffled(content, draw) if name.endswith(".pkl") else content)
        saved.path.write_bytes(changed.getvalue())
        try:
            stored = checkpoints.load(saved.path)
            checkpoints.networks_of(stored, checkpoints.config_of(stored), CPU)
        except InputError as error:
            said.append(str(error))
    assert 100 < len(said) < 200
    assert not any("\n" in line for line in said)


def shuffled(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3, 10))):
        place, other = draw.randrange(len(changed)), draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1:
            del changed[place : place + draw.randrange(1, 20)]
        else:
            changed[place:place] = changed[other : other + draw.randrange(1, 30)]
    return bytes(changed)


@pytest.mark.parametrize("change", ["shape", "absent", "group"])
def test_an_optimiser_of_other_weights_is_refused(tiny: Make, saved: Training, change: str) -> None:
    stored = checkpoints.load(saved.path)
    state = stored.optimisers["discriminator"]
    if change == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(99)
    elif change == "absent":
        del stored.optimisers["discriminator"]
    else:
        state["param_groups"] = [{"params": [0]}]
    with pytest.raises(InputError, match="optimiser of the discriminator does not fit its weights"):
        tiny(resumed=stored)


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_at_the_end(
    saved: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut would lose cannot be shown here; the order of the system's calls that rule it out can."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"name {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    saved.save("gan")
    assert calls == ["sync .part", f"name {saved.path.name}", "sync folder"]
