"""Reads DICOM files and NIfTI volumes as grey or colour images, by pydicom and nibabel: an extra, ``raccgan[medical]``.

What a value looks like follows from the file: of DICOM the window of the header (the first of several), as a
workstation shows it, or else all values that its bits and its rescaling allow; of NIfTI the 1st to the 99th percentile
of the volume. ``MONOCHROME1`` is turned, so that bright is bright. A NIfTI volume is seen in its middle axial slice,
with the patient's right on the left. Only pixels leave this module: no name, no date, no number of a patient.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raccgan.data.samples import printable
from raccgan.errors import InputError

DICOM, NIFTI = "DICOM", "NIfTI"
_SUFFIXES = {".dcm": DICOM, ".dicom": DICOM, ".ima": DICOM, ".nii": NIFTI}
_PACKAGES = {DICOM: "pydicom", NIFTI: "nibabel"}
_DIRECTORY = "DICOMDIR"  # lists the files of a medium, and is a DICOM file itself

Values = NDArray[np.float64]


def kind_of(path: Path) -> str | None:
    """DICOM or NIfTI, by the name's ending; DICOM too where a file without one, as archives write them, begins so."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix if name.endswith(".nii.gz") else Path(name).suffix
    if suffix in _SUFFIXES or (suffix and not suffix[1:].isdigit()):
        return _SUFFIXES.get(suffix)
    if path.name == _DIRECTORY:
        return None
    try:
        if not path.is_file():  # a pipe would block for ever
            return None
        with path.open("rb") as stream:
            return DICOM if stream.read(132)[128:] == b"DICM" else None
    except OSError:
        return None


@cache
def missing(kind: str) -> str:
    """Why a kind cannot be read here; empty where it can."""
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        return f"{kind} files, which need pip install 'raccgan[medical]'"
    return ""


def read(path: Path, kind: str, most_pixels: int) -> Image.Image:
    """The image of a file: of mode F with values in [0, 1], or RGB. ``info["bits"]`` is the depth of what is stored.

    Raises:
        InputError: it cannot be shown as one image of at most so many pixels, or what reads it is not installed.
    """
    if why := missing(kind):
        raise InputError(f"{printable(path)} is one of the {why}")
    where = printable(path)
    try:
        return _dicom(path, where, most_pixels) if kind == DICOM else _nifti(path, where, most_pixels)
    except InputError:
        raise
    except Exception as error:  # both packages raise anything on damaged bytes, and may quote the header in it
        raise InputError(f"cannot read {where}: its {kind} content is damaged ({type(error).__name__})") from None


def _dicom(path: Path, where: str, most_pixels: int) -> Image.Image:
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.processing import apply_color_lut

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs pages of what is raised here in one line
    try:
        data = pydicom.dcmread(path)
    except InvalidDicomError:
        raise InputError(f"{where} is no DICOM file: it lacks the header of one") from None
    if "Rows" not in data or "PixelData" not in data:
        raise InputError(f"{where} is a DICOM file without an image: remove it")
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise InputError(f"{where} has {frames} frames: save those that matter as files of one frame each")
    if data.Rows * data.Columns > most_pixels:
        raise InputError(f"{where} has more than {most_pixels} pixels: make it smaller first")
    try:
        pixels = data.pixel_array
    except Exception:
        syntax = data.file_meta.get("TransferSyntaxUID")
        if syntax is not None and syntax.is_compressed and not get_decoder(syntax).is_available:
            raise InputError(
                f"{where} is compressed as {syntax.name}: pip install 'pylibjpeg[all]' reads that, or save it "
                "uncompressed"
            ) from None
        raise
    bits = int(data.get("BitsStored") or data.BitsAllocated)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        pixels, bits = apply_color_lut(pixels, data), int(data.RedPaletteColorLookupTableDescriptor[2])
    if pixels.ndim == 3:  # pydicom has turned YBR to RGB
        return _with_bits(Image.fromarray((pixels / (2**bits - 1) * 255).round().astype(np.uint8)), bits)
    unit = _shown(data, pixels, bits, where)
    if data.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    return _with_bits(Image.fromarray(unit.astype(np.float32)), bits)


def _shown(data: Any, pixels: NDArray[Any], bits: int, where: str) -> Values:
    """Grey values as the header wants them shown, in [0, 1] (DICOM PS3.3, C.11.1 and C.11.2)."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values = apply_modality_lut(pixels, data).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{where} has values that are not finite")
    if data.get("VOILUTSequence"):
        table = data.VOILUTSequence[0]
        return np.clip(apply_voi(values.astype(np.int64), data) / (2.0 ** int(table.LUTDescriptor[2]) - 1), 0, 1)
    if data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
        center, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        function = str(data.get("VOILUTFunction") or "LINEAR")
        if not (np.isfinite([center, width]).all() and width >= (1 if function == "LINEAR" else 1e-6)):
            raise InputError(f"{where} has a window without width in its header: correct or remove WindowWidth")
        return _windowed(values, center, width, function)
    if data.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** int(data.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        signed = bool(data.get("PixelRepresentation"))
        stored = np.array([-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1] if signed else [0.0, 2.0**bits - 1])
        ends = stored * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept") or 0)
        low, high = float(ends.min()), float(ends.max())
        if low == high:
            raise InputError(f"{where} has a RescaleSlope of 0, which makes all values one: correct or remove it")
    return np.clip((values - low) / (high - low), 0, 1)


def _windowed(values: Values, center: float, width: float, function: str) -> Values:
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / max(width, 1e-6), -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / max(width, 1e-6) + 0.5, 0, 1)


def _nifti(path: Path, where: str, most_pixels: int) -> Image.Image:
    import nibabel

    stored: Any = nibabel.load(path)
    shape = [*stored.shape[:3], *(size for size in stored.shape[3:] if size != 1)]
    if len(shape) > 3:
        raise InputError(f"{where} has {len(shape)} dimensions, {shape}: save one volume of it")
    if math.prod(shape) > most_pixels:
        raise InputError(f"{where} has more than {most_pixels} voxels: make it smaller first")
    upright = nibabel.as_closest_canonical(stored)  # axes to the right, forward, upward
    values = np.asarray(upright.get_fdata(dtype=np.float32)).reshape([*upright.shape[:3], 1, 1][:3])
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise InputError(f"{where} has no finite value")
    low, high = np.percentile(finite, (1, 99))
    if high <= low:  # few marked pixels, as a mask has them
        low, high = finite.min(), finite.max()
    values = np.nan_to_num(values, nan=float(low), posinf=float(high), neginf=float(low))
    across = values.shape.index(1) if 1 in values.shape else 2  # a volume of one layer is seen across that
    middle = np.take(values, values.shape[across] // 2, axis=across).T[::-1]
    middle = middle if across == 0 else middle[:, ::-1]  # from the side, the front is on the right
    unit = np.clip((middle - low) / max(float(high - low), 1e-12), 0, 1)
    return _with_bits(
        Image.fromarray(np.ascontiguousarray(unit, dtype=np.float32)), 8 * stored.get_data_dtype().itemsize
    )


def _with_bits(image: Image.Image, bits: int) -> Image.Image:
    image.info["bits"] = bits
    return image
