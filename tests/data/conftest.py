"""Pictures made on the spot, and the real data sets where they are."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Draw = Callable[..., Path]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """``draw("train/good/1.png", mode="RGB", size=(8, 6), value=None)`` writes a picture and returns its path.

    Without a value its pixels are random, and differ from name to name.
    """

    def write(name: str, *, mode: str = "L", size: tuple[int, int] = (8, 6), value: int | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0], 3)
        noise = np.random.default_rng(list(name.encode())).integers(0, 256, shape)
        pixels = noise if value is None else np.full(shape, value)
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)
        return path

    return write


@pytest.fixture
def draw_classes(draw: Draw) -> Callable[..., None]:
    """``draw_classes("train", good=4, bad=2)`` writes that many pictures into a folder a class."""

    def write(folder: str, **counts: int) -> None:
        for label, count in counts.items():
            for index in range(count):
                draw(f"{folder}/{label}/{index}.png")

    return write


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with MNIST, FashionMNIST, mvtec and chest_xray, or a skip."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RACCGAN_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real images: set RACCGAN_DATA to the folder that holds MNIST, mvtec and so on")
    return folder
