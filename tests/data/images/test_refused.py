"""What is no image, or has no defined scale, is refused in a line that names the file and the reason."""

import io
import random
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan.data.images import decode as images
from raccgan.data.images import opening
from raccgan.data.images.decode import decode, decode_mask
from raccgan.errors import InputError
from tests.kernels.compare import assert_each_close

RANDOM = np.random.default_rng(0)


def png_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (32, 32)).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def jpeg_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (64, 64)).astype(np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", "is no image of a kind"),
        (b"no image at all", "is no image of a kind that is read here"),
        (png_bytes()[: len(png_bytes()) // 2], "cannot read .*: .*truncated"),
        (png_bytes()[:20], "cannot read|is no image"),
        (jpeg_bytes()[: len(jpeg_bytes()) // 2], "cannot read .*: .*truncated"),
        (png_bytes()[:60] + b"\xff" * 50 + png_bytes()[110:], "cannot read"),
        (b"GIF89a" + struct.pack("<HH", 10, 10) + b"\x00" * 5, "cannot read|is no image"),
        (b"P5 3 3 255\n" + b"\x00" * 4, "cannot read"),
    ],
)
def test_damaged_files_are_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        decode(path, size=8, channels=1)
    assert "broken.png" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"broken.png"):
        decode_mask(path, path, size=8)


@pytest.mark.parametrize("kind", opening.FORMATS)
def test_random_damage_is_read_or_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes changed, cut out and put in: never another exception, never a value outside the range."""
    monkeypatch.setattr(opening, "MOST_PIXELS", 1_000_000)
    stream = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (24, 24, 3)).astype(np.uint8)).save(stream, kind)
    whole, draw, refusals = stream.getvalue(), random.Random(0), 0
    for _ in range(80):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 10))):
            place = draw.randrange(min(len(changed), draw.choice((60, len(changed)))))
            changed[place : place + draw.choice((0, 1, 1, 5))] = draw.randbytes(draw.choice((0, 1, 1, 4)))
        (tmp_path / "a.png").write_bytes(changed)
        try:
            decoded = decode(tmp_path / "a.png", size=8, channels=1)
        except InputError as error:
            refusals += len(str(error).splitlines())
        else:
            assert decoded.shape == (1, 8, 8)
            assert -1 <= decoded.min() <= decoded.max() <= 1
    assert 0 < refusals <= 80


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere.png: No such file"):
        decode(tmp_path / "nowhere.png", size=8, channels=1)
    with pytest.raises(InputError, match="cannot read"):
        decode(tmp_path, size=8, channels=1)


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "bomb.png")
    Image.new("L", (12, 12)).save(tmp_path / "large.png")
    monkeypatch.setattr(opening, "MOST_PIXELS", 200)
    for pillows in (100, 50):  # where Pillow only warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        with pytest.raises(InputError, match=r"bomb.png has more than 200 pixels"):
            decode(tmp_path / "bomb.png", size=8, channels=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    decode(tmp_path / "large.png", size=8, channels=1)
    assert not recwarn.list


def test_threads_share_what_they_may_have_in_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen threads, images of 100 and 144 pixels, 250 in work at the most: two at a time, never three."""
    for i in range(16):
        Image.new("L", (10, 10) if i % 2 else (12, 12), 10 * i).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(opening, "MOST_PIXELS", 250)
    pixels_of, seen = images.pixels_of, []

    def slowly(opened: Image.Image, what: str) -> np.ndarray:
        seen.append(opening._in_work)
        time.sleep(0.01)
        return pixels_of(opened, what)

    monkeypatch.setattr(images, "pixels_of", slowly)
    with ThreadPoolExecutor(16) as pool:
        decoded = list(pool.map(lambda i: decode(tmp_path / f"{i}.png", size=4, channels=1), range(16)))
    assert max(seen) in (200, 244)
    assert opening._in_work == 0
    assert_each_close([image.mean() for image in decoded], [10 * i / 127.5 - 1 for i in range(16)], atol=1e-5)


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MOST_BYTES", len(png_bytes()) - 1)
    (tmp_path / "large.png").write_bytes(png_bytes())
    with pytest.raises(InputError, match=r"large.png has more than \d+ bytes: make it smaller"):
        decode(tmp_path / "large.png", size=8, channels=1)


def test_warning_filters_are_restored_after_many_threads(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    before = list(warnings.filters)

    def work() -> None:
        for _ in range(20):
            decode(tmp_path / "a.png", size=4, channels=1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 3), dtype=np.int64), "the array has int64 pixels; use uint8, uint16, or float"),
        (np.zeros((3, 3), dtype=np.uint32), "the array has uint32 pixels"),
        (np.zeros(3, dtype=np.uint8), "has shape"),
        (np.zeros((3, 3, 5), dtype=np.uint8), "has shape"),
        (np.zeros((0, 3), dtype=np.uint8), "has shape"),
    ],
)
def test_arrays_that_are_no_image(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(pixels, size=3, channels=1)


def test_unknown_fit_and_channels() -> None:
    image = np.zeros((3, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="no fit called 'squash'; there are stretch, crop, pad"):
        decode(image, size=3, channels=1, fit="squash")
    with pytest.raises(InputError, match="1 or 3 channels, not 2"):
        decode(image, size=3, channels=2)
