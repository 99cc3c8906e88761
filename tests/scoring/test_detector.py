"""The library: images in any usual form give the same numbers, from any thread, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import raccgan
from raccgan import Detector, InputError, train
from raccgan.models.maps import smoothed
from raccgan.outputs.overlays import MapScale, overlay
from raccgan.scoring.detector import Result
from raccgan.scoring.reading import Skipped
from raccgan.scoring.score_files import overlay_of
from tests.cli.test_commands import run
from tests.conftest import TINY_OPTIONS
from tests.data.parts import part
from tests.kernels.compare import assert_each_close


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return Detector.load(trained, score_batch=40)  # 8 images under 5 classes


def grey(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def values(results: list[Result]) -> list[tuple[object, ...]]:
    return [(r.score, r.nearest_class, r.residual, r.feature, r.peak) for r in results]


def test_every_form_of_an_image_scores_alike(detector: Detector, tmp_path: Path) -> None:
    pixels = grey(5)
    expected = values(detector.score(pixels))
    assert len({score for score, *_ in expected}) == 5
    pictures = [Image.fromarray(image) for image in pixels]
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    tensor = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))[:, None] * 2 - 1
    forms = {
        "list of arrays": list(pixels),
        "channel axis": pixels[..., None],
        "16 bit": pixels.astype(np.uint16) * 257,
        "colour": np.repeat(pixels[..., None], 3, axis=3),
        "Pillow": pictures,
        "paths": paths,
        "names": [str(path) for path in paths],
        "generator": (path for path in paths),
        "mixed": [paths[0], pixels[1], pictures[2], tensor[3], str(paths[4])],
        "tensor": tensor,
        "list of tensors": list(tensor),
        "float array": pixels.astype(np.float32) / np.float32(255),
    }
    for name, form in forms.items():
        found = detector.score(form)
        assert_each_close([r.score for r in found], [score for score, *_ in expected], rtol=1e-5, what=name)
    for form in (pixels, paths, pictures):
        assert values(detector.score(form)) == expected


def test_levelled_images_score_alike_in_every_form_and_exposure(tmp_path: Path) -> None:
    assert run(train, "--out", tmp_path / "run", *TINY_OPTIONS, "--brightness=level") == 0
    detector = Detector.load(tmp_path / "run")
    pixels = grey(5)
    expected = [r.score for r in detector.score(pixels)]
    unit = pixels.astype(np.float32) / np.float32(255)
    for form in (torch.from_numpy(unit)[:, None] * 2 - 1, 0.25 * unit + 0.5):
        assert_each_close([r.score for r in detector.score(form)], expected, rtol=1e-3)


def test_one_image_is_a_list_of_one(detector: Detector, tmp_path: Path) -> None:
    pixels = grey(1)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    colour = np.stack([pixels] * 3, axis=-1)
    for form in (pixels, pixels[..., None], colour, tmp_path / "a.png", str(tmp_path / "a.png")):
        [result] = detector.score(form)
        assert result.score == pytest.approx(detector.score(pixels)[0].score, rel=1e-5)
    assert detector.score([]) == []


def test_parts_are_found_however_they_lie_and_maps_lie_over_them(tmp_path: Path) -> None:
    """Through the whole road: train, score and draw with parts turned at random."""
    random = np.random.default_rng(0)
    (tmp_path / "parts" / "good").mkdir(parents=True)
    for i in range(24):
        Image.fromarray(part(random.uniform(0, 360))).save(tmp_path / "parts" / "good" / f"{i}.png")
    data = ("--dataset", tmp_path / "parts", "--normal", "good", "--fit", "align")
    model = (*TINY_OPTIONS, "--image-size", 16, "--latent", 12, "--generator-tuning", 1, "--score", "defects")
    assert run(train, *data, *model, "--out", tmp_path / "run") == 0
    detector = Detector.load(tmp_path / "run")
    whole = part(20, centre=(60, 95))
    turned = np.asarray(Image.fromarray(whole).transpose(Image.Transpose.ROTATE_90))
    Image.fromarray(whole).save(tmp_path / "whole.png")
    upright, other, file = detector.score([whole, turned, tmp_path / "whole.png"])
    assert file.score == pytest.approx(upright.score, rel=1e-4)  # by its place in the batch, as above
    assert upright.image is not None
    assert other.image is not None
    assert np.abs(upright.image - other.image).mean() < 0.03  # what the model sees is the same
    drawn = np.asarray(overlay_of(file, MapScale(0, 1e-6))).astype(int)
    warm = np.ptp(drawn, axis=2) > 30
    assert warm[whole < 120].mean() > 0.95
    assert warm.mean() < 0.4
    assert warm[file.peak.y, file.peak.x]


def test_a_tensor_of_another_size_is_resized_as_an_image_is(detector: Detector) -> None:
    wide = grey(2, 12, 20)
    tensor = torch.from_numpy(wide.astype(np.float32) / np.float32(255))[:, None] * 2 - 1
    for ours, theirs in zip(detector.score(tensor), detector.score(wide), strict=True):
        assert ours.score == pytest.approx(theirs.score, rel=1e-4)
        assert (ours.place.height, ours.place.width) == (12, 20)
        assert (ours.peak.x, ours.peak.y) == (theirs.peak.x, theirs.peak.y)


def test_a_result_holds_what_it_says(detector: Detector) -> None:
    for result in detector.score(grey(20, 12, 20)):
        assert result.map is not None
        assert result.image is not None
        assert result.reconstruction is not None
        difference = ((result.image - result.reconstruction) ** 2).mean(axis=0)
        assert result.residual == pytest.approx(float(difference.mean()), rel=1e-4)
        wanted = smoothed(torch.from_numpy(difference)[None])[0]
        assert_each_close(result.map, wanted, rtol=1e-4, atol=1e-6)
        assert result.score == pytest.approx(result.residual + detector.config.kappa * result.feature, rel=1e-4)
        assert result.density > 0
        assert result.texture_density > 0
        assert result.anomalous == (result.score > detector.threshold)
        assert result.nearest_class in detector.classes
        assert result.peak.value == result.map.max()
        for array in (result.map, result.image, result.reconstruction):
            assert not array.flags.writeable
        with pytest.raises(AttributeError):
            result.score = 0.0  # type: ignore[misc]
    [bare] = detector.score(grey(1), details=False)
    assert bare.map is bare.image is bare.reconstruction is None


def test_several_threads_get_the_numbers_of_one(detector: Detector) -> None:
    pixels = grey(48)
    parts = [pixels[start : start + 12] for start in range(0, 48, 12)]
    alone = [values(detector.score(part)) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(lambda part: values(detector.score(part)), parts)) == alone


def test_what_cannot_be_scored_is_named(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = grey(1)[0]
    with pytest.raises(InputError, match=r"bad\.png is no image"):
        detector.score([good, tmp_path / "bad.png"])
    first, second, third = detector.scan([good, tmp_path / "bad.png", good])
    assert isinstance(second, Skipped)
    assert second.path == tmp_path / "bad.png"
    assert isinstance(first, Result)
    assert isinstance(third, Result)
    for form, words in (
        (np.full((8, 8), 7.0), "have to lie in"),
        (np.full((8, 8), np.nan), "have to lie in"),
        (grey(1)[0].astype(np.int64), "int64 pixels"),
        (np.zeros((1, 2, 8, 8, 3), np.uint8), "an image is H x W or"),
        (torch.zeros(8, 8), "a tensor must be"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "a tensor must be"),
        (torch.full((1, 8, 8), 2.0), r"in \[-1, 1\]"),
        (tmp_path / "none.png", "No such file"),
    ):
        with pytest.raises(InputError, match=words):
            detector.score(form)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_with_channels_first_are_refused(detector: Detector, dtype: type) -> None:
    """Each of them would be three grey images."""
    planes = (grey(3, 9, 11) / (1 if dtype == np.uint8 else 255)).astype(dtype)
    for form in (planes, planes[None], [planes], np.stack([planes] * 5)):
        with pytest.raises(InputError, match=r"channels first: an image is H x W x C"):
            detector.score(form)
        assert all(isinstance(found, Skipped) for found in detector.scan(form))
    wanted = detector.score(np.moveaxis(planes, 0, -1))
    assert len(wanted) == 1
    assert len(detector.score(list(planes))) == len(detector.score(planes[..., None])) == 3


def test_tensors_in_another_range_say_so_once_or_are_named(trained: Path) -> None:
    detector = Detector.load(trained)
    unit = torch.from_numpy(grey(4).astype(np.float32) / np.float32(255))[:, None]
    expected = [r.score for r in detector.score(unit * 2 - 1, range=(-1, 1))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r.score for r in detector.score(unit, range=(0, 1))] == pytest.approx(expected, rel=1e-5)
        assert [r.score for r in detector.score(unit * 255, range=(0, 255))] == pytest.approx(expected, rel=1e-5)
        wide = torch.from_numpy(grey(2, 12, 20).astype(np.float32))[:, None]
        assert len(detector.score(wide, range=(0, 255))) == 2
    with pytest.warns(UserWarning, match=r"give range=\(0, 1\)") as warned:
        detector.score(torch.cat([unit, unit]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.score(unit)
    assert len(warned) == 1
    for wrong in ((1, 0), (0, 0), (0, float("nan"))):
        with pytest.raises(InputError, match="black has to be a lower number"):
            detector.score(unit, range=wrong)


def test_opencvs_order_of_colours_is_turned_where_it_is_said(tmp_path: Path) -> None:
    for name, colour in (("good", 40), ("bad", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((9, 9, 3), (colour, 90, 20 + i), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    model = (*TINY_OPTIONS, "--image-size", 8, "--latent", 8, "--batch-size", 2)
    assert run(train, "--dataset", tmp_path / "data", "--out", tmp_path / "run", *model) == 0
    detector = Detector.load(tmp_path / "run")
    rgb = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    expected = [r.score for r in detector.score(rgb)]
    assert [r.score for r in detector.score(rgb[..., ::-1], bgr=True)] == expected
    assert [r.score for r in detector.score(rgb[..., ::-1])] != expected
    opaque = np.concatenate([rgb[..., ::-1], np.full((3, 8, 8, 1), 255, np.uint8)], axis=-1)
    assert [r.score for r in detector.score(opaque, bgr=True)] == expected
    tensor = torch.from_numpy(np.moveaxis(rgb, -1, 1).astype(np.float32) / 255)
    turned = detector.score(tensor.flip(1), bgr=True, range=(0, 1))
    assert [r.score for r in turned] == pytest.approx(expected, rel=1e-4)
    pictures = [Image.fromarray(image) for image in rgb]
    assert [r.score for r in detector.score(pictures, bgr=True)] == expected  # they know their own order


def test_decoding_stays_a_little_ahead_and_no_more(detector: Detector) -> None:
    """A million images are not read into memory before the first is scored."""
    asked = 0

    def endless() -> object:
        nonlocal asked
        while True:
            asked += 1
            yield np.zeros((8, 8), np.uint8)

    scan = detector.scan(endless())
    for _ in range(20):
        next(scan)
    scan.close()
    assert asked < 20 + 8 * (2 * 16 + 4)


def test_loading_chooses_the_threshold(trained: Path) -> None:
    assert Detector.load(trained, threshold=0.5).threshold == 0.5
    assert Detector.load(trained, quantile=0.2).threshold < Detector.load(trained, sensitivity=0.01).threshold
    with pytest.raises(InputError, match="exclude each other"):
        Detector.load(trained, threshold=0.5, quantile=0.9)
    with pytest.raises(InputError, match="no checkpoint at"):
        Detector.load(trained / "nothing")


def test_an_overlay_is_grey_where_the_map_is_low_and_warm_where_it_is_high() -> None:
    image = np.full((4, 4, 3), (10, 100, 190), np.uint8)
    map = np.zeros((4, 4), np.float32)
    map[0, 0], map[1, 1] = 5.0, 0.6
    drawn = overlay(image, map, MapScale(0.5, 1.0)).astype(int)
    assert (drawn[2:, 2:] == 100).all()
    assert drawn[0, 0, 0] > drawn[0, 0, 2] + 80
    assert 0 < np.ptp(drawn[1, 1]) < np.ptp(drawn[0, 0])


def test_importing_the_package_loads_nothing_until_a_name_is_asked_for() -> None:
    code = (
        "import sys, raccgan; assert 'Detector' in dir(raccgan); assert 'torch' not in sys.modules\n"
        "from raccgan import Detector; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        _ = raccgan.Detektor
