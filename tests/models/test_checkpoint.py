"""Checkpoints: whole or not there, and an older one survives whatever happens to its successor."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models import tensor_file
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
    assert stored.steps == {"gan": 3, "encoder": 0, "pathology": 0}
    assert stored.classes == ["0", "1", "2", "3", "4"]
    config = checkpoints.config_of(stored)
    assert config.to_dict() == saved.config.to_dict()
    assert same(checkpoints.networks_of(stored, config, CPU), stored)


def test_a_full_disk_leaves_the_older_checkpoint(saved: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.path.read_bytes()
    saved.seconds += 1
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*checkpoint\.safetensors: .*[Nn]o space left"):
        saved.save("gan")
    assert saved.path.read_bytes() == before
    assert [path.name for path in saved.path.parent.iterdir()] == [saved.path.name]


def rewritten(path: Path, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    """A checkpoint with other fields and more tensors, and the checksum of them."""
    there, stored = tensor_file.read(path)
    path.write_bytes(tensor_file.packed(there | header, stored | (tensors or {})))


def test_another_version_is_named(saved: Training) -> None:
    rewritten(saved.path, {"format": 99})
    with pytest.raises(InputError, match="no checkpoint of this version of raccgan, which reads format 6"):
        checkpoints.load(saved.path)


def test_a_pickle_of_before_is_refused_with_the_way_on(saved: Training, tmp_path: Path) -> None:
    """In a run's folder too, which has no other checkpoint."""
    old = tmp_path / "old" / "checkpoint.pt"
    old.parent.mkdir()
    torch.save({"format": 4, "config": {}}, old)
    for path in (old, old.parent):
        with pytest.raises(InputError, match=r"checkpoint\.pt is a pickle, .*: train anew, or use the version that"):
            checkpoints.load(path)
    shutil.copy(saved.path, old.parent)
    assert same(saved.networks, checkpoints.load(old.parent))


def test_weights_of_another_shape_are_named(saved: Training) -> None:
    stored = checkpoints.load(saved.path)
    larger = checkpoints.config_of(stored, base_width=8)
    with pytest.raises(InputError, match="weights do not fit this configuration: it is of a larger network"):
        checkpoints.networks_of(stored, larger, CPU)
    config = checkpoints.config_of(stored, base_width=2)
    with pytest.raises(
        InputError,
        match=r"generator does not fit this configuration: '.*' is \(.*\) float32 there and \(.*\) float32 here",
    ):
        checkpoints.networks_of(stored, config, CPU)


class Calls:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "torch"])
def test_what_a_pickle_wants_to_call_is_not_called(tmp_path: Path, protocol: Any) -> None:
    path, payload = tmp_path / "hostile.safetensors", {"config": Calls(os.mkdir, str(tmp_path / "made"))}
    if protocol == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload, protocol))
    with pytest.raises(InputError, match=r"is a pickle|does not begin as a safetensors file does"):
        checkpoints.load(path)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(payload))
    assert (tmp_path / "made").exists(), "the test's payload does nothing"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["networks.generator.head.bias"].update(shape=[1 << 40], data_offsets=[0, 1 << 42]),
        lambda header: header["networks.generator.head.bias"].update(shape=[1 << 40]),
        lambda header: header["networks.generator.head.bias"].update(shape=[1 << 63, 1 << 63]),
        lambda header: header["networks.generator.head.bias"].update(dtype="F64"),
        lambda header: header["networks.generator.head.bias"].update(data_offsets=[-8, -4]),
        lambda header: header.pop("networks.generator.head.bias"),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__={"format": "pt"}),
        lambda header: header.update(__metadata__={"raccgan": " " + "[" * 100_000}),
        lambda header: header.update(__metadata__={"raccgan": " " + "9" * 5000}),
    ],
    ids=["offsets", "shape", "overflow", "dtype", "negative", "gap", "no metadata", "foreign", "nested", "number"],
)
def test_a_lying_header_is_refused_before_anything_is_allocated(saved: Training, change: Callable[..., Any]) -> None:
    content = saved.path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    saved.path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InputError, match="truncated or no checkpoint") as caught:
        checkpoints.load(saved.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {"image_size": [8]}),
        ("config", ["image_size"]),
        ("config", {"penalty": float("nan")}),
        ("config", {"penalty": 10**400}),
        ("classes", []),
        ("classes", ["a", "a"]),
        ("classes", "ab"),
        ("classes", [1]),
        ("channels", 2),
        ("channels", True),
        ("channels", 10**9),
        ("steps", {"gan": -1, "encoder": 0}),
        ("steps", {"gan": "3", "encoder": 0}),
        ("steps", {"gan": 3}),
        ("history", {"penalty": [(1, "x")]}),
        ("history", {"penalty": [(1, float("inf"))]}),
        ("history", {"penalty": [(1,)]}),
        ("threshold", "0.5"),
        ("threshold", float("nan")),
        ("seconds", None),
        ("held_out_policy", 5),
        ("held_out", {"score": torch.zeros(3)}),
        ("held_out", {"score": torch.zeros(3), "peak": torch.zeros(2)}),
        ("held_out", {"score": torch.zeros(0), "peak": torch.zeros(0)}),
        ("held_out", {"score": torch.zeros(3).double(), "peak": torch.zeros(3)}),
        ("held_out", {"score": torch.full((3,), torch.nan), "peak": torch.zeros(3)}),
    ],
)
def test_a_field_that_holds_something_else_is_named(saved: Training, name: str, value: Any) -> None:
    if name == "held_out":
        rewritten(saved.path, {}, {f"held_out.{key}": tensor for key, tensor in value.items()})
    else:
        rewritten(saved.path, {name: value})
    with pytest.raises(
        InputError, match=f"was refused: its {name} is not what a checkpoint of raccgan holds"
    ) as caught:
        checkpoints.load(saved.path)
    assert "\n" not in str(caught.value)


def test_unknown_fields_and_tensors_are_refused(saved: Training) -> None:
    whole = saved.path.read_bytes()
    rewritten(saved.path, {"more\n": 1})
    with pytest.raises(InputError, match=r"holds no 'more\\n'"):
        checkpoints.load(saved.path)
    saved.path.write_bytes(whole)
    rewritten(saved.path, {}, {"elsewhere.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"holds no 'elsewhere\.weight'"):
        checkpoints.load(saved.path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("head.bias", torch.zeros(1).double(), r"'head.bias' is \(1,\) float64 there and \(1,\) float32 here"),
        ("head.bias", torch.zeros(2), r"'head.bias' is \(2,\) float32 there and \(1,\) float32 here"),
        ("more", torch.zeros(1), r"'more' is \(1,\) float32 there and absent here"),
        ("head.bias", None, r"'head.bias' is absent there and \(1,\) float32 here"),
    ],
)
def test_weights_of_another_form_are_named(saved: Training, key: str, value: Tensor | None, reason: str) -> None:
    stored = checkpoints.load(saved.path)
    del stored.networks["average"]["head.bias"]
    if value is not None:
        stored.networks["average"][key] = value
    if key == "more":
        stored.networks["average"]["head.bias"] = torch.zeros(1)
    with pytest.raises(InputError, match=f"the checkpoint's average does not fit this configuration: {reason}"):
        stored.restore(saved.networks)


def test_a_small_file_does_not_make_a_large_network(saved: Training) -> None:
    """The configuration of networks of 52 GB beside the weights of tiny ones: refused before anything is allocated."""
    stored = checkpoints.load(saved.path)
    config = checkpoints.config_of(stored, image_size=1024, base_width=1024, multipliers="", latent=0)
    with pytest.raises(InputError, match="weights do not fit this configuration"):
        checkpoints.networks_of(stored, config, CPU)


def test_a_file_of_any_bytes_is_refused(saved: Training) -> None:
    """Bytes changed, cut out and put in at random: two hundred files, half of them with the harm in the header."""
    whole = saved.path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    for i in range(60):
        changed = shuffled(whole[:header], draw) + whole[header:] if i % 2 else shuffled(whole, draw)
        if changed == whole:  # zeros for zeros
            continue
        saved.path.write_bytes(changed)
        with pytest.raises(InputError) as caught:
            checkpoints.load(saved.path)
        assert "\n" not in str(caught.value)


def test_headers_of_any_text_are_read_or_refused(saved: Training) -> None:
    """Text that is changed at random, with the checksum of what it has become: sixty headers."""
    header, tensors = tensor_file.read(saved.path)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    text, draw, said = json.dumps(header).encode(), random.Random(0), []
    for _ in range(60):
        changed = shuffled(text, draw).decode("utf-8", errors="replace")
        metadata = {"raccgan": f"{tensor_file.hash_of(changed, tensors)} {changed}"}
        saved.path.write_bytes(safetensors.torch.save(tensors, metadata))
        try:
            stored = checkpoints.load(saved.path)
            checkpoints.networks_of(stored, checkpoints.config_of(stored), CPU)
        except InputError as error:
            said.append(str(error))
    assert len(said) >= 15
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


@pytest.mark.parametrize("change", ["shape", "absent", "more", "less"])
def test_an_optimiser_of_other_weights_is_refused(tiny: Make, saved: Training, change: str) -> None:
    stored = checkpoints.load(saved.path)
    state = stored.optimisers["discriminator"]
    if change == "shape":
        state["0.exp_avg"] = torch.zeros(99)
    elif change == "absent":
        del stored.optimisers["discriminator"]
    elif change == "more":
        state["-1.exp_avg"] = torch.zeros(1)
    else:
        del state["0.step"]
    with pytest.raises(InputError, match="optimiser of the discriminator does not fit its weights"):
        tiny(resumed=stored)


def test_an_optimiser_goes_on_in_the_memory_format_of_its_weights(tiny: Make, saved: Training) -> None:
    """Files have the order of the axes, and Adam's fused kernel takes no notice of strides."""
    _, resumed = tiny(resumed=checkpoints.load(saved.path), generator_lr=0.5)
    for name in ("generator", "discriminator"):
        ours, theirs = resumed.optimisers[name], saved.optimisers[name]
        for one, other in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(ours.state[one][kind], theirs.state[other][kind])
                assert ours.state[one][kind].stride() == one.stride() == theirs.state[other][kind].stride()
    assert resumed.optimisers["generator"].param_groups[0]["lr"] == 0.5, "a setting is the configuration's"


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
