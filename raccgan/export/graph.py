"""A trained run as one graph, from images to scores and decisions: the scorer's module on the ``reference`` backend.

The runtime of the graph's format compares it with the checkpoint's own scorer.
"""

from __future__ import annotations

import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raccgan.data.images.decode import FLAT, SPREAD, levelled
from raccgan.errors import InputError
from raccgan.models.checkpoint import Checkpoint, config_of, networks_of
from raccgan.scoring.record import TERMS
from raccgan.scoring.scorer import ScoreModule, Scorer

OUTPUTS = {  # without "mask" where the checkpoint holds no threshold of pixels
    "score": "[batch] float32: the anomaly score, higher is more anomalous",
    "nearest_class": "[batch] int64: the place in classes of the normal class that the score is under",
    "anomalous": "[batch] bool: true if, and only if, the score is not at most the threshold",
    **{name: f"[batch] float32: {what}" for name, what in TERMS.items()},
    "map": "[batch, size, size] float32: squared difference per pixel, mean over channels, smoothed",
    "mask": "[batch, size, size] bool: true where the map is not at most the threshold of pixels",
}

OPSETS = (18, 25)  # versions of ONNX's operators that exports were tried with; PyTorch translates for none below

INPUTS = {"float32": "[-1, 1]: pixel / 255 * 2 - 1", "uint8": "0 to 255, as decoded and resized"}

# What each format needs beside PyTorch, to be made and to be compared.
PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

TOLERANCE = 1e-3  # largest relative difference of a score that is rounding; at 8 to 32 px it came to about 1e-6

Runner = Callable[[Tensor], list[Tensor]]


class Agreement(NamedTuple):
    """An exported graph beside the scorer that it was made from."""

    images: int
    max_relative_difference: float  # of the score, over the images
    equal_decisions: float  # share of the images, 0..1


class ScoringGraph(nn.Module):
    """Images to the tensors of :data:`OUTPUTS`, in that order.

    ``conditions`` are the classes of which the lowest score counts, ``dtype`` is a name in :data:`INPUTS`. A score, or
    a pixel of the map, that is not at most its threshold is anomalous, one that is not a number too.
    """

    def __init__(
        self,
        stored: Checkpoint,
        conditions: Sequence[int],
        threshold: float,
        dtype: str,
        pixel_threshold: float | None = None,
    ) -> None:
        super().__init__()
        config = config_of(stored, kernels="reference")
        self.module = ScoreModule(networks_of(stored, config, torch.device("cpu")), conditions, config)
        self.threshold = _float32_below(threshold)
        self.pixel_threshold = None if pixel_threshold is None else _float32_below(pixel_threshold)
        self.outputs = [name for name in OUTPUTS if name != "mask" or pixel_threshold is not None]
        self.dtype = dtype
        self.level = config.brightness == "level"
        self.eval()  # before the spectral norms are worked out: in training mode each look moves their vectors
        for part in list(self.modules()):
            if parametrize.is_parametrized(part):
                parametrize.remove_parametrizations(part, "weight")
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[N, C, S, S], float32 in [-1, 1] or uint8, N at least 1."""
        x = images if self.dtype == "float32" else images.to(torch.float32) / 255 * 2 - 1
        lowest, map = self.module(_levelled(x) if self.level else x)
        score, *terms = lowest.scores
        # An image with a NaN in it is never passed as normal. Runtimes drop a NaN in a minimum or a maximum, so that it
        # does not always reach the score; and "not at most" is true of it, which "above" is not.
        finite = (x.abs() <= torch.finfo(torch.float32).max).flatten(1).all(dim=1)
        score = torch.where(finite, score, torch.nan)
        masks = () if self.pixel_threshold is None else (~(map <= self.pixel_threshold),)
        return score, lowest.condition, ~(score <= self.threshold), *terms, map, *masks


def _levelled(x: Tensor) -> Tensor:
    """:func:`raccgan.data.images.decode.levelled`, in float32."""
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    deviation = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=FLAT)
    return (centred / (SPREAD * deviation)).clamp(-1, 1)


def missing(form: str) -> list[str]:
    """The packages that a format needs and that are not installed."""
    return [name for name in PACKAGES[form] if importlib.util.find_spec(name) is None]


def export(graph: ScoringGraph, form: str, *, channels: int, size: int, opset: int | None = None) -> bytes:
    """The content of a model file: ``onnx``, or ``torch`` for torch.export's .pt2. Any batch from 1 on.

    ``opset`` is the version of ONNX's operators, None for the lowest of OPSETS. The file's IR version is the lowest
    that the opset needs, so that old runtimes read it.

    Raises:
        InputError: the packages that are installed cannot write this opset.
    """
    example = torch.zeros(2, channels, size, size, dtype=getattr(torch, graph.dtype))
    with warnings.catch_warnings(action="ignore"):  # about PyTorch's own insides
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        if form == "torch":
            stream = io.BytesIO()
            torch.export.save(program, stream)
            return stream.getvalue()
        return _onnx(program, graph.outputs, OPSETS[0] if opset is None else opset).SerializeToString()


def _onnx(program: Any, outputs: Sequence[str], opset: int) -> Any:
    import onnx

    made = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=list(outputs),
        opset_version=opset,
        external_data=False,
        verbose=False,
    )
    assert made is not None
    model = _with_named_batch(made.model_proto)
    if (version := versions(model)["opset"]) != opset:
        raise InputError(f"--opset {opset}: the installed onnx and onnxscript make opset {version} of it; give that")
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    return model


def versions(model: Any) -> dict[str, int]:
    """The opset and the IR version of an ONNX model or of its file's content: what a runtime has to know."""
    import onnx

    model = onnx.load_from_string(model) if isinstance(model, bytes) else model
    opset = next(part.version for part in model.opset_import if part.domain in ("", "ai.onnx"))
    return {"opset": opset, "ir_version": model.ir_version}


def load(content: bytes, form: str) -> Runner:
    """The exported graph in the runtime of its format, on the CPU: from images to the outputs, in their order."""
    if form == "torch":
        with warnings.catch_warnings(action="ignore"):
            module = torch.export.load(io.BytesIO(content)).module()
        return lambda images: list(module(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(np.asarray(o)) for o in session.run(None, {"images": images.numpy()})]


def agreement(
    run: Runner, scorer: Scorer, images: Tensor, threshold: float, dtype: str, *, level: bool = False
) -> Agreement:
    """Compare an exported graph with the scorer on images [N, C, S, S] in [-1, 1], the first one as a batch of its own.

    Where the graph takes bytes, both see the images rounded to bytes; where it levels, the scorer gets them levelled.
    Images of one value everywhere are left out: their variance is 0, so the norms scale up nothing but rounding, and no
    two implementations agree (nor does either with float64: 13 % off at 8 px, 10 % at 16 px).
    An InputError if no image is left, or if a score differs by more than :data:`TOLERANCE`, with the difference.
    """
    images = images[images.flatten(1).amax(dim=1) > images.flatten(1).amin(dim=1)]
    if len(images) == 0:
        raise InputError("every image to compare on is of one value everywhere, which says nothing")
    given = images
    if dtype == "uint8":
        given = ((images + 1) * 127.5).round().to(torch.uint8)
        images = given.to(torch.float32) / 255 * 2 - 1
    if level:
        images = torch.from_numpy(levelled(images.numpy()))
    ours = torch.cat([scorer.score(part).score for part in images.split(scorer.batch)]).double()
    found = [run(part)[:3] for part in (given[:1], *given[1:].split(scorer.batch)) if len(part)]
    theirs = torch.cat([score for score, _, _ in found]).double()
    decisions = torch.cat([anomalous for _, _, anomalous in found])
    difference = ((theirs - ours).abs() / ours.abs().clamp(min=1e-12)).max().item()
    if not difference <= TOLERANCE:
        raise InputError(
            f"the exported model does not agree with the checkpoint: a score differs by a relative {difference:.2g}, "
            f"and {TOLERANCE:g} is allowed; nothing was written"
        )
    return Agreement(len(images), difference, (decisions == (ours > threshold)).double().mean().item())


def _float32_below(threshold: float) -> float:
    """The largest float32 that is not above it."""
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-math.inf)))


def _with_named_batch(model: Any) -> Any:
    """The batch dimension called "batch" instead of a symbol of the exporter's."""
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"
    return model
