"""What an install asks for. An install never exchanges a PyTorch or a Triton that can serve.

``[tool.raccgan]`` in pyproject.toml has the requirements, with the widest bounds that were tried. pip would take the
newest release within them, so where the environment has none, ``where-absent`` narrows them to what .ci/run tests.

An isolated build sees none of the packages of the environment that it installs into, so they are looked for there.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sys
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from build_tools import find_nvcc


def dependencies() -> list[str]:
    """The requirements of the package, for this environment."""
    return [_here(line) for line in _table()["dependencies"]]


def extras() -> dict[str, list[str]]:
    """The requirements of each extra, for this environment."""
    return {name: [_here(line) for line in lines] for name, lines in _table()["optional-dependencies"].items()}


def requirement(name: str) -> str:
    """The requirement of one of :func:`dependencies`."""
    return next(line for line in dependencies() if _name(line) == name)


def installed(name: str) -> tuple[str, Path] | None:
    """The version and the folder of a package of the environment built for, of one that can serve; else None."""
    from packaging.requirements import Requirement

    lines = [
        *_table()["dependencies"],
        *(line for extra in _table()["optional-dependencies"].values() for line in extra),
    ]
    admitted = Requirement(next(line for line in lines if _name(line) == name)).specifier
    for folder in _folders():
        for found in distributions(name=name, path=[str(folder)]):
            if admitted.contains(found.version, prereleases=True):
                return found.version, folder
    return None


def toolkit() -> list[str]:
    """The CUDA compiler as Python packages, where it is wanted and none is there.

    Wanted is the release of a PyTorch with CUDA 13 or later, or 13.0 where there is a GPU and no PyTorch yet. The parts
    of the compiler are held to one release: a later nvvm writes PTX that an earlier ptxas refuses.
    """
    if os.environ.get("RACCGAN_CUDA") == "0" or find_nvcc([*sys.path, *map(str, _folders())]):
        return []
    if found := installed("torch"):
        version = found[1] / "torch" / "version.py"
        cuda = re.search(r"^cuda\b.*= *['\"](\d+\.\d+)", version.read_text("utf-8"), re.MULTILINE)
        release = cuda[1] if cuda else ""
    else:
        release = "13.0" if shutil.which("nvidia-smi") else ""
    if not release or float(release) < 13:  # the packages of CUDA 12 have no nvcc
        return []
    return [f"{name}=={release}.*" for name in ("cuda-toolkit[cccl,nvcc]", "nvidia-nvvm", "nvidia-cuda-crt")]


def _table() -> dict[str, Any]:
    return tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["tool"]["raccgan"]


def _name(line: str) -> str:
    return re.split(r"[^\w.-]", line, maxsplit=1)[0]


def _here(line: str) -> str:
    """A requirement, narrower where the package is absent."""
    narrower = _table().get("where-absent", {}).get(_name(line))
    if narrower is None or installed(_name(line)):
        return line
    bounds, semicolon, marker = line.partition(";")
    return f"{bounds},{narrower}{semicolon}{marker}"


def _folders() -> list[Path]:
    """The site-packages folders of the environment built for; of more than one where it sees the system's too."""
    found = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    alone = settings.is_file() and not re.search(
        r"^include-system-site-packages *= *true", settings.read_text("utf-8"), re.MULTILINE | re.IGNORECASE
    )
    if not alone:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        found += [site.getusersitepackages(), *(sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib"))]
    return [Path(folder) for folder in dict.fromkeys(found)]
