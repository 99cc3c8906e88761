"""The estimator: scikit-learn's and PyOD's conventions, on images."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks

from raccgan import RACCGAN, Detector, InputError, detect
from tests.cli.test_commands import run
from tests.conftest import TINY

SETTINGS = {name: TINY[name] for name in TINY if name not in ("gan_steps", "encoder_steps", "control_steps")}


def tiny(**given: Any) -> RACCGAN:
    options = {"image_size": 8, "gan_steps": 4, "encoder_steps": 4, "settings": SETTINGS} | given
    return RACCGAN(**options)


def stripes(count: int, size: int = 8) -> np.ndarray:
    """Grey images that all are dark on the left and bright on the right, with noise."""
    noise = np.random.default_rng(1).integers(0, 40, (count, size, size), dtype=np.uint8)
    noise[:, :, size // 2 :] += 180
    return noise


@pytest.fixture(scope="module")
def fitted() -> RACCGAN:
    return tiny(random_state=3).fit(stripes(24))


def test_it_tells_turned_images_from_those_it_was_fitted_to() -> None:
    normal = stripes(60)
    made = tiny(gan_steps=60, encoder_steps=60).fit(normal[:50])
    turned = np.ascontiguousarray(normal[50:, :, ::-1])
    assert made.decision_function(turned).min() > made.decision_function(normal[50:]).max()
    assert made.predict(turned).tolist() == [1] * 10


def test_what_it_finds_goes_by_the_conventions(fitted: RACCGAN) -> None:
    images = stripes(24)
    scores = fitted.decision_function(images)
    assert scores.dtype == np.float64
    assert scores.shape == (24,)
    assert np.array_equal(scores, fitted.decision_scores_)
    assert np.array_equal(fitted.score_samples(images), -scores)
    assert np.array_equal(fitted.predict(images), (scores > fitted.threshold_).astype(int))
    assert np.array_equal(fitted.predict(images), fitted.labels_)
    assert fitted.fit_predict.__doc__
    assert fitted.threshold_ == fitted.detector_.threshold
    assert fitted.decision_function([]).shape == (0,)
    assert clone(fitted).get_params() == fitted.get_params()
    fitted_again = tiny(random_state=3).fit(list(images))
    assert np.array_equal(fitted_again.decision_function(images), scores)


def test_contamination_is_the_quantile_of_the_images_held_out() -> None:
    images = stripes(40)
    made = tiny(contamination=0.25, settings=SETTINGS | {"held_out": 0.5}).fit(images)
    held_out = made.detector_.stored.held_out["score"].numpy()
    assert len(held_out) == 20
    assert made.threshold_ == np.quantile(held_out, 0.75)


def test_a_folder_a_list_of_paths_and_a_stack_are_fitted_alike(tmp_path: Path) -> None:
    images = stripes(12)
    (tmp_path / "normal").mkdir()
    paths = [tmp_path / "normal" / f"{i}.png" for i in range(12)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    by_folder, by_paths = tiny().fit(tmp_path / "normal"), tiny().fit(paths)
    assert np.array_equal(by_folder.decision_function(images), by_paths.decision_function(images))
    assert np.array_equal(by_folder.decision_function(tmp_path / "normal"), by_folder.decision_scores_)
    (tmp_path / "ill").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "ill" / "a.png")
    by_class = tiny().fit(tmp_path)  # a folder a class: the normal one alone
    assert by_class.detector_.classes == ("normal",)
    assert len(by_class.decision_scores_) == 7  # 0.6 of 12: the rest is a test part


def test_it_survives_pickling_saving_and_the_commands(fitted: RACCGAN, tmp_path: Path) -> None:
    images = stripes(5)
    expected = fitted.decision_function(images)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.decision_function(images), expected)
    assert again.get_params() == fitted.get_params()
    again.threshold_ = 0.125
    again.save(tmp_path / "model")
    loaded = RACCGAN.load(tmp_path / "model")
    assert loaded.threshold_ == 0.125
    assert fitted.threshold_ != 0.125
    assert np.array_equal(loaded.decision_function(images), expected)
    assert Detector.load(tmp_path / "model").threshold == 0.125
    assert np.array_equal(clone(loaded).fit(stripes(24)).decision_function(images), expected)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    assert run(detect, tmp_path / "model", tmp_path / "a.png", "--out", tmp_path / "found") == 0


@pytest.mark.parametrize(
    ("given", "images", "words"),
    [
        ({}, stripes(1), "at least two"),
        ({}, np.zeros((3, 8, 9), np.uint8), "channels first"),
        ({"contamination": 1.5}, stripes(4), "contamination=1.5"),
        ({"settings": {"seed": 1}}, stripes(4), "settings cannot hold seed"),
        ({"settings": {"widht": 1}}, stripes(4), "no setting called 'widht'"),
        ({"preset": "large"}, stripes(4), "no preset called 'large'"),
        ({}, "/no/such/folder", "no dataset, folder"),
    ],
)
def test_what_cannot_be_fitted_is_named(given: dict[str, Any], images: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny(**given).fit(images)


def test_nothing_is_scored_before_fitting() -> None:
    for method in ("decision_function", "score_samples", "predict"):
        with pytest.raises(NotFittedError):
            getattr(RACCGAN(), method)(stripes(2))
    with pytest.raises(NotFittedError):
        RACCGAN().save("nowhere")


def test_a_place_that_cannot_be_written_is_named(fitted: RACCGAN, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is an ordinary file"):
        fitted.save(tmp_path / "file")


@pytest.mark.parametrize(
    "check",
    [
        "check_no_attributes_set_in_init", "check_get_params_invariance", "check_set_params",
        "check_parameters_default_constructible", "check_estimator_cloneable", "check_estimator_repr",
        "check_valid_tag_types", "check_mixin_order",
    ],
)  # fmt: skip
def test_scikit_learns_own_checks_that_need_no_table(check: str) -> None:
    """The others fit tables [n, features], which are no images."""
    if not hasattr(estimator_checks, check):
        pytest.skip(f"this scikit-learn has no {check}")
    getattr(estimator_checks, check)("RACCGAN", RACCGAN())
