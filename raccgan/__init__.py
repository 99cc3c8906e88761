"""RA-CCGAN: residual attention class-conditional GAN for unsupervised image anomaly detection.

``raccgan --help`` lists the commands. From Python, ``Detector`` scores images with a trained run, and ``RACCGAN`` is an
estimator that trains too. Importing the package imports neither torch nor the compiled library: the names below are
loaded at their first use.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raccgan.errors import InputError
    from raccgan.estimator import RACCGAN
    from raccgan.scoring.detector import Detector, Result

try:
    import fcntl  # noqa: F401

    os.sched_getaffinity  # noqa: B018
except (ImportError, AttributeError):
    raise ImportError(
        "raccgan runs on Linux alone, and this is another system: use a Linux machine or container, or WSL 2 on Windows"
    ) from None

__version__ = "0.1.0"

__all__ = ["RACCGAN", "Detector", "InputError", "Result", "__version__"]

_HOMES = {
    "Detector": "raccgan.scoring.detector",
    "InputError": "raccgan.errors",
    "RACCGAN": "raccgan.estimator",
    "Result": "raccgan.scoring.detector",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
