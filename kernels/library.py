"""The compiled library: csrc/, built by setup.py into raccgan/_native.abi3.so.

Where the library is missing or does not load, nothing here raises or prints: :func:`why_not` says what is wrong in one
line, and other backends serve.

Environment:
    RACCGAN_CPU_CAPABILITY: caps the processor's instructions that the CPU kernels use: portable, avx2, avx512 or
        avx512bf16. Read once, when the library is first used. Results differ by rounding alone.
    RACCGAN_LIBRARY: another build of the library to load instead, such as one with sanitizers.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TypedDict

import torch

_PACKAGE = Path(__file__).parents[1]  # raccgan, in which this package is called kernels


class Build(TypedDict):
    """What is in the library, and what of it this processor uses."""

    cpu_targets: list[str]
    cpu_capability: str  # the one of cpu_targets in use
    cuda: str  # version of the CUDA toolkit, empty where the CUDA part was left out
    cuda_architectures: str
    why_no_cuda: str  # why it was left out, otherwise empty


def path() -> Path | None:
    """Where the library is, or ``None`` where it was not built."""
    named = os.environ.get("RACCGAN_LIBRARY")
    return Path(named) if named else _library_in(_PACKAGE)


@functools.cache
def why_not() -> str | None:
    """Load the library at the first call. ``None`` if it is loaded, else one line that says why not."""
    library = path()
    if library is None:
        return _not_built()
    try:
        torch.ops.load_library(str(library))
        torch.ops.raccgan.native_build()
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def load() -> bool:
    """Load the library if that has not been done; whether its operations can be called."""
    return why_not() is None


@functools.cache
def build() -> Build | None:
    """What is in the library, or ``None`` where it does not load."""
    if not load():
        return None
    return json.loads(torch.ops.raccgan.native_build())


def cuda() -> str:
    """The version of the CUDA toolkit that the library was built with, empty where it has no CUDA part."""
    return found["cuda"] if (found := build()) else ""


def _library_in(package: Path) -> Path | None:
    return next(iter(sorted(package.glob("_native*.so"))), None)


def _not_built() -> str:
    """A checkout that was not built may hide an installed package: Python looks into the current folder first."""
    how = 'run "pip install -e ." with PyTorch and a C++ compiler there'
    for place in map(Path, sys.path):
        installed = place / _PACKAGE.name
        if installed.resolve() != _PACKAGE.resolve() and _library_in(installed):
            return (
                f"the compiled library is not built in {_PACKAGE}, which hides the installed {installed}: start Python "
                f"in another folder, or {how}"
            )
    return f"the compiled library is not built: {how}"
