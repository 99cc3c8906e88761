"""What the tests of exports share: tiny runs, and every image that they could see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raccgan import train
from raccgan.data.images.decode import decode
from raccgan.data.listing import list_images
from raccgan.models import checkpoint as checkpoints
from raccgan.scoring.scorer import MINIMUM, Scorer
from tests.cli.test_commands import run, shapes
from tests.conftest import CPU, TINY_OPTIONS


@dataclass
class Trained:
    """A tiny run at 16 px, whose threshold lies amid the scores, and every image that it could see."""

    run: Path
    images: Tensor  # [N, C, 16, 16] in [-1, 1]

    def scorer(self, label_policy: str = MINIMUM) -> Scorer:
        stored = checkpoints.load(self.run)
        config = checkpoints.config_of(stored)
        return Scorer(config, checkpoints.networks_of(stored, config, CPU), stored.classes, label_policy)

    @property
    def threshold(self) -> float:
        threshold = checkpoints.load(self.run).threshold
        assert threshold is not None
        return threshold

    @property
    def pixel_threshold(self) -> float:
        threshold = checkpoints.load(self.run).pixel_threshold
        assert threshold is not None
        return threshold


def trained(place: Path, channels: int, normal: str, *options: str) -> Trained:
    shapes(place / "data", ["dark", "middle", "bright"], 20)
    where = ["--dataset", place / "data", "--protocol", "one-vs-rest", "--normal", normal, "--out", place / "run"]
    model = ["--image-size", 16, "--latent", 9, "--channels", channels, "--attention-encoder", "last-1"]
    assert run(train, *where, *TINY_OPTIONS, *model, "--quantile", 0.5, *options, "--phase", "gan") == 0
    assert run(train, "--resume", place / "run", "--phase", "encoder") == 0
    files = list_images(place / "data")
    return Trained(place / "run", torch.stack([torch.from_numpy(decode(f, size=16, channels=channels)) for f in files]))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Grey, two normal classes."""
    return trained(tmp_path_factory.mktemp("several"), 1, "dark,middle")
