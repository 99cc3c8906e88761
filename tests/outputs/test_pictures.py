"""Pictures are PNGs that show what they should, for odd names, one class, one image, and nothing at all."""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from raccgan.errors import InputError
from raccgan.evaluation.metrics import roc
from raccgan.outputs.figures import (
    GREEN,
    OUTLINE,
    RED,
    Reconstruction,
    RocCurve,
    _smooth,
    loss_curves,
    reconstructions,
    roc_and_histogram,
)
from raccgan.outputs.pictures import sample_grid, write_image
from tests.kernels.compare import assert_each_close

ODD_NAMES = ["$x_1$", "a\nb", "肺", "n" * 300, ""]
HOTTEST = "#fcffa4"  # the upper end of inferno


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert 40 < pixels.shape[0] < 4000
    assert 60 < pixels.shape[1] < 4000
    assert pixels.std() > 1, "blank"
    return pixels


def count(pixels: NDArray[np.uint8], colour: str) -> int:
    """Pixels close to a colour (edges are smoothed)."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(axis=-1) <= 3).sum())


def images(count: int, channels: int, size: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (count, channels, size, size)).astype(np.float32)


def item(**changed: object) -> Reconstruction:
    original, other = images(2, 1, 8)
    row = Reconstruction(original, other, (original - other)[0] ** 2, "test/0.png", "5", 0.3, True, True)
    return dataclasses.replace(row, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_alone_is_its_own_pixels(tmp_path: Path, channels: int) -> None:
    """Of its own size, grey or colour, to the rounding of 8 bits; beyond the range it is cut off."""
    x = images(1, channels, 5)[0] * 1.2
    write_image(tmp_path / "i.png", x)
    with Image.open(tmp_path / "i.png") as written:
        assert (written.format, written.mode, written.size) == ("PNG", {1: "L", 3: "RGB"}[channels], (5, 5))
        pixels = np.atleast_3d(np.asarray(written)).transpose(2, 0, 1)
    assert_each_close(pixels, (x.clip(-1, 1) + 1) * 127.5, atol=0.501)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_shown_as_they_are(tmp_path: Path, channels: int) -> None:
    """Pixel by pixel where they need no enlarging, and smoothly enlarged but in place where they do."""
    for size in (64, 8):
        x = images(3, channels, size)
        sample_grid(tmp_path / "g.png", {"zero": x[:2], "one": x[1:]}, title="generated")
        last = read(tmp_path / "g.png")[-16 - 64 : -16, -16 - 64 : -16].astype(float)
        expected = np.broadcast_to(np.rint((x[2].transpose(1, 2, 0) + 1) * 127.5), (size, size, 3))
        means = last.reshape(size, 64 // size, size, 64 // size, 3).mean(axis=(1, 3))
        if size == 64:
            assert_each_close(means, expected, atol=1)  # halves may round either way
        else:
            assert np.corrcoef(means.ravel(), expected.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(("size", "shown"), [(8, 64), (24, 72), (32, 64), (128, 128)])
def test_samples_are_enlarged_until_a_person_can_read_them(tmp_path: Path, size: int, shown: int) -> None:
    one, two = ({"a": images(n, 1, size)} for n in (1, 2))
    sample_grid(tmp_path / "1.png", one)
    sample_grid(tmp_path / "2.png", two)
    assert read(tmp_path / "2.png").shape[1] - read(tmp_path / "1.png").shape[1] == shown + 4


def test_sample_names_never_break_the_grid(tmp_path: Path) -> None:
    sample_grid(tmp_path / "g.png", {name: images(3, 1, 8) for name in ODD_NAMES}, title="$ 肺 " * 20)
    pixels = read(tmp_path / "g.png")
    assert pixels.shape[1] < 1200, "a long name is shortened"
    assert (pixels[:, -16:] == 255).all(), "the title ends before the border"
    sample_grid(tmp_path / "g.png", {str(i): images(10, 3, 32) for i in range(20)}, title="t")
    assert read(tmp_path / "g.png").shape[0] > 20 * 64
    sample_grid(tmp_path / "g.png", {"empty": images(0, 1, 8), "one": images(1, 1, 8)})
    read(tmp_path / "g.png")


def test_images_of_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 8\)"):
        sample_grid(tmp_path / "g.png", {"a": images(1, 2, 8)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("anomalous", "predicted"), [(False, False), (False, True), (True, False), (True, True)])
def test_right_and_wrong_decisions_differ_in_colour(tmp_path: Path, anomalous: bool, predicted: bool) -> None:
    reconstructions(tmp_path / "r.png", [item(anomalous=anomalous, predicted=predicted)])
    pixels = read(tmp_path / "r.png")
    right, wrong = (count(pixels, colour) > 20 for colour in (GREEN, RED))
    assert (right, wrong) == (anomalous == predicted, anomalous != predicted)


def test_a_mask_is_outlined_also_at_the_border(tmp_path: Path) -> None:
    whole, corner, empty = np.ones((8, 8), bool), np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    corner[:3, :2] = True
    found = {}
    for name, mask in {"none": None, "empty": empty, "corner": corner, "whole": whole}.items():
        reconstructions(tmp_path / "r.png", [item(mask=mask)])
        found[name] = count(read(tmp_path / "r.png")[:, 270:], OUTLINE)  # right of the caption
    assert found["none"] == found["empty"] == 0
    assert 0 < found["corner"] < found["whole"]


def test_all_maps_share_one_scale(tmp_path: Path) -> None:
    faint, strong = item(map=np.full((8, 8), 0.1)), item(map=np.full((8, 8), 10.0))
    reconstructions(tmp_path / "one.png", [faint])
    reconstructions(tmp_path / "two.png", [faint, strong])
    alone, both = read(tmp_path / "one.png"), read(tmp_path / "two.png")
    middle = both.shape[0] // 2 - 20
    assert count(alone[: alone.shape[0] // 2], HOTTEST) > 1000
    assert count(both[:middle], HOTTEST) == 0
    assert count(both[middle:-60], HOTTEST) > 1000


def test_reconstructions_take_colour_odd_names_perfect_maps_and_no_rows(tmp_path: Path) -> None:
    x = images(2, 3, 16)
    rows = [
        item(original=x[0], reconstruction=x[1], map=np.zeros((16, 16)), name=name, label=name) for name in ODD_NAMES
    ]
    for chosen in (rows, rows[:1], []):
        reconstructions(tmp_path / "r.png", chosen)
        read(tmp_path / "r.png")


def test_losses_of_each_phase_get_their_panel(tmp_path: Path) -> None:
    points = [(step, 1 / step) for step in range(1, 200)]
    gan = {"wasserstein": points, "penalty": points, "generator": [(a, -b) for a, b in points]}
    encoder = {"image": points, "feature": points}
    widths = []
    for history in (encoder, gan, {**gan, **encoder}, {**gan, **encoder, "$odd": points}):
        loss_curves(tmp_path / "l.png", history)
        widths.append(read(tmp_path / "l.png").shape[1])
    assert widths == [484, 968, 1452, 1936]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan"), 2.0], [float("nan")], [0.0, 1e-9], [-1.0, 1e6]])
def test_losses_of_any_kind_are_drawn(tmp_path: Path, values: list[float]) -> None:
    loss_curves(tmp_path / "l.png", {"penalty": list(enumerate(values))})
    read(tmp_path / "l.png")


def test_smoothing_keeps_the_level_at_the_ends_and_gaps_stay_gaps() -> None:
    values = np.full(1000, 3.0)
    values[500] = np.nan
    smooth = _smooth(values)
    assert np.isnan(smooth[500])
    assert_each_close(np.delete(smooth, 500), 3)
    wave = np.tile([0.0, 2.0], 500)
    assert np.abs(_smooth(wave)[20:-20] - 1).max() < 0.1


def test_roc_and_histogram_with_controls(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    anomalous = np.arange(200) < 100
    scores = random.gamma(4, 0.01, 200) * (1 + anomalous)
    path = tmp_path / "h.png"
    ours = {"ours": RocCurve(*roc(scores, anomalous), 0.9)}
    roc_and_histogram(path, scores, anomalous, 0.07, ours)
    bare = read(path)
    control = {"$k$ " * 20: RocCurve(*roc(random.random(200), anomalous), 0.5)}
    roc_and_histogram(path, scores, anomalous, 0.07, ours | control)
    half = bare.shape[1] // 2
    assert (bare[:, :half] != read(path)[:, :half]).any(), "the control is drawn"
    roc_and_histogram(path, scores, anomalous, 0.02, ours)
    np.testing.assert_array_equal(bare[:, : half - 100], read(path)[:, : half - 100])
    assert (bare != read(path)).any(), "the threshold is drawn"


@pytest.mark.parametrize(
    ("scores", "anomalous", "threshold"),
    [
        ([0.1, 0.2, 0.3], [0, 0, 0], 0.25),
        ([0.1, 0.2, 0.3], [1, 1, 1], 0.25),
        ([], [], 0.25),
        ([0.2, 0.2], [0, 1], 0.2),
        ([0.0, 0.0], [0, 1], 0.0),
        ([1e-6, 5.0, 1e4], [0, 1, 1], 1e5),
        ([-1.0, 2.0], [0, 1], float("inf")),
    ],
)
def test_scores_of_any_kind_are_drawn(
    tmp_path: Path, scores: list[float], anomalous: list[int], threshold: float
) -> None:
    curves = {"ours": RocCurve(*roc(scores, anomalous), None)}
    roc_and_histogram(tmp_path / "h.png", scores, anomalous, threshold, curves)
    read(tmp_path / "h.png")


def test_the_users_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    scores, anomalous = [0.1, 0.2, 0.3, 0.15], [0, 1, 1, 0]
    curves = {"ours": RocCurve(*roc(scores, anomalous), 1.0)}
    roc_and_histogram(tmp_path / "a.png", scores, anomalous, 0.18, curves)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        roc_and_histogram(tmp_path / "b.png", scores, anomalous, 0.18, curves)
        assert dict(matplotlib.rcParams) == before
    np.testing.assert_array_equal(read(tmp_path / "a.png"), read(tmp_path / "b.png"))


def test_a_place_that_takes_no_picture_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "p.png"
    for draw in (
        lambda: sample_grid(below, {"a": images(1, 1, 8)}),
        lambda: reconstructions(below, [item()]),
        lambda: loss_curves(below, {}),
        lambda: roc_and_histogram(below, [0.1], [0], 0.2, {}),
    ):
        with pytest.raises(InputError, match="cannot write"):
            draw()
