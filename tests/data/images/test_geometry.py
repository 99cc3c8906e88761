"""Where images come to lie in the square, and what is turned upright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raccgan.data.images.decode import decode, decode_mask
from raccgan.data.images.geometry import FITS, place_in_square
from raccgan.data.images.pose import find_pose
from raccgan.errors import InputError
from tests.data.parts import part
from tests.kernels.compare import assert_each_close


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32)[..., None] / 255


@pytest.mark.parametrize("fit", FITS)
def test_a_place_in_the_map_is_the_place_in_the_original(fit: str) -> None:
    """A white pixel of the original lights up a pixel of the square, from which its place is found again."""
    for height, width in ((64, 64), (40, 90), (90, 40)):
        for y, x in ((height // 2, width // 2), (height // 2 + 5, width // 2 - 9)):
            pixels = np.zeros((height, width), np.uint8)
            pixels[y, x] = 255
            square = decode(pixels, size=32, channels=1, fit=fit)[0]
            row, column = divmod(int(square.argmax()), 32)
            place = place_in_square(unit(pixels), 32, fit)
            found_x, found_y = place.original(row, column)
            assert abs(found_x - x) <= width / 32
            assert abs(found_y - y) <= height / 32
            drawn = place.lay(square + 1, width, height)
            assert drawn.shape == (height, width)
            peak_y, peak_x = np.unravel_index(drawn.argmax(), drawn.shape)
            assert abs(peak_x - x) <= width / 16
            assert abs(peak_y - y) <= height / 16


def test_black_bars_are_outside_of_the_original() -> None:
    place = place_in_square(np.zeros((10, 100, 1), np.float32), 32, "pad")
    assert place.original(0, 0) == (1, 0)
    assert place.original(31, 31) == (98, 9)


@pytest.mark.parametrize("angle", range(0, 360, 25))
@pytest.mark.parametrize("ground", [200, 10])
def test_a_part_is_seen_alike_however_it_lies(angle: int, ground: int) -> None:
    upright = decode(part(0, ground=ground), size=48, channels=1, fit="align")[0]
    turned = decode(part(angle, ground=ground, centre=(70, 92)), size=48, channels=1, fit="align")[0]
    assert np.abs(turned - upright).mean() < 0.03
    assert np.corrcoef(turned.ravel(), upright.ravel())[0, 1] > 0.98


def test_the_narrower_end_is_below_and_nothing_is_mirrored() -> None:
    square = decode(part(137), size=48, channels=1, fit="align")[0]
    dark = square < 0
    assert dark[5].sum() > 1.5 * dark[42].sum()
    spot = (square > -0.2) & (square < 0.3)
    assert spot[6:18, 14:24].sum() > 4 * spot[6:18, 24:34].sum()  # left of the axis, as it was drawn


def test_where_a_part_lies_does_not_depend_on_the_size_of_the_image() -> None:
    for scale in (0.5, 2.0, 5.0):
        pixels = part(30, size=round(160 * scale), centre=(80 * scale, 80 * scale), length=90 * scale)
        large, small = find_pose(unit(pixels)), find_pose(unit(part(30)))
        for side, expected in zip(large, small, strict=True):
            assert_each_close(side / scale, expected, atol=2)


def test_dust_and_noise_are_not_the_part() -> None:
    random = np.random.default_rng(0)
    pixels = part(60).astype(np.float32) + random.normal(0, 6, (160, 160))
    pixels[10:13, 10:14] = 20
    found = find_pose(unit(pixels.clip(0, 255)))
    for side, expected in zip(found, find_pose(unit(part(60))), strict=True):
        assert_each_close(side, expected, atol=3)


def test_a_blank_image_is_taken_whole() -> None:
    blank = np.full((30, 50), 128, np.uint8)
    np.testing.assert_array_equal(
        decode(blank, size=16, channels=1, fit="align"), decode(blank, size=16, channels=1, fit="stretch")
    )
    corner, down, right = find_pose(unit(blank))
    assert (corner.tolist(), down.tolist(), right.tolist()) == ([0, 0], [30, 0], [0, 50])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5)])
def test_tiny_images_are_aligned_too(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    square = decode(pixels, size=8, channels=1, fit="align")
    assert square.shape == (1, 8, 8)
    assert np.isfinite(square).all()


def test_what_is_round_is_not_turned() -> None:
    canvas = Image.new("L", (100, 80), 255)
    ImageDraw.Draw(canvas).ellipse((30, 20, 70, 60), fill=0)
    _, down, right = find_pose(unit(np.asarray(canvas)))
    assert down[1] == right[0] == 0
    assert down[0] > 0
    assert right[1] > 0


def test_what_has_no_narrower_end_is_turned_by_less_than_half_a_turn() -> None:
    for angle in (-60, 0, 60):
        canvas = Image.new("L", (120, 120), 255)
        ImageDraw.Draw(canvas).rectangle((50, 20, 70, 100), fill=0)
        _, down, _ = find_pose(unit(np.asarray(canvas.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255))))
        assert down[0] > 0


def test_masks_turn_with_their_images(tmp_path: Path) -> None:
    pixels = part(75, centre=(90, 70))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.where((pixels > 110) & (pixels < 170), 255, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    mask = decode_mask(tmp_path / "mask.png", tmp_path / "image.png", size=64, fit="align")
    spot = decode(pixels, size=64, channels=1, fit="align")[0]
    seen = mask[8:24, 18:32]  # edges of the part have the spot's grey too; here there are none
    assert seen.sum() > 30
    assert (np.abs(spot[8:24, 18:32][seen] - (140 / 127.5 - 1)) < 0.3).mean() > 0.9


def test_a_mask_of_another_size_cannot_turn_with_its_image(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask.png is 30 x 20 pixels, its image 160 x 160"):
        decode_mask(tmp_path / "mask.png", part(0), size=16, fit="align")


def test_a_map_is_laid_over_the_turned_part_and_nowhere_else() -> None:
    pixels = part(200, centre=(60, 100))
    laid = place_in_square(unit(pixels), 32, "align").lay(np.ones((32, 32), np.float32), 320, 320)
    inside = np.asarray(Image.fromarray(pixels).resize((320, 320))) < 120
    assert (laid[inside] > 0.9).all()
    assert (laid == 0).mean() > 0.7
