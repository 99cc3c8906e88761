"""Checkpoints: whole or not there, and an older one survives whatever happens to its successor."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raccgan import checkpoint as checkpoints
from raccgan.errors import InputError
from raccgan.networks import Networks
from raccgan.run import Run
from raccgan.training import Training
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
    with pytest.raises(InputError, match="another version of raccgan; this one reads format 1"):
        checkpoints.load(saved.path)


def test_weights_of_another_shape_are_named(saved: Training) -> None:
    stored = checkpoints.load(saved.path)
    larger = checkpoints.config_of(stored, base_width=8)
    with pytest.raises(InputError, match="weights do not fit this configuration: it is of a larger network"):
        checkpoints.networks_of(stored, larger, CPU)
    config = checkpoints.config_of(stored, base_width=2)
    with pytest.raises(InputError, match="the checkpoint's generator does not fit this configuration: size mismatch"):
        checkpoints.networks_of(stored, config, CPU)
