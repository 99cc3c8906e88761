"""Keeps what qualification found, in a file for each device, driver, PyTorch, Triton and build of the kernels."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

import torch

from raccgan.kernels import library, triton_runtime
from raccgan.kernels.qualification.table import Class, Row, Rows

Circumstances = dict[str, str]


def folders() -> list[Path]:
    """Where the files may lie: the user's cache folder, then a temporary one, for a home that cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "/nonexistent", ".cache")
    return [Path(home, "raccgan"), Path(tempfile.gettempdir(), f"raccgan-{os.getuid()}")]


@functools.cache
def circumstances(device: torch.device) -> Circumstances:
    """What the findings depend on; any change of it makes them void."""
    found = {
        "device": _processor(),
        "driver": "",
        "PyTorch": torch.__version__,
        "Triton": triton_runtime.VERSION,
        "kernels": _digest(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["driver"] = _driver()
    else:
        found["device"] += f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return found


def load(device: torch.device) -> Rows:
    """What was found here before; no rows where nothing was, or a file cannot be read."""
    present = [folder for folder in folders() if folder.is_dir()]
    found = circumstances(device) if present else {}
    for folder in present:
        file = folder / _name(found)
        try:
            if file.stat().st_uid != os.getuid():  # anyone may write into a temporary folder
                continue
            stored = json.loads(file.read_text("utf-8"))
            return {
                Class(op, dtype, tuple(shape), k): Row(tuple(row.pop("order")), **row)
                for (op, dtype, shape, k), row in stored["rows"]
            }
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return {}


def save(device: torch.device, rows: Rows) -> str | None:
    """Write the file whole or not at all; returns why it could not be written, else None."""
    found = circumstances(device)
    text = json.dumps({"circumstances": found, "rows": [(kind, vars(row)) for kind, row in rows.items()]}, indent=1)
    reasons = []
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", encoding="utf-8", delete=False) as part:
                part.write(text)
            os.replace(part.name, folder / _name(found))
            return None
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    return "; ".join(reasons)


@contextmanager
def locked(device: torch.device) -> Iterator[None]:
    """Hold the lock of a device's findings: one process of a machine qualifies, and others wait and read.

    Where no folder can be written, each does it for itself.
    """
    file = None
    for folder in folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = (folder / f"{_name(circumstances(device))}.lock").open("w")
            break
        except OSError:
            continue
    try:
        if file is not None:
            flock(file, LOCK_EX)
        yield
    finally:
        if file is not None:
            file.close()


def _name(found: Circumstances) -> str:
    return f"qualified-{hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text()) if version.is_file() else None
    return found[0] if found else ""


@functools.cache
def _digest() -> str:
    """Of all sources of the kernels in Python, and of the compiled library."""
    digest = hashlib.sha256()
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    if built := library.path():
        files.append(built)
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()[:16]
