"""The loaders on the published data sets; skipped where these are not at hand."""

from pathlib import Path

import pytest

from raccgan.data.dataset import ImageDataset
from raccgan.data.images.decode import decode_mask
from raccgan.data.sources.registry import load_source
from raccgan.data.splits import make_split


def present(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not in the data folder")


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist(real_data: Path, name: str, folder: str) -> None:
    present(real_data / folder / "raw")
    source = load_source(name, real_data)
    assert len(source.classes) == 10
    split = make_split(source, None, ())
    official = sum(sample.split == "train" and sample.label == source.classes[0] for sample in source.samples)
    assert len(split.train) + len(split.held_out) == official
    assert len(split.test) == 10_000
    assert sum(split.is_anomalous(sample) for sample in split.test) == pytest.approx(9000, abs=150)
    images = ImageDataset(split.train[:64], classes=split.normal_classes, size=28, channels=1).images(range(64))
    assert (images.min().item(), images.max().item()) == (-1, 1)


def test_screw(real_data: Path) -> None:
    present(real_data / "mvtec" / "screw")
    source = load_source("mvtec", real_data, category="screw")
    assert source.channels == 3
    split = make_split(source, None, ())
    assert len(split.train) + len(split.held_out) == 320
    assert len(split.test) == 160
    anomalous = [sample for sample in split.test if split.is_anomalous(sample)]
    assert len(anomalous) == 119
    assert len({sample.label for sample in anomalous}) == 5
    for sample in anomalous[::30]:
        assert sample.mask is not None
        assert 0 < decode_mask(sample.mask, sample.image, size=64).mean() < 0.2
    assert not ImageDataset(split.test[::10], classes=split.normal_classes, size=64, channels=3).problems()


def test_chest_xray(real_data: Path) -> None:
    present(real_data / "chest_xray")
    source = load_source("chest-xray", real_data)
    assert source.channels == 1
    split = make_split(source, None, ())
    assert len(split.train) + len(split.held_out) == 1340
    assert len(split.test) == 618
    assert sum(split.is_anomalous(sample) for sample in split.test) == 387
    assert not ImageDataset(split.train[::50], classes=split.normal_classes, size=64, channels=1).problems()
