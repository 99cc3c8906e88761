"""Setuptools' build backend, except that it uses the PyTorch that is already installed where that one suits.

An isolated build sees none of the packages of the environment it installs into, and would download a PyTorch of its
own, gigabytes in its CUDA builds, just to compile against. The stable ABI does not mind which one it is, so: where the
target environment has a PyTorch that pyproject.toml admits, its folder goes to the end of ``sys.path`` for the build;
elsewhere PyTorch becomes a build requirement. So does nvcc, where PyTorch is a CUDA build and the machine has none.

Two installs of one checkout at the same time write the same folders, so the second waits for the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import requirements
from build_tools import locked, require_setuptools
from setuptools import build_meta

Settings = dict[str, Any] | None

require_setuptools()


def _alone(hook: Callable[..., str], *, with_torch: bool = False) -> Callable[..., str]:
    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> str:
        torch = requirements.installed("torch") if with_torch else None
        if torch and str(torch[1]) not in sys.path:
            sys.path.append(str(torch[1]))  # behind the build's own setuptools
        with locked(Path("build/install.lock")):
            return hook(*args, **kwargs)

    return run


# ---- the hooks of PEP 517 and PEP 660; those that only ask for requirements do not run setup.py -----------------


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    torch = [] if requirements.installed("torch") else [requirements.requirement("torch")]
    return [*torch, *requirements.toolkit()]


get_requires_for_build_editable = get_requires_for_build_wheel
build_sdist = _alone(build_meta.build_sdist)
build_wheel = _alone(build_meta.build_wheel, with_torch=True)
build_editable = _alone(build_meta.build_editable, with_torch=True)
prepare_metadata_for_build_wheel = _alone(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _alone(build_meta.prepare_metadata_for_build_editable)
