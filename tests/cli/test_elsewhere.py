"""A run that is used from another folder than it was trained in, or on fewer images than it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raccgan import Detector, evaluate, train
from raccgan.config import make_config
from raccgan.models import checkpoint as checkpoints
from raccgan.models.networks import build
from raccgan.scoring.calibration import note_few
from raccgan.training.run import fewer_a_batch, prepare
from tests.cli.test_commands import refused, run, shapes
from tests.conftest import CPU, TINY_OPTIONS, tiny_config


def test_the_data_of_a_run_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shapes(here / "scans", ["normal", "ill"], 12)
    monkeypatch.chdir(here)
    options = (*TINY_OPTIONS, "--image-size=8", "--phase=gan")
    assert run(train, "--dataset", "scans", "--out", tmp_path / "run", *options) == 0
    stored = checkpoints.load(tmp_path / "run")
    monkeypatch.chdir(there)
    found = prepare(checkpoints.config_of(stored), tmp_path, CPU)
    assert found.config.dataset == str(here / "scans")
    assert len(found.split.train) == 6
    shapes(there / "scans", ["normal", "ill"], 7)
    found = prepare(checkpoints.config_of(stored), tmp_path, CPU)
    assert len(found.split.train) == 3, "what lies here under the same name comes first"
    assert checkpoints.config_of(stored, dataset="digits").dataset == "digits"
    monkeypatch.chdir(tmp_path)
    (here / "scans").rename(here / "moved")
    assert "--dataset names where it lies" in refused(capsys, evaluate, tmp_path / "run")


def test_a_batch_is_no_larger_than_the_images_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes(tmp_path / "ten", ["good", "bad"], 10)
    options = [option for option in TINY_OPTIONS if not option.startswith("--batch-size")]
    assert run(train, "--dataset", tmp_path / "ten", "--out", tmp_path / "run", *options, "--image-size", 8) == 0
    said = capsys.readouterr().err
    assert (
        "note: there are 5 images to train on, beside 1 held out for the threshold and 14 to test, so a batch has 5 "
        "instead of 32" in said
    )
    assert "note: the threshold rests on 1 held-out normal image, and a 0.95 quantile needs 20" in said
    assert checkpoints.load(tmp_path / "run").config["batch_size"] == 5
    assert Detector.load(tmp_path / "run").config.batch_size == 5


def test_a_batch_that_fits_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare(tiny_config(), tmp_path, CPU)
    assert fewer_a_batch(prepared, 8) is prepared
    assert fewer_a_batch(prepared, 7).config.batch_size == 7
    capsys.readouterr()
    for count, quantile in ((20, 0.95), (100, 0.99), (5, 1.0), (5, 0.5), (0, 0.95)):
        note_few(count, quantile)
    assert capsys.readouterr().err == ""
    note_few(19, 0.95)
    assert "19 held-out normal images, and a 0.95 quantile needs 20" in capsys.readouterr().err


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_large_sizes_are_built_and_score(size: int) -> None:
    """One image through every network, of one channel a block."""
    blocks = size.bit_length() - 2
    config = make_config(
        "mvtec", {"image_size": size, "base_width": 1, "multipliers": ",".join("1" * blocks), "latent": blocks}
    )
    networks = build(config, channels=1, classes=1, device=CPU)
    x, y = torch.zeros(1, 1, size, size), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        z = networks.encoder(x, y)
        assert networks.average(z, y).shape == x.shape
        assert networks.discriminator.features(x).isfinite().all()
