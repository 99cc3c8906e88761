"""TIFF files as microscopes and cameras write them, made of bytes here: bit depths, byte orders, white as zero, MPO."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan.data.images.decode import decode
from raccgan.errors import InputError
from tests.kernels.compare import assert_each_close

STEPS = np.array([[0, 85, 170, 255]] * 2)


def tiff(path: Path, data: bytes, bits: int, *, white_is_zero: bool = False, kind: int = 1, order: str = "<") -> Path:
    """A grey TIFF of 4 x 2 pixels; ``kind`` is 1 for unsigned, 2 for signed, 3 for float."""
    tags = {256: 4, 257: 2, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1, 278: 2, 279: len(data)}
    entries = sorted((tags | {339: kind}).items())
    data += b"\0" * (len(data) % 2)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(data))
    directory = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    path.write_bytes(head + data + struct.pack(order + "H", len(entries)) + directory + b"\0\0\0\0")
    return path


def packed12(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)


@pytest.mark.parametrize(
    ("data", "bits", "options"),
    [
        (STEPS.astype("u1").tobytes(), 8, {}),
        ((STEPS * 257).astype("<u2").tobytes(), 16, {}),
        ((STEPS * 257).astype(">u2").tobytes(), 16, {"order": ">"}),
        (packed12((STEPS / 255 * 4095).round()), 12, {}),
        (bytes([0x05, 0xAF] * 2), 4, {}),
        ((STEPS * 257).astype("<u4").tobytes(), 32, {}),
        ((STEPS / 255).astype("<f4").tobytes(), 32, {"kind": 3}),
    ],
)
def test_every_depth_has_its_own_white(tmp_path: Path, data: bytes, bits: int, options: dict[str, object]) -> None:
    found = decode(tiff(tmp_path / "a.tif", data, bits, **options), size=4, channels=1, fit="crop")  # type: ignore[arg-type]
    expected = decode(STEPS.astype(np.uint8), size=4, channels=1, fit="crop")
    assert_each_close(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "bits", "kind"),
    [
        (STEPS.astype("u1").tobytes(), 8, 1),
        ((STEPS * 257).astype("<u2").tobytes(), 16, 1),
        ((STEPS / 255).astype("<f4").tobytes(), 32, 3),
    ],
)
def test_white_as_zero(tmp_path: Path, data: bytes, bits: int, kind: int) -> None:
    found = decode(tiff(tmp_path / "a.tif", data, bits, kind=kind, white_is_zero=True), size=4, channels=1)
    assert_each_close(found, decode((255 - STEPS).astype(np.uint8), size=4, channels=1), atol=1e-6)


@pytest.mark.parametrize(
    ("data", "bits", "kind", "reason"),
    [
        (STEPS.astype("u1").tobytes(), 8, 2, "signed 8-bit pixels, which have no defined white"),
        ((STEPS - 5).astype("<i2").tobytes(), 16, 2, "integer pixels from -5 to"),
        (
            STEPS.astype("<f8").tobytes(),
            64,
            3,
            "a.tif is a TIFF of an unusual kind, which is not read here",
        ),
    ],
)
def test_what_has_no_white_is_refused(tmp_path: Path, data: bytes, bits: int, kind: int, reason: str) -> None:
    path = tiff(tmp_path / "a.tif", data, bits, kind=kind)
    with pytest.raises(InputError, match=reason):
        decode(path, size=4, channels=1)


def test_of_a_picture_of_a_phone_the_first_frame_counts(tmp_path: Path) -> None:
    """An MPO has a second frame, such as a map of depths, behind the picture, and is called .jpg."""
    frames = [Image.new("RGB", (16, 16), (200, 30, 90)), Image.new("RGB", (8, 8))]
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:], quality=100)
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    expected = np.array([200, 30, 90]) / 127.5 - 1
    assert_each_close(decode(tmp_path / "a.jpg", size=16, channels=3)[:, 8, 8], expected, atol=0.03)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\0\0\0\x20ftypavif\0\0", "an AVIF image"),
        (b"\0\0\0\x18ftypheic\0\0", "an HEIC image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"\0" * 128 + b"DICM", "a DICOM file"),
        (b"<!DOCTYPE HTML><p>not found", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS without its content"),
    ],
)
def test_what_is_called_jpg_and_is_something_else_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match=rf"a.jpg is {what}, which is not read here: convert it to PNG"):
        decode(tmp_path / "a.jpg", size=8, channels=1)
