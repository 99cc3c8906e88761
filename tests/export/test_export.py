"""Exported models: the checkpoint's scores and decisions in every runtime, and nothing written that does not agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor

from raccgan.data.images.decode import levelled
from raccgan.export import __main__ as export
from raccgan.export import graph
from raccgan.models import checkpoint as checkpoints
from raccgan.scoring.scorer import Scorer
from tests.cli.test_commands import refused, run
from tests.export.conftest import Trained, trained
from tests.kernels.compare import assert_each_close

Runner = Callable[[Tensor], list[Tensor]]

# PyTorch's own, where it loads a .pt2.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning")

NAMES = (
    "score", "nearest_class", "anomalous", "residual", "feature", "density", "texture_density", "defect_density",
    "pathology", "feature_density", "place_density", "place_peak", "contrast_4", "contrast_8", "contrast_16", "map",
    "mask",
)  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Colour, one normal class, brightness levelled."""
    return trained(tmp_path_factory.mktemp("one"), 3, "dark", "--brightness=level")


@pytest.fixture(scope="module")
def exported(several: Trained, one: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of four exports."""
    place = tmp_path_factory.mktemp("exported")
    for name, source, options in (
        ("several", several, ["--format", "onnx"]),
        ("several", several, ["--format", "torch"]),
        ("one", one, ["--input", "uint8", "--opset", "21"]),
        (
            "known",
            several,
            ["--format", "torch", "--label-policy", "middle", "--threshold", "0.25", "--pixel-threshold", "0.125"],
        ),
    ):
        assert run(export, source.run, *options, "--out", place / name) == 0
    return {name: place / name for name in ("several", "one", "known")}


def onnx_runtime(file: Path) -> Runner:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(np.asarray(o)) for o in session.run(None, {"images": images.numpy()})]


def open_vino(file: Path) -> Runner:
    # By default it computes in bfloat16 where the processor can.
    core = openvino.Core()
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: [torch.from_numpy(np.array(model(images.numpy())[name])) for name in NAMES]


def torch_export(file: Path) -> Runner:
    module = torch.export.load(file).module()
    return lambda images: list(module(images))


RUNTIMES = {
    "ONNX Runtime": (onnx_runtime, "onnx"),
    "OpenVINO": (open_vino, "onnx"),
    "torch.export": (torch_export, "pt2"),
}


def agrees(found: list[Tensor], scorer: Scorer, images: Tensor, threshold: float, pixel_threshold: float) -> Tensor:
    """All outputs of a model against the scorer's; the decisions."""
    wanted = scorer.score(images, details=True)
    score, nearest, anomalous, *terms, maps, masks = found
    assert torch.equal(masks.bool(), maps.double() > pixel_threshold)
    assert wanted.map is not None
    for ours, (name, theirs) in zip((score, *terms), ({"score": wanted.score} | wanted.terms).items(), strict=True):
        # Half of what an export is refused for; 1.4e-4 was seen, of one levelled image in 60 on an Intel Xeon. The
        # largest errors are rounded as the map's values, and a logit may be 0.
        loose = name in ("defect_density", "pathology")
        assert_each_close(ours, theirs, rtol=1e-3 if loose else 5e-4, atol=1e-4 if loose else 1e-6)
    assert_each_close(maps, wanted.map, rtol=1e-3, atol=1e-4)
    assert torch.equal(nearest, wanted.condition)
    assert torch.equal(anomalous.bool(), wanted.score > threshold)
    return anomalous.bool()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_scores_classes_and_decisions_are_the_checkpoints(
    several: Trained, exported: dict[str, Path], runtime: str
) -> None:
    """One image, five and all; both decisions and both classes occur."""
    make, suffix = RUNTIMES[runtime]
    model = make(exported["several"] / f"model.{suffix}")
    scorer = several.scorer()
    thresholds = several.threshold, several.pixel_threshold
    agrees(model(several.images[:1]), scorer, several.images[:1], *thresholds)
    agrees(model(several.images[7:12]), scorer, several.images[7:12], *thresholds)
    everything = model(several.images)
    decided = agrees(everything, scorer, several.images, *thresholds)
    assert everything[-1].any()
    assert not everything[-1].all()
    assert decided.any()
    assert not decided.all()
    assert set(everything[1].tolist()) == {0, 1}


@pytest.mark.parametrize("runtime", ["ONNX Runtime", "OpenVINO"])
def test_bytes_in_colour_levelled_and_one_class(one: Trained, exported: dict[str, Path], runtime: str) -> None:
    model = RUNTIMES[runtime][0](exported["one"] / "model.onnx")
    pixels = ((one.images + 1) * 127.5).round().to(torch.uint8)
    images = torch.from_numpy(levelled((pixels.to(torch.float32) / 255 * 2 - 1).numpy()))
    for part in (slice(0, 1), slice(3, 8), slice(None)):
        decided = agrees(model(pixels[part]), one.scorer(), images[part], one.threshold, one.pixel_threshold)
    assert decided.any()
    assert not decided.all()


def test_a_known_class_and_another_threshold(several: Trained, exported: dict[str, Path]) -> None:
    model = torch_export(exported["known"] / "model.pt2")
    agrees(model(several.images), several.scorer("middle"), several.images, 0.25, 0.125)
    assert set(model(several.images)[1].tolist()) == {1}


@pytest.mark.parametrize("runtime", ["ONNX Runtime", "OpenVINO"])
def test_an_image_that_is_not_finite_is_never_passed_as_normal(
    several: Trained, exported: dict[str, Path], runtime: str
) -> None:
    scorer, threshold = several.scorer(), several.threshold
    normal = several.images[scorer.score(several.images).score <= threshold][:3].clone()
    normal[1, 0, 5, 5] = float("nan")
    score, _, decided, *_ = RUNTIMES[runtime][0](exported["several"] / "model.onnx")(normal)
    assert decided.bool().tolist() == [False, True, False]
    assert score.isnan().tolist() == [False, True, False]


def test_the_file_says_how_to_call_it(several: Trained, exported: dict[str, Path]) -> None:
    known = json.loads((exported["known"] / "model.pt2.json").read_text())
    assert (known["threshold"], known["label_policy"], known["kappa"]) == (0.25, "middle", 1.0)
    assert known["pixel_threshold"] == 0.125
    assert "opset" not in known
    bytes_in = json.loads((exported["one"] / "model.onnx.json").read_text())
    assert bytes_in["input"]["dtype"] == "uint8"
    assert bytes_in["input"]["channels"] == "red, green, blue"
    assert bytes_in["agreement"]["equal_decisions"] == 1
    said = json.loads((exported["several"] / "model.onnx.json").read_text())
    assert said["input"]["shape"] == ["batch", 1, 16, 16]
    assert said["input"]["fit"] == "stretch"
    assert said["classes"] == ["dark", "middle"]
    assert said["threshold"] == several.threshold
    assert tuple(said["outputs"]) == NAMES
    assert said["agreement"]["on"] == "held-out and test images"
    assert said["agreement"]["equal_decisions"] == 1
    assert 0 <= said["agreement"]["max_relative_difference"] < 1e-4
    assert said["pixel_threshold"] == several.pixel_threshold
    model = onnx.load(exported["several"] / said["file"])
    assert (said["opset"], said["ir_version"]) == (18, 8) == (model.opset_import[0].version, model.ir_version)
    newer = onnx.load(exported["one"] / "model.onnx")
    assert (bytes_in["opset"], bytes_in["ir_version"]) == (21, 10) == (newer.opset_import[0].version, newer.ir_version)
    onnx.checker.check_model(model, full_check=True)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == said["input"]["shape"]
    assert {v.type.tensor_type.shape.dim[0].dim_param for v in model.graph.output} == {"batch"}
    assert sorted(path.name for path in exported["several"].iterdir()) == [
        "model.onnx", "model.onnx.json", "model.pt2", "model.pt2.json",
    ]  # fmt: skip


def test_the_torch_file_needs_no_raccgan(several: Trained, exported: dict[str, Path], tmp_path: Path) -> None:
    torch.save(several.images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "print(model(torch.load(sys.argv[2]))[0].tolist())\n"
        "assert 'raccgan' not in sys.modules"
    )
    arguments = [sys.executable, "-c", code, exported["several"] / "model.pt2", tmp_path / "images.pt"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    scores = torch.tensor(json.loads(done.stdout))
    assert_each_close(scores, several.scorer().score(several.images).score, rtol=1e-4, atol=0)


def test_nothing_is_written_where_the_model_does_not_agree(
    several: Trained,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model under one class in the place of the minimum over both."""
    other = (exported["known"] / "model.pt2").read_bytes()
    monkeypatch.setattr(graph, "export", lambda graph, form, **how: other)
    line = refused(capsys, export, several.run, "--format", "torch", "--out", tmp_path / "out")
    assert "nothing was written" in line
    assert not (tmp_path / "out").exists()


def test_without_the_data_it_is_compared_on_random_images(
    several: Trained,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = (exported["several"] / "model.pt2").read_bytes()
    monkeypatch.setattr(graph, "export", lambda graph, form, **how: made)
    data = several.run.parent / "data"
    data.rename(several.run.parent / "away")
    try:
        assert run(export, several.run, "--format", "torch", "--out", tmp_path) == 0
    finally:
        (several.run.parent / "away").rename(data)
    said = capsys.readouterr()
    assert "compared on random images: no dataset, folder or .csv file" in said.err
    assert "on 64 generated and noise images" in said.out
    assert (tmp_path / "model.pt2").read_bytes() == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format 'tflite' is not one of onnx, torch"),
        (["--input", "int8"], "--input 'int8' is not one of float32, uint8"),
        (["--threshold", "nan"], "must be a finite number"),
        (["--pixel-threshold", "nan"], "the threshold of pixels must be a finite number"),
        (["--opset", "17"], "--opset 17 cannot be written; it must be from 18 to 25"),
        (["--opset", "18", "--format", "torch"], "--opset is of --format onnx"),
        (["--label-policy", "bright"], "label policy 'bright' cannot apply"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    several: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, export, several.run, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(
    several: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused(capsys, export, several.run, "--out", tmp_path / "file")
    assert "no checkpoint at" in refused(capsys, export, tmp_path / "nothing")
    stored = checkpoints.load(several.run)
    stored.threshold = None
    checkpoints.save(tmp_path / checkpoints.NAME, stored)
    assert "has no threshold" in refused(capsys, export, tmp_path, "--out", tmp_path / "out")
    find: Any = graph.importlib.util.find_spec
    monkeypatch.setattr(
        graph.importlib.util, "find_spec", lambda name: None if name in ("onnx", "onnxruntime") else find(name)
    )
    line = refused(capsys, export, several.run, "--out", tmp_path / "out")
    assert "--format onnx needs onnx, onnxruntime: run pip install -e '.[export]'" in line
    # The torch format needs none of them: what is refused is the next thing.
    assert "no checkpoint at" in refused(capsys, export, tmp_path / "nothing", "--format", "torch")


def test_help_teaches_by_example_without_importing_torch() -> None:
    code = (
        "import sys; from raccgan.export import __main__ as export\n"
        "try: export.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'help imports torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m raccgan.export" in done.stdout.split("examples:")[1]
