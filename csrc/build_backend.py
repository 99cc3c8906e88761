"""Setuptools' build backend, except that it uses the PyTorch that is already installed where that one suits.

An isolated build sees none of the packages of the environment it installs into, and would download a PyTorch of its
own, gigabytes in its CUDA builds, just to compile against. The stable ABI does not mind which one it is, so: where the
target environment has a PyTorch that pyproject.toml admits, its folder goes to the end of ``sys.path`` for the build;
elsewhere PyTorch becomes a build requirement, in the bounds of pyproject.toml.

Two installs of one checkout at the same time write the same folders, so the second waits for the first.
"""

from __future__ import annotations

import sys
import sysconfig
import tomllib
from collections.abc import Callable
from functools import wraps
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from build_tools import locked, require_setuptools
from setuptools import build_meta

Settings = dict[str, Any] | None

require_setuptools()


def _torch_requirement() -> str:
    """PyTorch's line among the dependencies in pyproject.toml, say ``torch>=2.11,<2.14``."""
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    return next(line for line in project["dependencies"] if line.startswith("torch>"))


def _folder_of_installed_torch() -> str | None:
    """The site-packages folder of the environment built for, if there is a suitable PyTorch in it."""
    from packaging.requirements import Requirement

    admitted = Requirement(_torch_requirement()).specifier
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        for torch in distributions(name="torch", path=[folder]):
            if admitted.contains(torch.version, prereleases=True):
                return folder
    return None


def _alone(hook: Callable[..., str], *, with_torch: bool = False) -> Callable[..., str]:
    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> str:
        folder = _folder_of_installed_torch() if with_torch else None
        if folder and folder not in sys.path:
            sys.path.append(folder)  # behind the build's own setuptools
        with locked(Path("build/install.lock")):
            return hook(*args, **kwargs)

    return run


# ---- the hooks of PEP 517 and PEP 660; those that only ask for requirements do not run setup.py -----------------


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [] if _folder_of_installed_torch() else [_torch_requirement()]


get_requires_for_build_editable = get_requires_for_build_wheel
build_sdist = _alone(build_meta.build_sdist)
build_wheel = _alone(build_meta.build_wheel, with_torch=True)
build_editable = _alone(build_meta.build_editable, with_torch=True)
prepare_metadata_for_build_wheel = _alone(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _alone(build_meta.prepare_metadata_for_build_editable)
