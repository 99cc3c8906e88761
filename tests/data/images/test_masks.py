"""Masks with soft edges, of class numbers, smaller or turned: the pixels that they mark, in the model's square."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan.data.images.decode import decode, decode_mask
from raccgan.data.images.masks import marked
from raccgan.errors import InputError

Bools = np.ndarray


def block(size: int = 64) -> Bools:
    """A rectangle and a cross of thin lines."""
    mask = np.zeros((size, size), bool)
    mask[8:24, 10:30] = True
    mask[40:43, 5:60] = True
    mask[28:62, 44:47] = True
    return mask


def saved(path: Path, mask: Bools, **options: object) -> Path:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_mask_in_jpeg_marks_what_it_marked(tmp_path: Path, quality: int) -> None:
    path = saved(tmp_path / "a.jpg", block(), quality=quality)
    np.testing.assert_array_equal(decode_mask(path, np.zeros((64, 64), np.uint8), size=64), block())


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_a_mask_with_soft_edges_ends_half_way(tmp_path: Path, resample: Image.Resampling) -> None:
    soft = Image.fromarray(block().astype(np.uint8) * 255).resize((128, 128), resample)
    soft.save(tmp_path / "a.png")
    mask = decode_mask(tmp_path / "a.png", np.zeros((128, 128), np.uint8), size=128)
    np.testing.assert_array_equal(mask, block().repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [False, True]),
        ([0, 1, 2, 3], [False, True, True, True]),
        ([0, 60, 120, 255], [False, True, True, True]),
        ([0, 255], [False, True]),
        ([0, 128], [False, True]),
        ([100, 200], [False, True]),
        ([0], [False]),
        ([255], [True]),
    ],
)
def test_levels_and_numbers_of_classes(values: list[int], expected: list[bool]) -> None:
    areas = np.repeat(np.repeat(values, 6)[None], 6, axis=0)
    found = marked((areas[..., None] / 255).astype(np.float32))
    np.testing.assert_array_equal(found, np.repeat(np.repeat(expected, 6)[None], 6, axis=0))


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("side", [1, 3])
def test_no_small_defect_vanishes(tmp_path: Path, fit: str, side: int) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        row, column = draw.integers(0, 128 - side, 2)
        mask = np.zeros((128, 128), bool)
        mask[row : row + side, column : column + side] = True
        found = decode_mask(saved(tmp_path / "a.png", mask), np.zeros((128, 128), np.uint8), size=8, fit=fit)
        np.testing.assert_array_equal(found, mask.reshape(8, 16, 8, 16).any(axis=(1, 3)))


def test_no_small_defect_vanishes_in_a_part_that_is_turned(tmp_path: Path) -> None:
    pixels = np.full((200, 300), 220, np.uint8)
    for i in range(160):  # a bar across the image
        pixels[20 + i, 40 + i : 70 + i] = 40
    for i in range(5, 155, 10):
        mask = np.zeros(pixels.shape, bool)
        mask[20 + i, 55 + i] = True
        assert 1 <= decode_mask(saved(tmp_path / "a.png", mask), pixels, size=16, fit="align").sum() <= 2


@pytest.mark.parametrize("scale", [0.5, 2])
def test_a_mask_of_another_scale_is_brought_to_its_image(tmp_path: Path, scale: float) -> None:
    small = np.zeros((20, 30), bool)
    small[4:8, 10:20] = True
    side = Image.fromarray(small.astype(np.uint8) * 255).resize((int(60 * scale), int(40 * scale)), 0)
    side.save(tmp_path / "a.png")
    found = decode_mask(tmp_path / "a.png", np.zeros((40, 60), np.uint8), size=60, fit="pad")
    np.testing.assert_array_equal(found[10:50], small.repeat(2, 0).repeat(2, 1))


def test_a_mask_of_other_proportions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.png is 64 x 64 pixels, its image 60 x 40: a mask needs the proportions"):
        decode_mask(saved(tmp_path / "a.png", block()), np.zeros((40, 60), np.uint8), size=16)


def test_several_masks_of_an_image_are_one(tmp_path: Path) -> None:
    halves = [block() & (np.arange(64) < 36)[:, None], block() & (np.arange(64) >= 36)[:, None]]
    files = tuple(saved(tmp_path / f"{i}.png", half) for i, half in enumerate(halves))
    np.testing.assert_array_equal(decode_mask(files, np.zeros((64, 64), np.uint8), size=64), block())


@pytest.fixture
def turned(tmp_path: Path) -> Callable[..., Path]:
    """A wide image with a bright corner, stored with an EXIF orientation; or its mask."""

    def write(name: str, orientation: int, shape: tuple[int, int] = (24, 36)) -> Path:
        pixels = np.zeros(shape, np.uint8)
        pixels[:6, :12] = 255
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        return tmp_path / name

    return write


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("mask_turned", [True, False])
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_a_mask_turns_with_its_image(
    turned: Callable[..., Path], orientation: int, mask_turned: bool, name: str
) -> None:
    """Drawn on the image as its file stores it, with the same orientation or with none."""
    image = turned(name, orientation)
    mask = turned("b.png", orientation if mask_turned else 0)
    seen = decode(image, size=36, channels=1, fit="pad")[0] > 0
    np.testing.assert_array_equal(decode_mask(mask, image, size=36, fit="pad"), seen)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_mask_that_was_drawn_on_the_upright_image_stays(turned: Callable[..., Path], orientation: int) -> None:
    image, mask = turned("a.tif", orientation), turned("b.png", 0, (36, 24))
    np.testing.assert_array_equal(decode_mask(mask, image, size=36, fit="pad")[:6, 6:18], np.ones((6, 12), bool))


@pytest.mark.parametrize(("orientation", "shape"), [(3, (24, 36)), (2, (24, 36)), (6, (24, 24))])
def test_a_mask_that_may_lie_either_way_is_refused(
    turned: Callable[..., Path], orientation: int, shape: tuple[int, int]
) -> None:
    with pytest.raises(InputError, match=rf"a.tif is turned by its EXIF orientation {orientation}, and .*b.png has no"):
        decode_mask(turned("b.png", 0, shape), turned("a.tif", orientation, shape), size=24)
    decode_mask(turned("c.png", orientation, shape), turned("a.tif", orientation, shape), size=24)
