"""Which test images pixel metrics are of, and why there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raccgan import train
from raccgan.config import Config
from raccgan.evaluation import assessment
from raccgan.evaluation.metrics import PixelMetrics, pixel_metrics
from raccgan.training.run import Run, prepare
from tests.cli.test_commands import run as call
from tests.conftest import TINY_OPTIONS

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(folder: str, count: int, *, mask: bool = False, blank: bool = False) -> None:
        for index in range(count):
            path = tmp_path / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(40, 200, (16, 16)).astype(np.uint8)
            if mask:
                pixels = np.zeros((16, 16), np.uint8)
                pixels[2:5, index : index + 4] = 0 if blank else 255
            Image.fromarray(pixels).save(path)

    return write


def loaded(root: Path) -> Run:
    return prepare(Config(dataset=str(root), image_size=16), root, torch.device("cpu"))


def test_anomalous_images_without_a_mask_are_left_out(tmp_path: Path, write: Write) -> None:
    """Perfect maps are perfect whatever the number of images without a mask."""
    for folder, count in (("train/good", 4), ("test/good", 3), ("test/crack", 5), ("test/scratch", 5)):
        write(folder, count)
    write("ground_truth/crack", 5, mask=True)
    run = loaded(tmp_path)
    masks = assessment._masks(run)
    assert [run.split.test[i].label for i in masks.images] == ["crack"] * 5 + ["good"] * 3
    assert (masks.without, masks.empty) == (5, 0)
    assert masks.stacked().sum(axis=(1, 2)).tolist() == [12] * 5 + [0] * 3
    assert pixel_metrics(masks.stacked().astype(float), masks.stacked()) == PixelMetrics(1.0, 1.0)
    assert masks.note(10) == "left out of pixel metrics: of 10 anomalous test images 5 have no mask"


@pytest.mark.parametrize(
    ("folders", "masked", "note"),
    [
        (["test/good"], "", "no pixel metrics: no test image is anomalous"),
        (["test/good", "test/bad"], "", "no pixel metrics: of 3 anomalous test images 3 have no mask"),
        (
            ["test/good", "test/bad"],
            "ground_truth/bad",
            "no pixel metrics: of 3 anomalous test images 3 have one that marks nothing that the model sees",
        ),
    ],
)
def test_why_there_are_no_pixel_metrics(
    tmp_path: Path, write: Write, folders: list[str], masked: str, note: str
) -> None:
    for folder in ["train/good", *folders]:
        write(folder, 3)
    if masked:
        write(masked, 3, mask=True, blank=True)
    run = loaded(tmp_path)
    masks = assessment._masks(run)
    assert masks.images == []
    assert masks.note(sum(map(run.split.is_anomalous, run.split.test))) == note


def test_only_anomalous_images_in_the_test_part(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is a threshold, but no AUROC; pixels of anomalous images are normal and anomalous."""
    write("train/good", 10)
    write("test/bad", 3)
    write("ground_truth/bad", 3, mask=True)
    out = tmp_path / "run"
    small = [*TINY_OPTIONS, "--image-size=16", "--multipliers=1,1,1", "--latent=9", "--batch-size=4"]
    assert call(train, "--dataset", tmp_path, "--out", out, *small) == 0
    said = capsys.readouterr()
    assert "image AUROC n/a" in said.out
    assert "masks: 3 of the 3 anomalous test images have one" in said.err.splitlines()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["image"]["auroc"] is None
    assert 0 <= metrics["pixel"]["auroc"] <= 1
    assert metrics["masks"] == {"images": 3, "without_mask": 0, "empty": 0, "note": None}
    assert metrics["images"] == {"train": 8, "held_out": 2, "test_normal": 0, "test_anomalous": 3}
