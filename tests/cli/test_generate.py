"""The command that makes images: what lies in the folder, the same again for a seed, and one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raccgan import generate, train
from raccgan.generation.folder import folder_names
from tests.cli.test_commands import refused, run, shapes
from tests.conftest import TINY_OPTIONS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on the digits whose generator is trained."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert run(train, "--out", out, *TINY_OPTIONS, "--phase", "gan") == 0
    return out


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on a user's folder of two classes in colour; the data lie in ``data`` beside it."""
    place = tmp_path_factory.mktemp("colours")
    shapes(place / "data", ["dark", "middle", "bright"], 20)
    Image.new("RGB", (9, 7), (200, 30, 30)).save(place / "data" / "dark" / "red.png")
    arguments = ["--dataset", place / "data", "--protocol", "one-vs-rest", "--normal", "dark,middle"]
    small = ["--image-size", 8, "--multipliers", "1,1", "--channels", 3]
    assert run(train, *arguments, "--out", place / "run", *TINY_OPTIONS, *small, "--phase", "gan") == 0
    return place / "run"


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_images_a_grid_and_the_distance(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert run(generate, trained, "--class", "3,0", "--count", 12, "--out", out) == 0
    names = [f"{name}/{i:04}.png" for name in "03" for i in range(12)]
    assert sorted(pixels(out)) == [*names, "grid.png"]
    for name in names:
        with Image.open(out / name) as image:
            assert (image.size, image.mode) == ((8, 8), "L")
    assert len({(out / name).read_bytes() for name in names}) == 24
    found = json.loads((out / "metrics.json").read_text())
    assert (found["against"], found["seed"], found["truncation"]) == ("digits", 0, None)
    assert set(found["kernel_distance"]) == {"0", "3"}
    for distances in found["kernel_distance"].values():
        # Six steps made no digits: nearer to noise than any real image is.
        assert distances["real"] < distances["generated"]
        assert distances["generated"] > 10 * distances["chance"]
        assert distances["noise"] > 10 * distances["chance"]
        assert distances["images"]["generated"] == distances["images"]["real_train"] > 12
    said = capsys.readouterr().out
    assert "3: kernel distance to real test images" in said
    assert "12 images of each of 3, 0" in said


def test_a_seed_gives_the_same_files_and_another_one_others(trained: Path, tmp_path: Path) -> None:
    same = ["--class", "1", "--count", 5, "--between", "1,4", "--between-latents"]
    for name, more in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--truncation", 0.3])):
        assert run(generate, trained, *same, *more, "--out", tmp_path / name) == 0
    a, b, c, d = (pixels(tmp_path / name) for name in "abcd")
    assert {"between-classes.png", "between-latents.png"} < set(a)
    assert a == b
    assert (tmp_path / "a" / "metrics.json").read_text() == (tmp_path / "b" / "metrics.json").read_text()
    assert set(a) == set(c) == set(d)
    assert all(a[name] != c[name] and a[name] != d[name] for name in a)


def test_more_images_begin_with_the_same_ones(trained: Path, tmp_path: Path) -> None:
    for count in (3, 70):
        assert run(generate, trained, "--class", "2", "--count", count, "--out", tmp_path / str(count)) == 0
    for i in range(3):
        few, many = (np.asarray(Image.open(tmp_path / n / "2" / f"{i:04}.png")).astype(int) for n in ("3", "70"))
        assert np.abs(few - many).max() <= 1, "more than the rounding of another batch"


def test_all_classes_without_a_name_and_a_pair_with_between(trained: Path, tmp_path: Path) -> None:
    assert run(generate, trained, "--count", 1, "--out", tmp_path / "all") == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir() if path.is_dir()) == list("01234")
    assert run(generate, trained, "--count", 1, "--between", "4, 2", "--out", tmp_path / "two") == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.is_dir()) == ["2", "4"]


def test_colour_and_a_folder_without_classes_to_compare_with(colours: Path, tmp_path: Path) -> None:
    data = colours.parent / "data"
    plain = ["--class", "dark", "--count", 2, "--against"]
    assert run(generate, colours, *plain, data / "dark", "--out", tmp_path / "a") == 0
    assert run(generate, colours, *plain, data / "bright", "--out", tmp_path / "b") == 0
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text())["kernel_distance"]["dark"] for name in "ab")
    assert a["images"] == {"generated": 13, "real_train": 13, "real_test": 8}
    assert a["generated"] != b["generated"], "another folder, other distances"
    assert Image.open(tmp_path / "a" / "dark" / "0000.png").mode == "RGB"


def test_without_data_there_are_images_and_a_reason(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = colours.parent / "data"
    data.rename(colours.parent / "away")
    try:
        assert run(generate, colours, "--class", "dark", "--out", tmp_path / "made") == 0
    finally:
        (colours.parent / "away").rename(data)
    said = capsys.readouterr().err
    assert f"no comparison with real images: no dataset, folder or .csv file '{data}'" in said
    assert len(list((tmp_path / "made" / "dark").iterdir())) == 16
    assert not (tmp_path / "made" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "sevn"], "the run has no normal class 'sevn'; the classes are 0, 1, 2, 3, 4"),
        (["--class", "7"], "no normal class '7'"),
        (["--count", "0"], "--count 0 is out of range: give a number of images from 1 to 10000"),
        (["--count", "-3"], "--count -3 is out of range"),
        (["--count", "100000000"], "from 1 to 10000"),
        (["--count", "many"], "invalid int value"),
        (["--truncation", "0"], "--truncation 0 is out of range: it must be at least 0.1"),
        (["--truncation", "nan"], "out of range"),
        (["--between", "1"], "must name two different normal classes"),
        (["--between", "1,1"], "must name two different normal classes"),
        (["--between", "1,9"], "no normal class '9'"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--against", "digts"], "did you mean 'digits'"),
        (["--against", "/no/such/folder"], "no dataset, folder or .csv file '/no/such/folder'"),
        (["--kernels", "fast"], "not one of reference, fused, native, triton"),
        (["--device", "abacus"], "no device called 'abacus'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "made"
    assert message in refused(capsys, generate, trained, *arguments, "--out", out)
    assert not out.exists(), "a refused run left a folder behind"


def test_a_close_name_is_suggested(colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert "did you mean 'middle'" in refused(capsys, generate, colours, "--class", "midle", "--out", out)
    digits = ["--against", "digits", "--class", "dark"]
    assert "digits has no class 'dark'" in refused(capsys, generate, colours, *digits, "--out", out)
    folder = ["--against", colours.parent / "data" / "dark"]
    assert "name the one class" in refused(capsys, generate, colours, *folder, "--out", out)
    shapes(tmp_path / "few", ["dark"], 2)
    few = ["--class", "dark", "--against", tmp_path / "few" / "dark"]
    assert "1 training and 1 test images of 'dark'" in refused(capsys, generate, colours, *few, "--out", out)


def test_a_folder_in_use_or_not_to_be_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "is not empty: name another --out" in refused(capsys, generate, trained, "--out", tmp_path)
    inside = tmp_path / "file" / "made"
    assert str(inside) in refused(capsys, generate, trained, "--out", inside)
    assert "no checkpoint at" in refused(capsys, generate, tmp_path / "nothing")


def test_no_class_name_leads_out_of_the_folder() -> None:
    odd = ["a/b", "a\\b", "..", ".", "", "A_B", "a:b", "  x ", "肺", "n" * 300]
    folders = list(folder_names(odd))
    assert len({name.casefold() for name in folders}) == len(odd)
    assert all(name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|') for name in folders)
    assert list(folder_names(["good", "ankle-boot", "3"])) == ["good", "ankle-boot", "3"]


def test_help_teaches_by_example_without_importing_torch() -> None:
    code = (
        "import sys; from raccgan import generate\n"
        "try: generate.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'help imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m raccgan.generate" in done.stdout.split("examples:")[1]
