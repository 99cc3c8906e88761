"""``python -m raccgan.export``: writes a trained run as an ONNX or torch.export file, after comparing it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raccgan import __version__
from raccgan.cli import options
from raccgan.errors import InputError
from raccgan.outputs.files import own_folder, write_atomically, write_json
from raccgan.outputs.terminal import say, tell

if TYPE_CHECKING:
    from torch import Tensor

    from raccgan.config import Config
    from raccgan.models.checkpoint import Checkpoint
    from raccgan.scoring.scorer import Scorer

EXAMPLES = """\
  python -m raccgan.export runs/digits
      exported/model.onnx, and model.onnx.json, which says how to call it
  python -m raccgan.export runs/digits --input uint8
      takes bytes as an image decoder gives them
  python -m raccgan.export runs/scans --format torch --threshold 0.08 --out scans
      scans/model.pt2 for torch.export.load, with another threshold
"""

FORMATS = ("onnx", "torch")
INPUTS = ("float32", "uint8")
CHECKED = 64  # images that the exported model is compared on


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    for option, choices in (("format", FORMATS), ("input", INPUTS)):
        if getattr(given, option) not in choices:
            raise InputError(f"--{option} {getattr(given, option)!r} is not one of {', '.join(choices)}")

    import torch

    from raccgan.export import graph
    from raccgan.models import checkpoint as checkpoints
    from raccgan.scoring.calibration import choose_pixel_threshold, choose_threshold
    from raccgan.scoring.scorer import Scorer

    if missing := graph.missing(given.format):
        raise InputError(f"--format {given.format} needs {', '.join(missing)}: run pip install -e '.[export]'")
    if given.opset is not None and given.format != "onnx":
        raise InputError(f"--opset is of --format onnx; --format {given.format} has none")
    first, last = graph.OPSETS
    if given.opset is not None and not first <= given.opset <= last:
        raise InputError(f"--opset {given.opset} cannot be written; it must be from {first} to {last}")
    stored = checkpoints.load(given.run)
    config = checkpoints.config_of(stored)
    options.settle_libraries()
    if config.threads:
        torch.set_num_threads(config.threads)
    threshold = choose_threshold(stored, threshold=given.threshold)
    options.note_missing_library(config.kernels)
    cpu = torch.device("cpu")
    scorer = Scorer(config, checkpoints.networks_of(stored, config, cpu), stored.classes, given.label_policy)
    pixel_threshold = choose_pixel_threshold(stored, threshold=given.pixel_threshold)
    module = graph.ScoringGraph(stored, scorer.module.conditions, threshold, given.input, pixel_threshold)
    with own_folder(given.out) as out:
        content = graph.export(
            module, given.format, channels=stored.channels, size=config.image_size, opset=given.opset
        )
        images, source = _images(config, scorer, given.data_root)
        run = graph.load(content, given.format)
        found = graph.agreement(run, scorer, images, threshold, given.input, level=module.level)
        print(
            f"on {found.images} {source}: largest relative score difference {found.max_relative_difference:.1e}, "
            f"equal decisions {found.equal_decisions:.1%}"
        )
        described = _description(stored, config, given) | {
            "outputs": {name: graph.OUTPUTS[name] for name in module.outputs},
            "threshold": threshold,
            "pixel_threshold": pixel_threshold,
            "agreement": found._asdict() | {"on": source},
            **(graph.versions(content) if given.format == "onnx" else {}),
        }
        file = out / described["file"]
        write_atomically(file, lambda stream: stream.write(content))
        write_json(file.with_name(f"{file.name}.json"), described)
        tell(f"the model is in {file}, how to call it in {file.name}.json")
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        "export",
        "Export a trained run as one graph, from a batch of images to score, nearest normal class, decision and map. "
        "It is compared with the checkpoint first; one that does not agree is not written.",
        EXAMPLES,
        "RUN",
    )
    parser.add_argument(
        "--format", default="onnx", metavar="NAME", help="onnx, or torch for torch.export's .pt2 (default: onnx)"
    )
    parser.add_argument(
        "--input",
        default="float32",
        metavar="DTYPE",
        help="what the model takes: float32 images in [-1, 1], or uint8 ones from 0 to 255 (default: float32)",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="X", help="decide with this threshold instead of the checkpoint's"
    )
    parser.add_argument(
        "--pixel-threshold", type=float, metavar="X", help="mark pixels with this threshold of the map likewise"
    )
    parser.add_argument(
        "--opset",
        type=int,
        metavar="N",
        help="version of ONNX's operators, 18 to 25, for the runtime that reads the file (default: 18, the oldest)",
    )
    options.add_label_policy(parser)
    options.add_places(parser, device=False, out="exported")
    return parser


def _images(config: Config, scorer: Scorer, data_root: Path) -> tuple[Tensor, str]:
    """Images to compare on, as decoded, and what they are: held-out and test images of the run's data, else random."""
    import torch

    from raccgan.data.samples import spread
    from raccgan.generation import sampling
    from raccgan.models.randomness import stream
    from raccgan.training.run import prepare

    half = CHECKED // 2
    try:
        run = prepare(dataclasses.replace(config, brightness="keep"), data_root, torch.device("cpu"))
        chosen = [*spread(run.split.held_out, half), *spread(run.split.test, half)]
        return run.dataset(chosen).images(range(len(chosen))), "held-out and test images"
    except InputError as error:
        say(f"compared on random images: {error}")
    z = sampling.latents(range(half), config.latent_size, seed=config.seed)
    generated = sampling.images(scorer.module.generator, z, scorer.module.conditions[0])
    noise = torch.rand(generated.shape, generator=stream(config.seed, "export")) * 2 - 1
    return torch.cat([generated, noise]), "generated and noise images"


def _description(stored: Checkpoint, config: Config, given: argparse.Namespace) -> dict[str, Any]:
    """What a program needs to know to call the model and to read its answer, but for what the export found out."""
    import torch

    from raccgan.export import graph

    return {
        "file": f"model{graph.SUFFIXES[given.format]}",
        "format": given.format,
        "input": {
            "name": "images",
            "dtype": given.input,
            "shape": ["batch", stored.channels, config.image_size, config.image_size],
            "range": graph.INPUTS[given.input],
            "channels": {1: "grey", 3: "red, green, blue"}[stored.channels],
            "fit": config.fit,
        },
        "classes": stored.classes,
        "label_policy": given.label_policy,
        "kappa": config.kappa,
        "raccgan": __version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
