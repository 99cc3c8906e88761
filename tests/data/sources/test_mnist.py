"""The files of MNIST and Fashion-MNIST, read from a small set made here."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from raccgan.data.sources import mnist
from raccgan.data.sources.mnist import load_fashion_mnist, load_mnist
from raccgan.errors import InputError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A data root with ten training and ten test images in the format of MNIST; image i is grey i, of class i."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(10, dtype=np.uint8), 28 * 28)
    for images, labels in (FILES[:2], FILES[2:]):
        (raw / images).write_bytes(struct.pack(">4i", 0x803, 10, 28, 28) + pixels.tobytes())
        (raw / labels).write_bytes(struct.pack(">2i", 0x801, 10) + bytes(range(10)))
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mirrors that hold nothing, and are asked without a network."""
    nothing = (tmp_path / "nothing").as_uri() + "/"
    monkeypatch.setattr(mnist, "MIRRORS", dict.fromkeys(mnist.MIRRORS, nothing))


def test_reading(tiny: Path) -> None:
    source = load_mnist(tiny)
    assert len(source.samples) == 20
    assert source.default_normal == ("0",)
    assert (source.samples[3].key, source.samples[3].label, source.samples[3].split) == ("train/3", "3", "train")
    assert (source.samples[17].key, source.samples[17].label, source.samples[17].split) == ("test/7", "7", "test")
    image = source.samples[17].image
    assert isinstance(image, np.ndarray)
    assert image.shape == (28, 28)
    assert (image == 7).all()


def test_names_of_garments(tiny: Path) -> None:
    (tiny / "MNIST").rename(tiny / "FashionMNIST")
    source = load_fashion_mnist(tiny)
    assert source.classes[0] == source.samples[0].label == "t-shirt"
    assert source.classes[9] == source.samples[9].label == "ankle-boot"


@pytest.mark.usefixtures("no_network")
def test_absent_files_are_named(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tiny / "MNIST/raw" / FILES[2]).unlink()
    with pytest.raises(InputError, match=f"MNIST is not complete .*: put {FILES[2]} into .*MNIST/raw") as caught:
        load_mnist(tiny)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"put {', '.join(FILES)} into .*FashionMNIST/raw"):
        load_fashion_mnist(tiny)


@pytest.mark.usefixtures("no_network")
def test_a_data_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be downloaded"):
        load_mnist(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, struct.pack(">4i", 0x803, 10, 28, 28) + b"\x00" * 50])
def test_damaged_files(tiny: Path, content: bytes) -> None:
    (tiny / "MNIST/raw" / FILES[0]).write_bytes(content)
    with pytest.raises(InputError, match=r"MNIST/raw is damaged \(.*\): replace train-images-idx3-ubyte"):
        load_mnist(tiny)


def test_compressed_files_are_read_as_they_are(tiny: Path) -> None:
    expected = load_mnist(tiny).samples[17]
    for name in FILES:
        path = tiny / "MNIST/raw" / name
        (path.parent / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert (load_mnist(tiny).samples[17].image == expected.image).all()


def test_a_damaged_compressed_file(tiny: Path) -> None:
    path = tiny / "MNIST/raw" / FILES[0]
    content = bytearray(gzip.compress(path.read_bytes()))
    content[len(content) // 2] ^= 0xFF
    (path.parent / f"{path.name}.gz").write_bytes(content)
    path.unlink()
    with pytest.raises(InputError, match=r"MNIST/raw is damaged \(.*\): replace train-images-idx3-ubyte"):
        load_mnist(tiny)


def test_absent_files_are_downloaded_and_their_checksum_is_compared(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    path = tiny / "MNIST/raw" / FILES[0]
    content = path.read_bytes()
    compressed = gzip.compress(content)
    (mirror / f"{FILES[0]}.gz").write_bytes(compressed)
    path.unlink()
    monkeypatch.setitem(mnist.MIRRORS, "MNIST", mirror.as_uri() + "/")
    with pytest.raises(InputError, match=f"{FILES[0]}.gz came with another checksum"):
        load_mnist(tiny)
    assert not path.exists()
    monkeypatch.setitem(mnist.MD5["MNIST"], FILES[0], hashlib.md5(compressed).hexdigest())
    assert len(load_mnist(tiny).samples) == 20
    assert path.read_bytes() == content
