"""Every kind of file becomes the pixels it means, or is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from raccgan.data.images.decode import count_channels, decode, decode_mask, decode_stack
from raccgan.data.images.geometry import FITS
from raccgan.data.samples import Sample
from raccgan.errors import InputError
from tests.kernels.compare import assert_each_close

RANDOM = np.random.default_rng(0)


def in_unit(decoded: np.ndarray) -> np.ndarray:
    """[-1, 1] -> [0, 1], float64."""
    return (decoded.astype(np.float64) + 1) / 2


@pytest.mark.parametrize("size", [1, 7, 32, 33])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 7), (32, 32), (64, 48, 3), (5, 11, 4), (3, 3, 2)])
def test_shape_type_and_range(shape: tuple[int, ...], size: int, channels: int, fit: str) -> None:
    decoded = decode(RANDOM.integers(0, 256, shape).astype(np.uint8), size=size, channels=channels, fit=fit)
    assert decoded.shape == (channels, size, size)
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    assert -1 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, bool])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("size", [6, 8, 21])
def test_black_and_white_are_exact(dtype: type, channels: int, depth: int, size: int) -> None:
    white = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    for value, expected in ((0, -1.0), (white, 1.0)):
        decoded = decode(np.full((8, 8, depth), value, dtype=dtype), size=size, channels=channels)
        assert (decoded == expected).all()


def test_16_bit_levels_all_survive(tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", size=256, channels=1)
    assert len(np.unique(decoded)) == 65536
    assert_each_close(in_unit(decoded[0]), levels / 65535, atol=1e-7)


def test_resizing_keeps_differences_of_one_16_bit_step() -> None:
    """A resize that went through 8 bits would make these equal."""
    low = np.full((9, 13), 30000, dtype=np.uint16)
    assert (decode(low + 1, size=32, channels=1) > decode(low, size=32, channels=1)).all()


def pgm16(pixels: np.ndarray) -> bytes:
    return b"P5 %d %d 65535\n" % pixels.shape[::-1] + pixels.astype(">u2").tobytes()


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "32-bit tif", "pgm"])
def test_16_bit_files(tmp_path: Path, kind: str) -> None:
    pixels = RANDOM.integers(0, 65536, (5, 7)).astype(np.uint16)
    pixels[0, :2] = 0, 65535
    path = tmp_path / f"a.{kind[-3:]}"
    if kind == "pgm":
        path.write_bytes(pgm16(pixels))
    else:
        stored = {"big-endian tif": ">u2", "32-bit tif": "<i4"}.get(kind, "<u2")
        Image.fromarray(pixels.astype(stored)).save(path)
    assert (
        decode(path, size=7, channels=1, fit="pad")[0, 1:6] == decode(pixels, size=7, channels=1, fit="pad")[0, 1:6]
    ).all()
    assert_each_close(in_unit(decode(path, size=7, channels=1, fit="pad")[0, 1:6]), pixels / 65535, atol=1e-7)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_past_16_bits_are_refused(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((3, 3), value, dtype=np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif has integer pixels from {value} to {value}; .* 0..65535"):
        decode(tmp_path / "a.tif", size=3, channels=1)


def test_float_files(tmp_path: Path) -> None:
    pixels = RANDOM.random((6, 6), dtype=np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(decode(tmp_path / "a.tif", size=6, channels=1)[0], pixels * 2 - 1)


@pytest.mark.parametrize("value", [-0.001, 1.001, 255, np.nan, np.inf, -np.inf])
def test_floats_without_a_defined_scale_are_refused(tmp_path: Path, value: float) -> None:
    pixels = np.full((3, 3), 0.5, dtype=np.float32)
    pixels[1, 1] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    for image in (tmp_path / "a.tif", pixels, pixels.astype(np.float64)):
        with pytest.raises(InputError, match=r"float pixels from .*; they have to lie in"):
            decode(image, size=3, channels=1)


def test_one_bit(tmp_path: Path) -> None:
    pixels = np.array([[0, 1], [1, 0]], dtype=bool)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode(tmp_path / "a.png", size=2, channels=1)[0], np.where(pixels, 1, -1))


def test_palette(tmp_path: Path) -> None:
    colours = Image.new("RGB", (2, 1))
    colours.putpixel((0, 0), (255, 0, 0))
    colours.putpixel((1, 0), (0, 0, 255))
    colours.quantize(2).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    decoded = decode(tmp_path / "a.png", size=2, channels=3)
    np.testing.assert_array_equal(decoded[:, 0].T, [[1, -1, -1], [-1, -1, 1]])


@pytest.mark.parametrize(("mode", "colour"), [("LA", (255,)), ("RGBA", (255, 255, 255))])
def test_alpha_is_composited_over_black(tmp_path: Path, mode: str, colour: tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 1), (*colour, 0))
    image.putpixel((1, 0), (*colour, 51))
    image.putpixel((2, 0), (*colour, 255))
    image.save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", size=3, channels=3)
    assert_each_close(in_unit(decoded[:, 1]), [[0, 0.2, 1]] * 3, atol=1e-7)
    np.testing.assert_array_equal(decode(np.asarray(image), size=3, channels=3), decoded)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_a_transparent_colour_is_black(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (2, 1), 255)
    image.putpixel((1, 0), 100)
    stored = image.convert(mode)
    key = stored.getpixel((0, 0))
    stored.save(tmp_path / "a.png", transparency=key)
    decoded = decode(tmp_path / "a.png", size=2, channels=1)
    assert_each_close(in_unit(decoded[0, 0]), [0, 100 / 255], atol=1e-6)


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 255, 255, 0))
    image.putpixel((2, 0), (0, 0, 0, 255))
    image.save(tmp_path / "a.tif")
    decoded = decode(tmp_path / "a.tif", size=3, channels=3)
    np.testing.assert_array_equal(decoded[:, 0].T, [[1, 1, 1], [1, -1, -1], [-1, -1, -1]])


def test_ycbcr_jpeg_is_rgb(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / "a.jpg", quality=100)
    decoded = decode(tmp_path / "a.jpg", size=16, channels=3)
    assert_each_close(in_unit(decoded[:, 8, 8]) * 255, (200, 30, 90), atol=3)


def test_grey_to_colour_and_back() -> None:
    grey = RANDOM.integers(0, 256, (9, 9)).astype(np.uint8)
    for size in (9, 5):
        colour = decode(grey, size=size, channels=3)
        assert (colour == colour[:1]).all()
        np.testing.assert_array_equal(colour[:1], decode(grey, size=size, channels=1))
        stored_as_colour = np.repeat(grey[..., None], 3, axis=2)
        assert_each_close(decode(stored_as_colour, size=size, channels=1), colour[:1], atol=1e-7)


def test_luminance() -> None:
    primaries = np.eye(3, dtype=np.uint8)[None] * 255
    assert_each_close(in_unit(decode(primaries, size=3, channels=1)[0, 0]), [0.299, 0.587, 0.114], atol=1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "16-bit tif", "lzw tif", "16-bit png", "jpg"])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    path = tmp_path / f"a.{ending[-3:]}"
    pixels = (np.arange(24).reshape(4, 6) * 10).astype(np.uint8)
    stored = Image.fromarray(pixels.astype(np.uint16) * 257 if "16" in ending else pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **({"compression": "tiff_lzw"} if "lzw" in ending else {}))
    upright = Image.fromarray(pixels)
    upright.getexif()[0x0112] = orientation
    expected = decode(np.asarray(ImageOps.exif_transpose(upright)), size=6, channels=1, fit="pad")
    assert_each_close(decode(path, size=6, channels=1, fit="pad"), expected, atol=0.15 if ending == "jpg" else 1e-6)


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode(tmp_path / name, size=4, channels=1) == -1).all()


def test_stretch_crop_and_pad_place_the_image() -> None:
    wide = np.zeros((4, 8), dtype=np.uint8)
    wide[:, 2:6] = 255
    assert (decode(wide, size=4, channels=1, fit="crop") == 1).all()
    padded = decode(np.full((4, 8), 255, dtype=np.uint8), size=8, channels=1, fit="pad")[0]
    np.testing.assert_array_equal(padded[:, 0], [-1, -1, 1, 1, 1, 1, -1, -1])
    stretched = decode(wide, size=8, channels=1)[0]
    assert (stretched == stretched[:1]).all()
    assert stretched[0, 4] == 1
    assert stretched[0, 0] == -1
    tall = np.zeros((9, 3), dtype=np.uint8)
    tall[3:6] = 255
    assert (decode(tall, size=3, channels=1, fit="crop") == 1).all()


def test_downsizing_averages() -> None:
    """Without antialiasing the stripes would alias to black or white."""
    stripes = np.tile(np.array([[0, 255]], dtype=np.uint8), (64, 32))
    inner = decode(stripes, size=8, channels=1)[0, 1:-1, 1:-1]
    assert_each_close(inner, 0, atol=0.05)


def test_a_very_long_image_needs_little_memory() -> None:
    for fit in FITS:
        assert decode(np.full((1, 50_000), 255, dtype=np.uint8), size=8, channels=1, fit=fit).max() == 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [8, 11])
@pytest.mark.parametrize("shape", [(12, 8), (8, 8, 3), (12, 8, 4)])
def test_a_stack_equals_its_images_bit_for_bit(shape: tuple[int, ...], size: int, fit: str) -> None:
    for dtype in (np.uint8, np.uint16):
        stack = RANDOM.integers(0, np.iinfo(dtype).max, (5, *shape), endpoint=True).astype(dtype)
        for channels in (1, 3):
            for brightness in ("keep", "level"):
                wanted = {"size": size, "channels": channels, "fit": fit, "brightness": brightness}
                together = decode_stack(stack, **wanted)
                np.testing.assert_array_equal(together, [decode(image, **wanted) for image in stack])


@pytest.mark.parametrize("channels", [1, 3])
def test_levelled_images_are_those_of_any_exposure(channels: int) -> None:
    image = RANDOM.uniform(0, 1, (9, 12, 3)).astype(np.float32) ** 3
    level = decode(image, size=8, channels=channels, brightness="level")
    assert level.shape == (channels, 8, 8)
    assert abs(level.mean()) < 1e-6
    assert level.std() == pytest.approx(1 / 4, rel=1e-5)
    darker = decode(0.3 * image + 0.1, size=8, channels=channels, brightness="level")
    assert_each_close(darker, level, atol=1e-5)
    kept = decode(image, size=8, channels=channels)
    assert_each_close(level, (kept - kept.mean()) / (4 * kept.std()), atol=1e-6)


def test_levelling_cuts_what_is_far_from_the_mean_and_leaves_the_noise_of_a_blank_image_small() -> None:
    spot = np.zeros((16, 16), np.uint8)
    spot[3, 5] = 255
    assert decode(spot, size=16, channels=1, brightness="level").max() == 1
    blank = np.full((16, 16), 128, np.uint8)
    assert (decode(blank, size=16, channels=1, brightness="level") == 0).all()
    noise = (32768 + RANDOM.integers(-3, 4, (16, 16))).astype(np.uint16)
    assert np.abs(decode(noise, size=16, channels=1, brightness="level")).max() < 0.02


def test_another_brightness_is_refused() -> None:
    with pytest.raises(InputError, match="no brightness called 'bright'; there are keep, level"):
        decode(np.zeros((8, 8), np.uint8), size=8, channels=1, brightness="bright")


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 64), (64, 40), (81, 33)])
@pytest.mark.parametrize("size", [16, 32, 45])
def test_masks_stay_aligned_with_their_images(tmp_path: Path, fit: str, height: int, width: int, size: int) -> None:
    marked = np.zeros((height, width), dtype=np.uint8)
    marked[height // 3 : height * 3 // 4, width // 4 : width * 2 // 3] = 255
    Image.fromarray(marked).save(tmp_path / "a.png")
    mask = decode_mask(tmp_path / "a.png", tmp_path / "a.png", size=size, fit=fit)
    assert mask.shape == (size, size)
    assert mask.dtype == bool
    image = decode(tmp_path / "a.png", size=size, channels=1, fit=fit)[0]
    # Interpolation blurs the edge by a pixel; where the image is clear the mask has to say the same.
    assert mask[image > 0.99].all()
    assert not mask[image < -0.99].any()
    assert (image > 0.99).any()
    edges = sum(np.abs(np.diff(mask.astype(int), axis=axis)).sum() for axis in (0, 1))
    assert (mask != (image > 0)).sum() <= edges


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_masks_of_any_kind(tmp_path: Path, mode: str) -> None:
    marked = np.zeros((4, 4), dtype=np.uint8)
    marked[1, 2] = 1 if mode not in ("1", "P") else 255
    image = Image.fromarray(marked.astype(np.uint16)) if mode == "I;16" else Image.fromarray(marked).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_mask(tmp_path / "a.png", tmp_path / "a.png", size=4), marked > 0)


def test_count_channels_of_arrays() -> None:
    def channels(*shapes: tuple[int, ...]) -> int:
        return count_channels([Sample("", "", "test", np.zeros(shape, dtype=np.uint8)) for shape in shapes])

    assert channels((2, 2), (2, 2, 1), (2, 2, 2)) == 1
    assert channels((2, 2), (2, 2, 3)) == 3
    assert channels() == 1


@pytest.mark.parametrize("fit", FITS)
def test_a_stack_of_no_image_is_decoded_to_none(fit: str) -> None:
    assert decode_stack(np.empty((0, 9, 7), np.uint8), size=8, channels=3, fit=fit).shape == (0, 3, 8, 8)
