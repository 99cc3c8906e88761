"""DICOM and NIfTI: what is bright, which files are found, what is refused, and that nothing identifying is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, generate_uid

from raccgan import check, detect, evaluate, train
from raccgan.data.images import medical
from raccgan.data.images.decode import decode, is_colour
from raccgan.data.inventory import about_images
from raccgan.data.listing import list_files
from raccgan.errors import InputError
from tests.cli.test_commands import run
from tests.conftest import TINY_OPTIONS

SECRET = "Planted"


def write(path: Path, pixels: np.ndarray, *, bits: int = 12, photometric: str = "MONOCHROME2", **tags: Any) -> Path:
    """A DICOM file with a name, a number and a date in its tags."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientName, data.PatientID, data.AccessionNumber = f"{SECRET}^Name", f"{SECRET}-ID", f"{SECRET}-A"
    data.PatientBirthDate, data.StudyDate, data.InstitutionName = "19700131", "20260102", f"{SECRET} Hospital"
    data.ReferringPhysicianName, data.StudyDescription, data.ImageComments = f"{SECRET}^Dr", SECRET, SECRET
    data.Rows, data.Columns = pixels.shape[-2:] if pixels.ndim == 2 or photometric != "RGB" else pixels.shape[:2]
    data.SamplesPerPixel = 3 if photometric == "RGB" else 1
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(data, name, value)
    compressed = data.file_meta.TransferSyntaxUID.is_compressed
    data.PixelData = encapsulate([pixels.tobytes()]) if compressed else pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def shown(path: Path, size: int = 8) -> np.ndarray:
    """In [0, 1]."""
    return (decode(path, size=size, channels=1)[0] + 1) / 2


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65  # 0 to 4095


def test_twelve_bits_in_sixteen_have_their_own_white(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    assert np.allclose(shown(path), RAMP / 4095, atol=1e-6)
    lines = about_images([path], {})
    assert lines == ["1 images: 12-bit grey, 8 x 8 pixels"], "nothing is nearly black"


def test_inverted_signed_and_rescaled(tmp_path: Path) -> None:
    turned = write(tmp_path / "m1.dcm", RAMP, photometric="MONOCHROME1")
    assert np.allclose(shown(turned), 1 - RAMP / 4095, atol=1e-6)
    signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
    path = write(tmp_path / "s.dcm", signed, RescaleSlope=2, RescaleIntercept=-24)
    assert np.allclose(shown(path), RAMP / 4095, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR", lambda x: np.clip((x - 999.5) / 399 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 1000) / 400 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 1000) / 400))),
    ],
)
def test_the_first_window_of_the_header(tmp_path: Path, function: str, expected: Any) -> None:
    path = write(
        tmp_path / "w.dcm", RAMP, WindowCenter=[1000, 50], WindowWidth=[400, 5], VOILUTFunction=function,
        RescaleSlope=1, RescaleIntercept=-100,
    )  # fmt: skip
    assert np.allclose(shown(path), expected(RAMP - 100.0), atol=1e-5)


def test_a_window_of_no_width_is_a_border(tmp_path: Path) -> None:
    path = write(tmp_path / "w.dcm", RAMP, WindowCenter=1000, WindowWidth=1)
    assert np.array_equal(shown(path), (RAMP > 999.5).astype(np.float32))


def test_a_table_of_the_header(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.add_new("LUTData", "OW", np.arange(4095, -1, -1).astype("<u2").tobytes())
    path = write(tmp_path / "t.dcm", RAMP, VOILUTSequence=[table])
    assert np.allclose(shown(path), 1 - RAMP / 4095, atol=1e-5)


def test_colour(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = write(tmp_path / "c.dcm", pixels, bits=8, photometric="RGB")
    assert is_colour(path)
    assert np.allclose(decode(path, size=8, channels=3), np.moveaxis(pixels / 255 * 2 - 1, 2, 0), atol=1e-5)


def test_files_without_an_ending_and_numbered_ones_are_found(tmp_path: Path) -> None:
    for name in ("IM0001", "1.2.840.5", "a.DCM", "DICOMDIR"):
        write(tmp_path / name, RAMP)
    (tmp_path / "README").write_text("no image")
    files = list_files(tmp_path)
    assert sorted(path.name for path in files.images) == ["1.2.840.5", "IM0001", "a.DCM"]
    assert files.left_out == {"files of other kinds": {"no ending": 2}}


def test_without_the_packages_files_are_left_out_with_the_way_to_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.dcm", RAMP)
    why = "DICOM files, which need pip install 'raccgan[medical]'"
    monkeypatch.setattr(medical, "missing", lambda kind: why)
    files = list_files(tmp_path)
    assert (files.images, files.left_out) == ([], {why: {".dcm": 1}})
    with pytest.raises(InputError, match=r"a\.dcm is one of the DICOM files, which need pip install"):
        decode(tmp_path / "a.dcm", size=8, channels=1)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda p: write(p, np.stack([RAMP, RAMP]), NumberOfFrames=2), "has 2 frames: save those that matter"),
        (lambda p: write(p, RAMP, syntax=JPEGLSLossless), "is compressed as JPEG-LS.*pylibjpeg"),
        (lambda p: write(p, RAMP, syntax=JPEG2000Lossless), "DICOM content is damaged"),
        (lambda p: _cut(write(p, RAMP)), "cannot read .*a.dcm"),
        (lambda p: p.write_bytes(b"no dicom at all"), "is no DICOM file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: write(p, RAMP, WindowCenter=1, WindowWidth=0), "a window without width"),
        (lambda p: write(p, RAMP, RescaleSlope=0, RescaleIntercept=0), "a RescaleSlope of 0"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path: Path, made: Any, words: str) -> None:
    made(tmp_path / "a.dcm")
    with pytest.raises(InputError, match=words) as caught:
        decode(tmp_path / "a.dcm", size=8, channels=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_a_volume_is_its_middle_slice_as_a_radiologist_sees_it(tmp_path: Path, name: str) -> None:
    volume = np.zeros((8, 8, 5), np.float32)
    volume[:, :, 2] = np.linspace(-100, 300, 64).reshape(8, 8)
    volume[0, 7, 2] = 300  # left of the patient, in front
    axes = np.diag([-1.0, 1, 1, 1])  # the first axis goes to the left
    nibabel.save(nibabel.Nifti1Image(volume[::-1].copy(), axes), tmp_path / name)
    found = shown(tmp_path / name)
    assert found[0, -1] == 1, "the patient's left is on the right, the front is at the top"
    assert found.min() == 0
    assert list_files(tmp_path).images == [tmp_path / name]


def test_volumes_in_time_and_broken_ones_are_refused(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.float32), np.eye(4)), tmp_path / "t.nii")
    with pytest.raises(InputError, match="has 4 dimensions"):
        decode(tmp_path / "t.nii", size=8, channels=1)
    (tmp_path / "b.nii").write_bytes(b"broken" * 100)
    with pytest.raises(InputError, match=r"cannot read .*b\.nii"):
        decode(tmp_path / "b.nii", size=8, channels=1)


def test_nothing_that_identifies_a_patient_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    for label in ("healthy", "ill"):
        for i in range(8):
            write(tmp_path / "data" / label / f"{i}.dcm", draw.integers(0, 4096, (16, 16), dtype=np.uint16))
    data, out = tmp_path / "data", tmp_path / "out"
    assert run(check, data) == 0
    options = ["--image-size", 8, "--out", out / "run"]
    assert run(train, "--dataset", data, "--normal", "healthy", *options, *TINY_OPTIONS) == 0
    assert run(detect, out / "run", data / "ill", "--out", out / "found", "--report", "--overlays", "--masks") == 0
    assert run(evaluate, out / "run", "--out", out / "judged", "--report") == 0
    said = "".join(capsys.readouterr())
    assert "16 images: 12-bit grey, 16 x 16 pixels" in said
    for found in (said, *(path.read_bytes() for path in out.rglob("*") if path.is_file())):
        for secret in (SECRET, "19700131", "20260102"):
            assert (secret.encode() if isinstance(found, bytes) else secret) not in found


def test_an_error_quotes_nothing_of_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm", RAMP)

    def quoting(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(medical, "_shown", quoting)
    with pytest.raises(InputError, match=r"cannot read .*DICOM content is damaged \(ValueError\)$"):
        decode(path, size=8, channels=1)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "IM0001")
    assert medical.kind_of(tmp_path / "IM0001") is None
    assert list_files(tmp_path).images == []


def test_a_volume_is_limited_as_a_whole(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(InputError, match="more than 511 voxels"):
        medical.read(tmp_path / "v.nii", medical.NIFTI, 511)


def test_infinite_voxels_are_black_and_white_and_one_layer_is_seen_across(tmp_path: Path) -> None:
    volume = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    volume[0, 0, 0] = -np.inf
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    found = shown(tmp_path / "v.nii")
    assert found.shape == (8, 8)
    assert len(np.unique(found)) > 50
    assert found[-1, 0] == 0, "back and below is at the lower left"
