"""Decodes files and arrays to pixels in [-1, 1], and mask files to booleans, with one geometry for both.

Pixels are float32 as soon as they are read. The stored type alone says what is white: 255 for all 8-bit and palette
kinds, whose colour space becomes RGB first; 4095 for 12-bit TIFF, 65535 for 16-bit grey and 32-bit integers; 1 for
floats. Values past that, NaN and infinity are refused. Pillow reads 16-bit colour as 8-bit. Alpha is composited over
black, the first frame counts, and the EXIF orientation is applied. Grey becomes colour by repetition, colour grey by
its luminance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from raccgan.data.images.geometry import Float, Placement, covered, place_in_square
from raccgan.data.images.masks import marked
from raccgan.data.images.opening import FORMATS, kind_of, open_image, room
from raccgan.data.samples import MaskFiles, Pixels, Sample, files_of, printable
from raccgan.errors import InputError

SPREAD = 4.0  # how many deviations from its mean a levelled image reaches at -1 and 1
FLAT = 2e-3  # the least deviation that levelling divides by: noise of a blank image stays small


def decode(image: Path | Pixels, *, size: int, channels: int, fit: str = "stretch", brightness: str = "keep") -> Float:
    """Read one image, a file or pixels H x W or H x W x C (C 1 to 4), as float32 [channels, size, size] in [-1, 1].

    ``channels`` is 1 (grey) or 3 (RGB), ``fit`` one of ``geometry.FITS``. ``brightness`` is ``keep``, or ``level`` for
    mean 0 and deviation 1/``SPREAD`` in every image, black bars included, cut at -1 and 1; an image of one value
    becomes 0. A file that is no image, or values without a defined scale, are an InputError with file and reason.
    """
    return decode_placed(image, size=size, channels=channels, fit=fit, brightness=brightness).pixels


class Decoded(NamedTuple):
    """A decoded image, and where in the original, when that stands upright, it was taken from."""

    pixels: Float  # [channels, size, size] in [-1, 1]
    place: Placement


def decode_placed(
    image: Path | Pixels, *, size: int, channels: int, fit: str = "stretch", brightness: str = "keep"
) -> Decoded:
    """``decode`` that also says where in the original the square lies; the same arguments and errors."""
    with ExitStack() as held:
        unit = read_unit(image, held)
        place = place_in_square(unit, size, fit)
        return Decoded(_finish(place.take(_planes(unit))[None], channels, brightness)[0], place)


def decode_stack(images: Pixels, *, size: int, channels: int, fit: str = "stretch", brightness: str = "keep") -> Float:
    """``decode``, bit for bit, for images of one shape: [N, H, W] or [N, H, W, C] -> [N, channels, size, size]."""
    unit = _unit(images if images.ndim == 4 else images[..., None], "the array")
    if len(unit) == 0:
        return np.empty((0, channels, size, size), dtype=np.float32)
    if fit == "align":  # each has a place of its own
        placed = np.stack([place_in_square(image, size, fit).take(_planes(image)) for image in unit])
    else:
        placed = place_in_square(unit[0], size, fit).take(_planes(unit).reshape(-1, *unit.shape[1:3]))
    return _finish(placed.reshape(len(unit), -1, size, size), channels, brightness)


def read_upright(path: Path, longest: int) -> NDArray[np.uint8]:
    """The pixels of a file for the eye: uint8 H x W x 3, upright, the longer side ``longest`` at most."""
    with ExitStack() as held:
        unit = read_unit(path, held)
        unit *= 255
        pixels = np.rint(unit, out=unit).astype(np.uint8)
        original = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        shrink = min(1.0, longest / max(original.size))
        size = (max(1, round(original.width * shrink)), max(1, round(original.height * shrink)))
        shown = np.asarray(original.resize(size))
        return np.broadcast_to(shown.reshape(*shown.shape[:2], -1), (*shown.shape[:2], 3))


def decode_mask(mask: MaskFiles, image: Path | Pixels, *, size: int, fit: str = "stretch") -> NDArray[np.bool_]:
    """Read a ground-truth mask, or all of an image's: bool [size, size], True where any pixel of a cell is marked.

    :func:`raccgan.data.images.masks.marked` says which pixels are. The mask goes through the geometry of ``decode``, so
    that it stays aligned with the image that it marks: a smaller or larger mask is brought to the image's size, and one
    that was drawn on an image as its file stores it is turned upright with it. A mask of other proportions, or one of
    which nobody can tell how it lies, is an InputError.
    """
    anomalous = read_mask(mask, image)
    if fit != "align":
        return place_in_square(anomalous[..., None], size, fit).take_mask(anomalous)
    with ExitStack() as held:
        return place_in_square(read_unit(image, held), size, fit).take_mask(anomalous)


def read_mask(mask: MaskFiles, image: Path | Pixels) -> NDArray[np.bool_]:
    """The anomalous pixels of an image [H, W], upright and in the image's size; see :func:`decode_mask`."""
    lies = _lies(image)
    anomalous = np.zeros((lies.height, lies.width), dtype=bool)
    for path in files_of(mask):
        with ExitStack() as held:  # one after the other: threads that hold one file and wait for another would block
            part = marked(read_unit(path, held))
        anomalous |= _laid(part, path, image, lies)
    return anomalous


class _Lies(NamedTuple):
    """How a file stores an image: its size when it stands upright, and the EXIF orientation, 0 where it has none."""

    height: int
    width: int
    orientation: int


def _lies(image: Path | Pixels) -> _Lies:
    if not isinstance(image, Path):
        return _Lies(image.shape[0], image.shape[1], 0)
    with _opened(image) as opened:
        # Pillow would decode a whole PNG to look for what may stand at its end.
        known = opened.format != "PNG" or "exif" in opened.info
        orientation = int(opened.getexif().get(_ORIENTATION, 0)) if known else 0
        # Of a TIFF, Pillow's size is the upright one already.
        turned = orientation in _ON_ITS_SIDE and opened.format != "TIFF"
        height, width = opened.size if turned else opened.size[::-1]
        return _Lies(height, width, orientation)


def _laid(mask: NDArray[np.bool_], path: Path, image: Path | Pixels, lies: _Lies) -> NDArray[np.bool_]:
    """A mask, turned as its image is if it was drawn on the image as the file stores it, in the image's size."""
    turn = _UPRIGHT.get(lies.orientation)
    if turn is not None and mask.any() and not _lies(path).orientation:
        on_its_side = lies.orientation in _ON_ITS_SIDE
        stored = not on_its_side or _alike(mask.shape, (lies.width, lies.height))
        upright = not on_its_side or _alike(mask.shape, (lies.height, lies.width))
        if stored and not upright:
            mask = turn(mask)
        elif stored:
            assert isinstance(image, Path)  # an array has no orientation
            raise InputError(
                f"{printable(image)} is turned by its EXIF orientation {lies.orientation}, and {printable(path)} has "
                "none, so that nobody can tell whether it was drawn before or after: save both upright"
            )
    if mask.shape == (lies.height, lies.width):
        return mask
    if not _alike(mask.shape, (lies.height, lies.width)):
        raise InputError(
            f"{printable(path)} is {mask.shape[1]} x {mask.shape[0]} pixels, its image {lies.width} x {lies.height}: "
            "a mask needs the proportions of its image"
        )
    return covered(mask, (0, 0, mask.shape[1], mask.shape[0]), lies.width, lies.height)


def _alike(one: tuple[int, ...], other: tuple[int, int]) -> bool:
    """True where two sizes have the same proportions, up to the rounding of a size."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(other)


def count_channels(samples: Sequence[Sample], most: int = 200) -> int:
    """3 where any sample is in colour, else 1. Reads headers only, of at most ``most`` files spread over the samples.

    A file that cannot be opened is passed over here; ``ImageDataset.problems`` names it.
    """
    step = max(1, -(-len(samples) // most))
    return 3 if any(is_colour(sample.image) for sample in samples[::step]) else 1


def is_colour(image: Path | Pixels) -> bool:
    """True where an image has colours, by its header; False where that cannot be read."""
    if not isinstance(image, Path):
        return image.ndim == 3 and image.shape[2] >= 3
    try:
        with open_image(image) as opened:
            if opened.mode in ("P", "PA"):
                palette = np.asarray(opened.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
                return bool((palette != palette[:, :1]).any())
            return not (opened.mode in ("1", "L", "LA", "La", "F") or opened.mode.startswith("I"))
    except Exception:  # as in _read: a damaged file makes Pillow raise anything
        return False


def _planes(unit: Float) -> Float:
    """[..., H, W, C] -> [..., C, H, W], a view."""
    return np.moveaxis(unit, -1, -3)


def _finish(result: Float, channels: int, brightness: str) -> Float:
    """[N, 1 or 3, size, size] in [0, 1] -> [N, channels, size, size] in [-1, 1]."""
    if channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels, not {channels}")
    if channels < result.shape[1]:
        # In float64, so that white stays 1 and grey stored as colour comes back unchanged.
        red, green, blue = np.split(result.astype(np.float64), 3, axis=1)
        result = (0.299 * red + 0.587 * green + 0.114 * blue).astype(np.float32)
    result = result * 2 - 1
    if brightness == "level":
        result = levelled(result)
    elif brightness != "keep":
        raise InputError(f"no brightness called {brightness!r}; there are keep, level")
    return np.repeat(result, 3, axis=1) if result.shape[1] < channels else result


def levelled(images: Float) -> Float:
    """[N, C, H, W] in [-1, 1] -> mean 0 and deviation 1/``SPREAD`` over each image, cut at -1 and 1."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    deviation = np.maximum(flat.std(axis=1, keepdims=True), FLAT)
    return np.clip(flat / (SPREAD * deviation), -1, 1).astype(np.float32).reshape(images.shape)


def _unit(pixels: Pixels, what: str) -> Float:
    """[..., H, W, C] or H x W pixels of any supported type -> float32 [..., H, W, 1 or 3] in [0, 1]."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim not in (3, 4) or not 1 <= pixels.shape[-1] <= 4 or 0 in pixels.shape[-3:-1]:
        raise InputError(f"{what} has shape {pixels.shape}; an image is H x W or H x W x C with 1 to 4 channels")
    kind = pixels.dtype.kind
    if kind not in "ubf" or (kind == "u" and pixels.dtype.itemsize > 2):
        raise InputError(f"{what} has {pixels.dtype} pixels; use uint8, uint16, or float in [0, 1]")
    # The comparison is false for NaN too.
    if kind == "f" and pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise InputError(
            f"{what} has float pixels from {pixels.min():g} to {pixels.max():g}; they have to lie in [0, 1], "
            "without NaN or infinity: rescale and save again"
        )
    unit = pixels.astype(np.float32)
    if kind == "u":
        unit /= np.iinfo(pixels.dtype).max
    if unit.shape[-1] in (2, 4):
        unit, alpha = unit[..., :-1], unit[..., -1:]
        unit *= alpha
    return unit


def read_unit(image: Path | Pixels, held: ExitStack) -> Float:
    """The pixels of :func:`_unit`; ``held`` keeps the room that a file takes, until its pixels are needed no more."""
    if not isinstance(image, Path):
        return _unit(image, "the array")
    with _opened(image) as opened:
        held.enter_context(room(opened.width * opened.height))
        pixels = pixels_of(opened, printable(image))
    return _unit(pixels, printable(image))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """:func:`open_image`, where everything that is raised is an InputError with the file and the reason."""
    try:
        with open_image(path) as opened:
            yield opened
    except InputError:
        raise
    except UnidentifiedImageError:
        if kind := kind_of(path):
            raise InputError(f"{printable(path)} is {kind}, which is not read here: convert it to PNG") from None
        raise InputError(f"{printable(path)} is no image of a kind that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise anything, from OSError to struct.error
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise InputError(f"cannot read {printable(path)}: {reason}") from None


def pixels_of(opened: Image.Image, what: str = "the image") -> Pixels:
    """The pixels of a Pillow image, upright: H x W or H x W x C, as uint8, uint16, bool or float.

    Integer pixels past 65535 are an InputError; damaged bytes behind a lazily loaded image raise what Pillow raises.
    """
    opened.load()
    turn = _UPRIGHT.get(opened.getexif().get(_ORIENTATION, 1))
    mode = opened.mode
    if opened.has_transparency_data and mode[:1] not in "IF":
        wanted = "LA" if mode in ("L", "LA") else "RGBA"
    else:
        wanted = mode if mode in ("1", "L", "RGB", "F") or mode[:1] == "I" else "RGB"
    pixels = np.asarray(opened if mode == wanted else opened.convert(wanted))
    if mode == "I" and (pixels.min() < 0 or pixels.max() > 65535):
        raise InputError(
            f"{what} has integer pixels from {pixels.min()} to {pixels.max()}; they have to lie in 0..65535: "
            "save it as 16-bit, or as float in [0, 1]"
        )
    if mode[:1] == "I":
        pixels = pixels.astype(np.uint16)  # native byte order
    if opened.format == "TIFF":
        pixels = _as_the_tiff_means(opened, pixels, what)
    return turn(pixels) if turn else pixels


def _as_the_tiff_means(opened: Image.Image, pixels: Pixels, what: str) -> Pixels:
    """The pixels of a TIFF with what Pillow leaves undone: 12 bits, and black for white in more than 8 bits."""
    tags: Mapping[int, Any] = opened.tag_v2  # type: ignore[attr-defined]
    bits, signed, white_is_zero = tags.get(258, (1,)), 2 in tags.get(339, (1,)), tags.get(262) == 0
    if signed and bits[0] <= 8:
        raise InputError(f"{what} has signed 8-bit pixels, which have no defined white: save it as unsigned")
    if bits[0] == 12 and pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32) / 4095
    if white_is_zero and opened.mode[:1] in "IF":
        return (1 if pixels.dtype.kind == "f" else np.uint16(65535)) - pixels
    return pixels


_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)

# How to turn each EXIF orientation upright. On arrays, because Pillow does not turn every 16-bit mode.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
