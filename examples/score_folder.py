"""Score every image of a folder with a trained run, and list them with the most anomalous first.

python -m raccgan.train --dataset ~/scans --normal healthy --out runs/scans
python examples/score_folder.py runs/scans ~/new-scans
"""

from __future__ import annotations

import sys
from pathlib import Path

from raccgan import Detector

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def main(run: str, folder: str) -> None:
    detector = Detector.load(run)
    images = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    for result in sorted(detector.score(images, details=False), key=lambda result: result.score, reverse=True):
        mark = "anomalous" if result.anomalous else "normal"
        print(f"{result.score:10.4f}  {mark:9}  most so at {result.peak.x}, {result.peak.y}  {result.path}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
