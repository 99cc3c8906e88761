"""Where an image is anomalous: masks, boxes and the threshold of pixels, from maps and through the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import Detector, InputError, calibrate, detect, train
from raccgan.data.images.geometry import place_in_square
from raccgan.models import checkpoint as checkpoints
from raccgan.outputs.overlays import PREDICTED, boxed
from raccgan.scoring.calibration import choose_pixel_threshold
from raccgan.scoring.record import normalised
from raccgan.scoring.regions import MOST_BOXES, Box, mark
from tests.cli.test_commands import refused, run, table
from tests.conftest import TINY_OPTIONS


def test_regions_that_touch_at_corners_are_one_and_boxes_say_where() -> None:
    map = np.zeros((8, 8), np.float32)
    map[1, 2] = map[2, 3] = 0.5
    map[3, 3] = 0.75
    map[6, 5:8] = 2.0
    place = place_in_square(np.zeros((8, 8, 1)), 8, "stretch")
    found = mark(map, place, 0.4)
    assert np.array_equal(found.mask, map > 0.4)
    assert found.boxes == (Box(5, 6, 3, 1, 3, 2.0), Box(2, 1, 2, 3, 3, 0.75))
    assert mark(map, place, 2.0).boxes == ()  # at the threshold is not above it
    assert not mark(map, place, 2.0).mask.any()
    assert mark(map, place, np.nextafter(2.0, 0)).boxes == (Box(5, 6, 3, 1, 3, 2.0),)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_masks_lie_over_the_upright_original(fit: str) -> None:
    """A block of an image of 40 x 60, seen in a square of 16, comes back to within a pixel of the square."""
    image = np.zeros((40, 60, 1), np.float32)
    image[12:24, 20:35] = 1
    place = place_in_square(image, 16, fit)
    found = mark(place.take(np.moveaxis(image, 2, 0))[0], place, 0.5)
    assert found.mask.shape == (40, 60)
    [box] = found.boxes
    assert abs(box.x - 20) <= 4
    assert abs(box.y - 12) <= 4
    assert abs(box.width - 15) <= 5
    assert abs(box.height - 12) <= 5
    rows, columns = np.nonzero(found.mask)
    assert (box.x, box.y) == (columns.min(), rows.min())
    assert (box.width, box.height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
    assert box.area == found.mask.sum()


def test_noise_has_a_bounded_number_of_boxes() -> None:
    map = np.zeros((64, 64), np.float32)
    map[::2, ::2] = np.random.default_rng(0).random((32, 32)) + 1
    found = mark(map, place_in_square(np.zeros((64, 64, 1)), 64, "stretch"), 0.5)
    assert found.mask.sum() == 1024
    assert len(found.boxes) == MOST_BOXES
    assert found.boxes[0].peak == map.max()
    assert [box.peak for box in found.boxes] == sorted((box.peak for box in found.boxes), reverse=True)


def test_a_box_at_the_end_of_a_strip_is_drawn_inside_of_its_smaller_picture() -> None:
    box = {"x": 0, "y": 19900, "width": 50, "height": 50}
    drawn = boxed(np.zeros((1024, 3, 3), np.uint8), [box], (20000, 50)).any(axis=(1, 2))
    assert np.flatnonzero(drawn).tolist() == list(range(1017, 1023))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


def test_the_threshold_of_pixels_is_of_held_out_normal_maps(trained: Path, tmp_path: Path) -> None:
    stored = checkpoints.load(trained)
    peaks = stored.held_out["peak"].numpy()
    assert stored.pixel_threshold == np.quantile(peaks, 0.95)
    assert choose_pixel_threshold(stored) == stored.pixel_threshold
    assert choose_pixel_threshold(stored, quantile=0.5) == np.median(peaks)
    assert (peaks > choose_pixel_threshold(stored, sensitivity=0.1)).mean() <= 0.1
    assert choose_pixel_threshold(stored, threshold=7) == 7.0
    with pytest.raises(InputError, match="finite"):
        choose_pixel_threshold(stored, threshold=float("nan"))
    older = dataclasses.replace(stored, pixel_threshold=None)  # as raccgan wrote them before
    assert choose_pixel_threshold(older) == stored.pixel_threshold
    assert choose_pixel_threshold(dataclasses.replace(older, held_out={})) is None
    checkpoints.save(tmp_path / checkpoints.NAME, older)
    assert run(calibrate, tmp_path, "--quantile", 0.5) == 0
    assert checkpoints.load(tmp_path).pixel_threshold == np.median(peaks)
    assert run(calibrate, tmp_path, "--threshold", 1) == 0  # of images alone
    assert checkpoints.load(tmp_path).pixel_threshold == np.median(peaks)


def test_a_result_has_mask_and_boxes(trained: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 24), dtype=np.uint8)
    for result in Detector.load(trained, pixel_threshold=0.1).score(pixels):
        assert result.map is not None
        assert result.mask is not None
        assert result.boxes
        assert result.mask.shape == (16, 24)
        assert np.array_equal(result.mask, result.place.lay(result.map, 24, 16) > 0.1)
        assert not result.mask.flags.writeable
        assert sum(box.area for box in result.boxes) == result.mask.sum()
        assert result.boxes[0].peak <= result.peak.value
    [bare] = Detector.load(trained).score(pixels[:1], details=False)
    assert bare.mask is bare.boxes is None
    [calm] = Detector.load(trained, pixel_threshold=1e6).score(pixels[:1])
    assert calm.boxes == ()


def test_detect_writes_masks_and_boxes_and_draws_them(trained: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 30, 20), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{i}.png")
    options = ("--masks", "--overlays", "--report", "--pixel-threshold", 0.05)
    assert run(detect, trained, tmp_path / "in", "--out", tmp_path / "out", *options) == 0
    records = json.loads((tmp_path / "out" / "scores.json").read_text())
    detector = Detector.load(trained, pixel_threshold=0.05)
    for record, result in zip(records, detector.score([r["path"] for r in records]), strict=True):
        mask = np.asarray(Image.open(tmp_path / "out" / record["mask"]))
        assert mask.shape == (30, 20)
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(mask > 0, result.mask)
        assert result.boxes is not None
        assert [tuple(box.values())[:5] for box in record["boxes"]] == [box[:5] for box in result.boxes]
        assert record["boxes"][0]["peak"] == pytest.approx(result.boxes[0].peak, rel=1e-6)
        drawn = np.asarray(Image.open(tmp_path / "out" / record["overlay"]))
        assert (drawn == PREDICTED).all(axis=2).any()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["pixel_threshold"] == 0.05
    assert run(detect, trained, tmp_path / "in", "--out", tmp_path / "plain", "--overlays") == 0
    [plain, *_] = json.loads((tmp_path / "plain" / "scores.json").read_text())
    assert "mask" not in plain
    drawn = np.asarray(Image.open(tmp_path / "plain" / plain["overlay"]))
    assert not (drawn == PREDICTED).all(axis=2).any()


def test_masks_without_a_threshold_of_pixels_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = dataclasses.replace(checkpoints.load(trained), pixel_threshold=None, held_out={})
    checkpoints.save(tmp_path / checkpoints.NAME, stored)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    line = refused(capsys, detect, tmp_path, tmp_path / "a.png", "--masks", "--out", tmp_path / "out")
    assert "--pixel-threshold" in line
    given = ("--masks", "--pixel-threshold", 0.1, "--out", tmp_path / "out")
    assert run(detect, tmp_path, tmp_path / "a.png", *given) == 0


def test_the_normalised_score_grows_with_the_score_and_is_half_at_the_threshold(trained: Path) -> None:
    assert (normalised(0.0, 3.0), normalised(3.0, 3.0), normalised(6.0, 3.0)) == (0.0, 0.5, pytest.approx(2 / 3))
    scores = np.sort(np.random.default_rng(0).gamma(1, 2, 1000))
    found = [normalised(score, 1.5) for score in scores]
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < 1
    assert [value > 0.5 for value in found] == [score > 1.5 for score in scores]
    assert [normalised(score, 0.0) for score in (0.0, 0.1)] == [0.5, 1.0]
    assert normalised(0.0, -1.0) == 1.0
    threshold = checkpoints.load(trained).threshold
    assert threshold is not None
    for row in table(trained / "scores.csv"):
        score = float(row["score"])
        assert float(row["normalised"]) == pytest.approx(score / (score + threshold), rel=1e-6)
