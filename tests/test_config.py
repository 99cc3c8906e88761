"""Settings: presets, overrides and their limits, each error in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raccgan.config import MODEL_FIELDS, PRESETS, Config, goes_by_time, make_config
from raccgan.errors import InputError


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_every_field_can_be_overridden(preset: str) -> None:
    config = make_config(preset, {"seed": 7, "base_width": 8})
    assert (config.seed, config.base_width) == (7, 8)
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(Config)}
    assert set(MODEL_FIELDS) <= set(config.to_dict())


def test_digits_have_their_preset_and_other_data_go_by_time() -> None:
    assert make_config(None, {}) == make_config("digits", {})
    for dataset in ("mnist", "/some/folder"):
        assert goes_by_time(None, dataset)
        assert not goes_by_time("parts", dataset)
        assert make_config(None, {"dataset": dataset}).score == "learned"
    assert not goes_by_time(None, "digits")


def test_published_widths_and_latents() -> None:
    assert Config(image_size=32).widths == (256, 256, 128, 64)
    assert Config(image_size=32).latent_size == 128
    assert Config(image_size=128, base_width=96).widths == (1536, 1536, 768, 384, 192, 96)
    assert Config(image_size=128).latent_size == 120
    assert (Config(image_size=32).head, Config(image_size=128).head) == ("flatten", "sum")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 28}, "image_size 28 is not 4 times a power of two"),
        ({"image_size": 4}, "out of range"),
        ({"multipliers": "2,1", "image_size": 32}, "2 numbers, 32 px need 4"),
        ({"multipliers": "a,b", "image_size": 8}, "are not numbers"),
        ({"multipliers": "0,1", "image_size": 8}, "without channels"),
        ({"latent": 127, "image_size": 32}, "does not divide into the 4 equal chunks"),
        ({"batch_size": 0}, "batch_size 0 is out of range: it must be at least 1"),
        ({"batch_size": -4}, "out of range"),
        ({"gan_steps": -1}, "out of range"),
        ({"generator_lr": float("nan")}, "not a number"),
        ({"generator_lr": 5.0}, "from 0 to 1"),
        ({"quantile": 1.5}, "from 0 to 1"),
        ({"kernels": "cuda"}, "not one of reference, fused, native, triton"),
        ({"fit": "squash"}, "not one of stretch, crop, pad, align"),
        ({"channels": 2}, "channels must be 0, 1 or 3"),
        ({"attention_generator": "everywhere"}, "attention_generator"),
        ({"batch_size": "many"}, "batch_size must be int"),
        ({"batch_sizes": 3}, "did you mean 'batch_size'"),
    ],
)
def test_absurd_settings_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make_config("mnist", settings)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(InputError, match="no preset called 'mnsit'; there are digits, mnist"):
        make_config("mnsit", {})
