"""The report in a real browser: it shows what Python computed, follows the slider, and runs nothing but its script."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raccgan import detect, evaluate, train
from raccgan.evaluation.metrics import image_metrics
from raccgan.models.checkpoint import load
from raccgan.outputs.overlays import OUTLINE, MapScale
from raccgan.outputs.report import BLOCK, Report, Shown, strip, write_report
from raccgan.scoring.record import TITLES, ScoreRecord, decision
from tests.cli.test_commands import run, shapes, table
from tests.conftest import TINY_OPTIONS

Browser = Any  # selenium's Chrome, which is not everywhere

HOSTILE = (
    "<img src=x onerror='window.ran=1'>",
    "</script><script>window.ran=1</script>",
    "{{data}}\"&'<!--",
    "\u2028\u202e\x1b[31m\n';window.ran=1;//\\",
    "&#60;script&#62;window.ran=1&#60;/script&#62;",
    '" autofocus onfocus=window.ran=1 x="javascript:window.ran=1',
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed: pip install '.[test]'")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own needs a user who is not root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


def show(browser: Browser, page: Path) -> None:
    """Open a page; whatever it complains of in the console fails the test."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []


def text(browser: Browser, identifier: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0]).textContent", identifier))


def slide(browser: Browser, share: float) -> float:
    """Move the slider as a hand does, to a share of its length, and return the threshold that the page then names."""
    browser.execute_async_script(
        "const slider = document.getElementById('slider'), done = arguments[1];"
        "slider.value = arguments[0] * slider.max; slider.dispatchEvent(new Event('input', {bubbles: true}));"
        "requestAnimationFrame(() => requestAnimationFrame(done))",
        share,
    )
    found = re.search(r"--threshold (\S+)", text(browser, "command"))
    assert found is not None
    return float(found[1])


def shown(count: int, *, labelled: bool = False, name: Callable[[int], str] = "scans/{}.png".format) -> list[Shown]:
    draw = np.random.default_rng(0)
    pixels = draw.uniform(-1, 1, (2, 1, 8, 8)).astype(np.float32)
    picture = strip(pixels[0], pixels[1], (pixels[0] - pixels[1])[0] ** 2, MapScale())
    scores = draw.gamma(3, 0.02, count)
    return [
        Shown(
            record(name(i), float(score), "good", map_x=3, map_y=4)
            | (truth("bad" if score > 0.06 else "good", bool(score > 0.06)) if labelled else {}),
            picture,
        )
        for i, score in enumerate(scores)
    ]


def record(path: str, score: float, nearest: str, **more: int) -> dict[str, Any]:
    terms = dict.fromkeys(TITLES, 1.0) | {"residual": score, "feature": 0.0}
    values = ScoreRecord(score=score, threshold=0.06, nearest_class=nearest, map_max=1.0, **terms, **more).values()
    return {"path": path} | values


def truth(name: str, anomalous: bool) -> dict[str, str]:
    return {"class": name, "label": decision(anomalous)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on the digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS) == 0
    return out


def test_the_report_of_detect_follows_the_slider(trained: Path, tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(draw.integers(0, 256, (9, 9), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert run(detect, trained, tmp_path / "images", "--out", out, "--report") == 1
    rows = table(out / "scores.csv")
    scores = np.array([float(row["score"]) for row in rows])
    show(browser, out / "report.html")
    anomalous = sum(row["predicted"] == "anomalous" for row in rows)
    assert text(browser, "summary").startswith(f"{anomalous} of 70 images are anomalous")
    assert text(browser, "summary").endswith("1 could not be read")
    assert browser.execute_script("return document.getElementById('truth').hidden")
    held_out = load(trained).held_out["score"].numpy()
    counts = set()
    for share in (0.2, 0.6, 0.8, 0.9):
        threshold = slide(browser, share)
        flagged = int((scores > threshold).sum())
        counts.add(flagged)
        assert text(browser, "summary").startswith(f"{flagged} of 70 ")
        assert f"flags {flagged} of 70 images" in text(browser, "outcome")
        assert f"flag {int((held_out > threshold).sum())} of the {len(held_out)} held-out" in text(browser, "outcome")
        cards = "return document.querySelectorAll('.card.anomalous').length"
        assert browser.execute_script(cards) == min(flagged, 60), "of the 60 cards that are made at first"
    assert len(counts) > 1, "the slider moved over no score"
    browser.execute_script("document.getElementById('reset').click()")
    names = "return [...document.querySelectorAll('.card .name')].map((name) => name.textContent)"
    highest = [row["path"] for row in sorted(rows, key=lambda row: -float(row["score"]))]
    assert browser.execute_script(names) == highest[:60]


def test_the_report_of_evaluate_knows_the_truth(trained: Path, tmp_path: Path, browser: Browser) -> None:
    assert run(evaluate, trained, "--out", tmp_path, "--report") == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    rows = table(tmp_path / "scores.csv")
    scores = np.array([float(row["score"]) for row in rows])
    anomalous = np.array([row["label"] == "anomalous" for row in rows])
    show(browser, tmp_path / "report.html")
    assert f"area {found['image']['auroc']:.3f}" in text(browser, "roc-title")
    assert f"precision {found['image']['auprc']:.3f}" in text(browser, "pr-title")
    seen = []
    for threshold in (found["threshold"], *(slide(browser, share) for share in (0.3, 0.5, 0.7))):
        # By hand, digit for digit: a slider stops between the digits of the table.
        browser.execute_async_script(
            "const box = document.getElementById('threshold'), done = arguments[1]; box.value = arguments[0];"
            "box.dispatchEvent(new Event('change')); requestAnimationFrame(() => requestAnimationFrame(done))",
            str(threshold),
        )
        expected = image_metrics(scores, anomalous, threshold)
        counts = [int(text(browser, name)) for name in ("tp", "fp", "tn", "fn")]
        assert counts == list(asdict(expected.confusion).values())
        precision = "undefined" if expected.precision is None else f"{expected.precision:.3f}"
        assert f"precision{precision}" in text(browser, "rates")
        assert f"recall{expected.recall:.3f}" in text(browser, "rates")
        seen.append(counts)
    assert len({json.dumps(counts) for counts in seen}) > 2, "the slider changed nothing"


def test_filters_orders_and_search(tmp_path: Path, browser: Browser) -> None:
    images = shown(150, labelled=True)
    write_report(tmp_path / "r.html", Report("filters", 0.08, TITLES, images, auroc=1.0, auprc=1.0))
    show(browser, tmp_path / "r.html")

    def chosen(**values: str) -> list[str]:
        for identifier, value in values.items():
            browser.execute_script(
                "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "field.dispatchEvent(new Event(field.type === 'search' ? 'input' : 'change'))",
                identifier,
                value,
            )
        names = "return [...document.querySelectorAll('.card .name')].map((name) => name.textContent)"
        return list(browser.execute_script(names))

    records = [image.record for image in images]
    missed = [record for record in records if record["label"] == "anomalous" and record["score"] <= 0.08]
    ordered = [record["path"] for record in sorted(missed, key=lambda record: record["score"])]
    assert len(ordered) > 3
    assert chosen(show="missed", order="low") == ordered
    assert chosen(show="false-alarm") == []
    bad = {record["path"] for record in records if record["class"] == "bad"}
    assert set(chosen(show="all", **{"class": "bad"})) == bad
    assert chosen(**{"class": ""}, order="name", search="/14")[:3] == ["scans/14.png", "scans/140.png", "scans/141.png"]
    near = min(records, key=lambda record: abs(record["score"] - 0.08))
    assert chosen(order="near", search="")[0] == near["path"]


@pytest.mark.parametrize("width", [1280, 400])
def test_one_normal_class_is_not_named_on_every_image(tmp_path: Path, browser: Browser, width: int) -> None:
    one = shown(3)
    other = replace(one[2], record={**one[2].record, "nearest_class": "fine"})
    for name, images in (("one", one), ("two", [*one[:2], other])):
        write_report(tmp_path / "r.html", Report(name, 0.08, TITLES, images))
        browser.set_window_size(width, 900)
        show(browser, tmp_path / "r.html")
        cards = browser.execute_script("return document.getElementById('cards').innerText")
        filtered = browser.execute_script("return document.getElementById('class').checkVisibility()")
        assert (cards.count("nearest to"), filtered) == ((0, False) if name == "one" else (3, True))
    browser.set_window_size(1280, 900)


def test_the_keyboard_is_enough(tmp_path: Path, browser: Browser) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    images = sorted(shown(80), key=lambda image: -image.record["score"])
    write_report(tmp_path / "r.html", Report("keys", 0.08, TITLES, images))
    show(browser, tmp_path / "r.html")

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    assert text(browser, "large-name") == images[2].record["path"]
    press(Keys.ARROW_RIGHT)
    assert text(browser, "large-name") == images[3].record["path"]
    assert browser.execute_script("return document.getElementById('large').open")
    press(Keys.ESCAPE)
    assert not browser.execute_script("return document.getElementById('large').open")
    # The browser says that the dialog is closed in an event of its own, a moment later.
    focused = "return document.activeElement.dataset.index"
    WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(focused) == "3")
    press("/", "79")
    assert browser.execute_script("return document.getElementById('search').value") == "79"
    assert text(browser, "count").startswith("1 of 80")


def test_nothing_of_a_hostile_name_runs(trained: Path, tmp_path: Path, browser: Browser) -> None:
    """Names of files on a disk, and of classes; also without the policy, so that the escaping is seen alone."""
    folder = tmp_path / "<" / "script><img src=x onerror='window.ran=1'>"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8), 80).save(folder / "<img src=x onerror='window.ran=1'>.png")
    (folder / "cut.png").write_bytes(b"")
    assert run(detect, trained, tmp_path, "--out", tmp_path / "out", "--report") == 1
    pages = [tmp_path / "out" / "report.html"]
    for place, name in enumerate(HOSTILE):
        images = [
            Shown(record(name, 0.1, name) | truth(name, False), shown(1)[0].strip),
            Shown(record(name, 0.2, name) | truth("x", True), shown(1)[0].strip),
        ]
        skipped = [{"path": name, "reason": name}]
        pages.append(tmp_path / f"{place}.html")
        write_report(pages[-1], Report(name, 0.15, TITLES, images, [0.1], skipped, {name: name}, name, 1.0, 1.0))
    for page in pages:
        source = page.read_text()
        open_page = page.with_suffix(".open.html")
        open_page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy".*?>\n', "", source))
        assert open_page.stat().st_size < page.stat().st_size
        for variant in (page, open_page):
            show(browser, variant)
            browser.execute_script("document.querySelector('.card').click()")
            assert browser.execute_script("return window.ran") is None, variant
            sources = browser.execute_script("return [...document.images].map((image) => image.src.slice(0, 11))")
            assert set(sources) == {"data:image/"}
            assert len(browser.find_elements("css selector", "body script")) == 3, "data, strips, and ours"
    show(browser, pages[1])
    assert browser.title == HOSTILE[0]
    assert browser.execute_script("return document.querySelector('.card bdi').textContent") == HOSTILE[0]


def test_what_would_run_is_stopped_by_the_policy(tmp_path: Path, browser: Browser) -> None:
    """The payload of the test above works, and where it is smuggled in past the escaping the policy still holds."""
    write_report(tmp_path / "r.html", Report("policy", 0.08, TITLES, shown(2)))
    whole = (tmp_path / "r.html").read_text()
    smuggled = whole.replace("<main>", f"<main>{HOSTILE[0]}<script>window.ran=1</script>")
    assert smuggled != whole
    for name, source, ran in (
        ("with.html", smuggled, None),
        ("without.html", re.sub(r'<meta http-equiv="Content-Security-Policy".*?>\n', "", smuggled), 1),
    ):
        (tmp_path / name).write_text(source)
        browser.get((tmp_path / name).as_uri())
        assert browser.execute_script("return window.ran") == ran
    browser.get_log("browser")  # of the refusals, which are meant here


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Report("alone", 0.08, TITLES, shown(3)))
    source = (tmp_path / "r.html").read_text()
    assert re.findall(r"https?://[^\s\"'`]+", source) == ["http://www.w3.org/2000/svg"], "the name of SVG, not a place"
    assert not re.search(r"<(link|iframe|object|embed|base)\b", source)
    assert not re.search(r"""\b(src|href)=["']?(?!data:)""", source)


def test_five_thousand_images_open_with_the_first_cards_alone(tmp_path: Path, browser: Browser) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    write_report(tmp_path / "r.html", Report("many", 0.08, TITLES, shown(5000)))
    show(browser, tmp_path / "r.html")
    cards = "return document.querySelectorAll('.card').length"
    assert 60 <= browser.execute_script(cards) <= 180
    assert text(browser, "count").startswith("All 5000.")
    before = browser.execute_script(cards)
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    WebDriverWait(browser, 20).until(lambda browser: browser.execute_script(cards) > before)
    assert browser.execute_script(cards) < 1000
    blocks = (tmp_path / "r.html").read_text().count('type="text/plain"')
    assert blocks == 5000 / BLOCK


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_and_the_dark(tmp_path: Path, browser: Browser, dark: bool) -> None:
    images, skipped = shown(9, name=lambda i: f"{'n' * 120}{i}"), [{"path": "p", "reason": "r" * 300}]
    write_report(tmp_path / "r.html", Report("t" * 90, 0.08, TITLES, images, [0.1], skipped))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(browser, tmp_path / "r.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360, "it scrolls sideways"
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        paper, ink = (
            sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in browser.execute_script(style)
        )
        assert (paper < ink) == dark
        assert abs(paper - ink) > 400, "hard to read"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (64, 3), (128, 1), (256, 3)])
def test_a_strip_holds_original_reconstruction_and_map(side: int, channels: int) -> None:
    image = np.full((channels, side, side), -0.5, np.float32)
    other = np.full((channels, side, side), 0.5, np.float32)
    map = np.zeros((side, side), np.float32)
    map[: side // 2] = 9.0
    kind, _, encoded = strip(image, other, map, MapScale()).partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.format is not None
    assert kind == f"data:image/{picture.format.lower()};base64"
    tile = min(side, 128)
    assert picture.size == (3 * tile, tile)
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    centre = [pixels[tile // 4, tile * part + tile // 2] for part in (0, 1, 2)]
    assert np.abs(centre[0] - 64).max() < 6
    assert np.abs(centre[1] - 191).max() < 6
    assert centre[2][0] > centre[2][2] + 60
    assert np.abs(pixels[3 * tile // 4, tile * 2 + tile // 2] - 64).max() < 6


def test_a_mask_is_outlined_on_the_overlay_alone() -> None:
    image, map = np.full((1, 64, 64), -0.5, np.float32), np.zeros((64, 64), np.float32)
    mask = np.zeros((64, 64), bool)
    mask[8:24, 30:60] = True
    mask[60:, :4] = True
    plain, marked = (pixels_of(strip(image, image, map, MapScale(), given)) for given in (None, mask))
    inside = np.zeros_like(mask)
    inside[9:23, 31:59] = True
    inside[61:63, 1:3] = True
    changed = (plain != marked).any(axis=-1)
    assert not changed[:, :128].any()
    np.testing.assert_array_equal(changed[:, 128:], mask & ~inside)
    assert (marked[changed] == OUTLINE).all()


def test_the_report_of_evaluate_outlines_true_masks(tmp_path: Path) -> None:
    for name, count in (("train/good", 20), ("test/good", 3), ("test/hole", 3)):
        shapes(tmp_path / "data" / Path(name).parent, [Path(name).name], count, (8, 8))
    (tmp_path / "data" / "ground_truth" / "hole").mkdir(parents=True)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = 255
    for i in range(3):
        Image.fromarray(mask).save(tmp_path / "data" / "ground_truth" / "hole" / f"{i}_mask.png")
    small = ["--image-size", 8, "--multipliers", "2,1", "--dataset", tmp_path / "data"]
    assert run(train, "--out", tmp_path / "run", *TINY_OPTIONS, *small) == 0
    assert run(evaluate, tmp_path / "run", "--report") == 0
    found = re.findall(r"data:image/[^\s<]+", (tmp_path / "run" / "report.html").read_text())
    lines = [(pixels_of(uri) == OUTLINE).all(axis=-1).sum() for uri in found if "base64" in uri]
    assert sorted(lines) == [0, 0, 0, 12, 12, 12]


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
