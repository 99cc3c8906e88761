"""``python -m raccgan.detect``: scores for images that belong to no data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from raccgan import options
from raccgan.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from raccgan.config import Config
    from raccgan.scoring import Scored, Scorer

EXAMPLES = """\
  python -m raccgan.detect runs/digits new/*.png
      scores and decisions in detected/scores.csv
  python -m raccgan.detect runs/scans incoming/ --out results --threshold 0.08
      every image below incoming/, decided with another threshold
"""

HEADER = ("path", "score", "threshold", "predicted", "nearest_class", "residual", "feature")


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    device = options.pick_device(given.device)

    from raccgan import checkpoint as checkpoints
    from raccgan.files import prepare_out
    from raccgan.scoring import Scorer

    stored = checkpoints.load(given.run)
    config = checkpoints.config_of(stored, **options.settings_of(given))
    options.require_kernels(config.kernels, device)
    threshold = given.threshold if given.threshold is not None else stored.threshold
    if threshold is None:
        raise InputError(f"{given.run} has no threshold: its encoder is not trained yet; or give one with --threshold")
    paths = _files(given.images)
    out = prepare_out(given.out)
    networks = checkpoints.networks_of(stored, config, device)
    scorer = Scorer.of(config, networks, stored.classes, given.label_policy)
    rows: list[tuple[object, ...]] = []
    bad = 0
    for batch, scored, problems in _scored(paths, scorer, config, stored.channels):
        rows += _rows(batch, scored, threshold, stored.classes)
        bad += len(problems)
        for problem in problems:
            print(f"skipped: {problem}", file=sys.stderr)
    return _finish(out, rows, bad)


def _parser() -> options.Parser:
    parser = options.Parser(
        "Score images with a trained run. A file that cannot be read is named, skipped and counted.",
        EXAMPLES,
        prog="python -m raccgan.detect",
        usage="python -m raccgan.detect RUN IMAGE ... [option ...]",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its checkpoint")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--threshold", type=float, help="decide with this threshold instead of the checkpoint's")
    options.add_label_policy(parser)
    options.add_places(parser, data_root=False, out="detected")
    options.add_settings(parser, ("kernels", "score_batch"))
    return parser


def _files(given: Sequence[Path]) -> list[Path]:
    """The files named, and the images below the folders named."""
    from raccgan.data.listing import list_images

    paths: list[Path] = []
    for path in given:
        paths += list_images(path).images if path.is_dir() else (path,)
    return paths


def _scored(
    paths: Sequence[Path], scorer: Scorer, config: Config, channels: int, batch: int = 64
) -> Iterator[tuple[list[Path], Scored, list[str]]]:
    """Batches of readable files with their scores, and one line for every other file."""
    import torch

    from raccgan.progress import Progress

    read = partial(_read, size=config.image_size, channels=channels, fit=config.fit)
    with Progress("scores", len(paths), unit="image") as progress, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), batch):
            part = paths[start : start + batch]
            images = list(pool.map(read, part))
            good = [i for i, image in enumerate(images) if not isinstance(image, str)]
            stack = [torch.from_numpy(images[i]) for i in good]
            pixels = torch.stack(stack) if stack else torch.empty(0, channels, config.image_size, config.image_size)
            yield [part[i] for i in good], scorer.score(pixels), [line for line in images if isinstance(line, str)]
            progress.update(len(part))


def _read(path: Path, *, size: int, channels: int, fit: str) -> np.ndarray | str:
    """The decoded image, or the line that says why there is none."""
    from raccgan.data.images import decode

    try:
        return decode(path, size=size, channels=channels, fit=fit)
    except InputError as error:
        return str(error)


def _rows(
    paths: Sequence[Path], scored: Scored, threshold: float, classes: Sequence[str]
) -> Iterator[tuple[object, ...]]:
    from raccgan.data.samples import printable
    from raccgan.evaluation import decision

    table = zip(
        paths, scored.score.tolist(), scored.condition.tolist(), scored.residual.tolist(), scored.feature.tolist(),
        strict=True,
    )  # fmt: skip
    for path, score, condition, residual, feature in table:
        decided = decision(score > threshold)
        yield (
            printable(path), f"{score:.9g}", f"{threshold:.9g}", decided, classes[condition],
            f"{residual:.9g}", f"{feature:.9g}",
        )  # fmt: skip


def _finish(out: Path, rows: Sequence[tuple[object, ...]], bad: int) -> int:
    """Write the table; exit status 0, or 1 where files were skipped, 2 where no file could be read."""
    from raccgan.files import write_csv

    if not rows:
        raise InputError(f"none of the {bad} files could be read")
    write_csv(out / "scores.csv", HEADER, rows)
    anomalous = sum(row[HEADER.index("predicted")] == "anomalous" for row in rows)
    print(f"{anomalous} of {len(rows)} images anomalous, {bad} skipped; scores are in {out / 'scores.csv'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
