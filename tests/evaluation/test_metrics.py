"""The metrics against literal definitions, known cases, and what must be None instead of a number."""

import warnings
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import auc

from raccgan.errors import InputError
from raccgan.evaluation.metrics import Confusion, PixelMetrics, image_metrics, pixel_metrics, roc
from raccgan.evaluation.pooled import Pooled


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scores_with_ties(seed: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    random = np.random.default_rng(seed)
    anomalous = random.random(60) < 0.4
    return np.round(random.normal(size=60) + anomalous, 1), anomalous


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_the_chance_that_an_anomaly_scores_higher(seed: int) -> None:
    scores, anomalous = scores_with_ties(seed)
    pairs = np.sign(scores[anomalous][:, None] - scores[~anomalous][None])
    assert image_metrics(scores, anomalous, 0.0).auroc == pytest.approx(((pairs + 1) / 2).mean(), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_f1_and_its_threshold_agree_with_a_literal_sweep(seed: int) -> None:
    scores, anomalous = scores_with_ties(seed)

    def f1(threshold: float) -> float:
        predicted = scores > threshold
        return 2 * (predicted & anomalous).sum() / (predicted.sum() + anomalous.sum())

    found = image_metrics(scores, anomalous, 0.0)
    assert found.f1_max == pytest.approx(max(f1(t) for t in [*scores, scores.min() - 1]), abs=1e-12)
    assert found.f1_max_threshold is not None
    assert f1(found.f1_max_threshold) == pytest.approx(found.f1_max, abs=1e-12)


def test_best_f1_threshold_lies_below_every_score_where_all_are_predicted() -> None:
    found = image_metrics([1.0, 2.0, 0.5], [True, False, True], 0.0)
    assert found.f1_max == pytest.approx(0.8)
    assert found.f1_max_threshold is not None
    assert 0.499 < found.f1_max_threshold < 0.5


def test_a_perfect_split_and_the_counts_at_the_threshold() -> None:
    found = image_metrics([0.1, 0.2, 0.9, 0.8], [0, 0, 1, 1], 0.85)
    assert (found.auroc, found.auprc, found.f1_max, found.f1_max_threshold) == (1.0, 1.0, 1.0, 0.2)
    assert found.confusion == Confusion(true_positive=1, false_positive=0, true_negative=2, false_negative=1)
    assert (found.precision, found.recall, found.balanced_accuracy) == (1.0, 0.5, 0.75)


def test_a_score_at_the_threshold_is_normal() -> None:
    found = image_metrics([0.5, 0.5], [False, True], 0.5)
    assert found.confusion == Confusion(true_positive=0, false_positive=0, true_negative=1, false_negative=1)
    assert found.precision is None
    assert found.recall == 0.0


def test_all_four_counts_stand_where_they_belong() -> None:
    found = image_metrics([1] * 2 + [0] * 3 + [1] * 4 + [0] * 5, [1] * 5 + [0] * 9, 0.5)
    assert found.confusion == Confusion(true_positive=2, false_positive=4, true_negative=5, false_negative=3)
    assert found.precision == pytest.approx(2 / 6)
    assert found.recall == pytest.approx(2 / 5)
    assert found.balanced_accuracy == pytest.approx((2 / 5 + 5 / 9) / 2)


@pytest.mark.parametrize("anomalous", [[], [True, True], [False, False]])
def test_what_one_class_alone_does_not_define_is_none(anomalous: list[bool]) -> None:
    scores = [0.2, 0.8][: len(anomalous)]
    found = image_metrics(scores, anomalous, 0.5)
    undefined = (found.auroc, found.auprc, found.f1_max, found.f1_max_threshold, found.balanced_accuracy)
    assert undefined == (None,) * 5
    assert found.recall == (0.5 if any(anomalous) else None)
    assert found.precision == (float(any(anomalous)) if anomalous else None)
    assert [curve.size for curve in roc(scores, anomalous)] == [0, 0]


def test_the_roc_runs_from_corner_to_corner_and_holds_the_auroc() -> None:
    scores, anomalous = scores_with_ties(0)
    fpr, tpr = roc(scores, anomalous)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert auc(fpr, tpr) == pytest.approx(image_metrics(scores, anomalous, 0.0).auroc)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_broken_score_is_named(number: float) -> None:
    for judge in (lambda s, y: image_metrics(s, y, 0.0), roc):
        with pytest.raises(InputError, match=f"image 1 is {number}"):
            judge([0.0, number, number], [False, True, True])
    with pytest.raises(InputError, match="image 1 "):
        pixel_metrics([[[0.0]], [[number]], [[number]]], [[[0]], [[1]], [[0]]])


def test_shapes_and_limits_are_checked() -> None:
    with pytest.raises(InputError, match="threshold"):
        image_metrics([0.0], [False], float("nan"))
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        image_metrics([0.0, 1.0], [False], 0.5)
    with pytest.raises(ValueError, match=r"\[N, H, W\]"):
        pixel_metrics(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)))
    for limit in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="max_fpr"):
            pixel_metrics(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), limit)


def regions_of(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    left = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    found = []
    while left:
        region, edge = [], [left.pop()]
        while edge:
            i, j = edge.pop()
            region.append((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        found.append(region)
    return found


def literal_aupro(maps: NDArray[np.float64], masks: NDArray[np.bool_], max_fpr: float) -> float:
    """Mean region overlap at every threshold, one after the other; trapezoids cut off at the limit."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        overlaps = [
            np.mean([found[n][pixel] for pixel in region]) for n in range(len(masks)) for region in regions_of(masks[n])
        ]
        points.append(((found & ~masks).sum() / (~masks).sum(), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= max_fpr or x1 == x0:
            continue
        end = min(x1, max_fpr)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / max_fpr


@pytest.mark.parametrize("decimals", [9, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("max_fpr", [0.3, 0.05, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_aupro_agrees_with_the_literal_definition(seed: int, max_fpr: float, decimals: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.random((3, 9, 7)) < 0.25
    masks[2] = False
    maps = np.round(random.normal(size=masks.shape) + masks, decimals)
    found = pixel_metrics(maps, masks, max_fpr)
    assert found.aupro == pytest.approx(literal_aupro(maps, masks, max_fpr), abs=1e-9)


def test_known_maps() -> None:
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2, :3] = masks[1, 4:, 4:] = True
    perfect = pixel_metrics(masks.astype(np.float32), masks)
    assert (perfect.auroc, perfect.aupro) == pytest.approx((1.0, 1.0))
    constant = pixel_metrics(np.ones(masks.shape), masks)
    assert (constant.auroc, constant.aupro) == pytest.approx((0.5, 0.15))
    inverted = pixel_metrics(~masks, masks)
    assert (inverted.auroc, inverted.aupro) == pytest.approx((0.0, 0.0))


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 0, 0] = masks[0, 5:, :] = True
    found = masks.copy()
    found[0, 0, 0] = False
    # Up to the first false positive half of the regions is found; then a straight line to (1, 1).
    assert pixel_metrics(found, masks).aupro == pytest.approx(0.5 + 0.5 * 0.3 / 2)


def test_regions_touch_at_corners_but_not_across_images() -> None:
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[1, 1, 1] = True
    found = masks.astype(float)
    found[0, 1, 1] = 0  # half of the first of two regions
    assert pixel_metrics(found, masks).aupro == pytest.approx(0.75 + 0.25 * 0.3 / 2)


@pytest.mark.parametrize("value", [False, True])
def test_pixels_of_one_kind_define_nothing(value: bool) -> None:
    assert pixel_metrics(np.random.rand(2, 3, 3), np.full((2, 3, 3), value)) == PixelMetrics(None, None)
    assert pixel_metrics(np.zeros((0, 3, 3)), np.zeros((0, 3, 3))) == PixelMetrics(None, None)


def test_f1_and_iou_at_a_threshold_and_maps_of_several_sizes() -> None:
    maps = [np.array([[0.1, 0.9], [0.6, 0.4]]), np.array([[0.7, 0.5, 0.2]])]
    masks = [np.array([[0, 1], [1, 0]]), np.array([[0, 1, 0]])]
    found = pixel_metrics(maps, masks, threshold=0.5)  # at the threshold is normal
    assert (found.f1, found.iou, found.threshold) == (2 * 2 / (3 + 3), 2 / 4, 0.5)
    scores, anomalous = (np.concatenate([np.ravel(part) for part in of]) for of in (maps, masks))
    assert found.auroc == pytest.approx(image_metrics(scores, anomalous, 0.0).auroc)
    assert pixel_metrics(maps, masks).f1 is None
    assert pixel_metrics(maps, masks, threshold=2.0).f1 == 0
    with pytest.raises(ValueError, match="2 and 1"):
        pixel_metrics(maps, masks[:1])


@pytest.mark.parametrize("most", [64, 4000])
def test_values_past_the_most_that_are_told_apart_count_as_ties(most: int) -> None:
    """Memory is bounded by ``most``, whatever the number of pixels, and the numbers stay close."""
    random = np.random.default_rng(0)
    masks = random.random((20, 32, 32)) < 0.1
    maps = (random.normal(size=masks.shape) + masks).astype(np.float32)
    exact, pooled = pixel_metrics(maps, masks), Pooled(most=most)
    for map, mask in zip(maps, masks, strict=True):
        pooled.add(map, mask)
        assert sum(len(keys) for keys, _ in pooled._waiting) <= most + map.size
        assert len(pooled._keys) <= most
    found = pooled.metrics(0.3)
    assert exact.auroc == pytest.approx(image_metrics(maps.ravel(), masks.ravel(), 0.0).auroc, abs=1e-12)
    assert found.auroc == pytest.approx(exact.auroc, abs=0.05 if most == 64 else 1e-4)
    assert found.aupro == pytest.approx(exact.aupro, abs=0.1 if most == 64 else 1e-3)
