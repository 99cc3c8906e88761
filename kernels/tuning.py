"""Which configuration a Triton kernel is launched with. Nobody waits for it, unless they ask to.

A family has a few configurations, and a model of the work that ranks them for a shape: the first is what runs. Where
someone has measured that shape on this device, with these versions and this kernel source, the fastest runs instead.
The batch has no part in the choice, since the order of a sum must not depend on it.

Environment:
    RACCGAN_TUNE: 1 measures every configuration at the first call of each shape, and keeps the fastest.
    RACCGAN_TUNING: the file to keep them in, instead of ``raccgan/triton.json`` in the user's cache folder.

``tuned.json`` beside this file is a table that comes with the package; there is none as long as nobody has measured
on a GPU. ``python -m bench.tune`` makes it, at the layers of the two published models.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.triton_runtime import Config

SHIPPED = Path(__file__).with_name("tuned.json")

# Of the model: programs that an H100 runs at a time, and what starting one costs, in elements that it moves meanwhile.
_AT_A_TIME, _START, _BATCH = 2 * 132, 2048, 16

Table = dict[str, dict[str, Any]]  # by device, versions and source; then by kernel and shape

_chosen: dict[tuple[object, ...], Config] = {}


def ranked(configs: Iterable[Config], work: Callable[[Config], tuple[int, int]]) -> list[Config]:
    """The cheapest first. ``work`` says how many programs a sample has, and how many elements each moves."""

    def cost(config: Config) -> int:
        programs, elements = work(config)
        return runtime.cdiv(_BATCH * programs, _AT_A_TIME) * (_START + elements)

    return sorted(configs, key=cost)


def choose(
    name: str,
    files: Sequence[str],
    shape: Sequence[object],
    candidates: Sequence[Config],
    device: torch.device,
    run: Callable[[Config], object] | None = None,
) -> Config:
    """The configuration for a shape.

    Args:
        name: of what is launched.
        files: where its kernels are written: another source is another kernel.
        shape: what the time depends on, the batch excepted: sizes, dtype, layout.
        candidates: as the model ranks them.
        device: where it runs.
        run: launches it all with one of the candidates, for measuring; without it nothing is measured.
    """
    if runtime.INTERPRETED or device.type != "cuda":
        return candidates[0]
    key = (name, *shape, device)
    if key in _chosen:
        return _chosen[key]
    where, entry = _where(device, tuple(files)), f"{name} {' '.join(map(str, shape))}"
    if asked() and run is not None and not torch.cuda.is_current_stream_capturing():
        times = [(measure(lambda config=config: run(config)), config) for config in candidates]  # type: ignore[misc]
        found = min(times, key=lambda pair: pair[0])[1]
        keep(where, entry, found)
    elif asked():
        return candidates[0]  # this call cannot measure; a later one will
    else:
        found = recall(where, entry, candidates)
    _chosen[key] = found
    return found


def asked() -> bool:
    """Whether the user wants to wait for measurements."""
    return os.environ.get("RACCGAN_TUNE") == "1"


def measure(call: Callable[[], object]) -> float:
    """Milliseconds of a call on the GPU: the median of some."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def path() -> Path:
    """Where measurements are kept."""
    if named := os.environ.get("RACCGAN_TUNING"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raccgan" / "triton.json"


def recall(where: str, entry: str, candidates: Sequence[Config]) -> Config:
    """What was measured as the fastest; the model's choice where nothing was, or what no longer is a candidate."""
    for file in (path(), SHIPPED):
        kept = read(file).get(where, {}).get(entry)
        found = next((config for config in candidates if _described(config) == kept), None)
        if found is not None:
            return found
    return candidates[0]


def keep(where: str, entry: str, config: Config) -> None:
    """Add a measurement to the file, which is written beside and renamed: a reader never sees half of it."""
    file = path()
    table = read(file)
    table.setdefault(where, {})[entry] = _described(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(table, stream, indent=1, sort_keys=True)
    os.replace(beside, file)


def read(file: Path) -> Table:
    """The measurements in a file; none where it is missing or is no such table."""
    try:
        table = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(table, dict) and all(isinstance(entries, dict) for entries in table.values())
    return table if whole else {}


def _described(config: Config) -> dict[str, Any]:
    return {"tile": dict(config.tile), "num_warps": config.num_warps, "num_stages": config.num_stages}


@cache
def _where(device: torch.device, files: tuple[str, ...]) -> str:
    """What a measurement holds for: another of these, and it is made anew."""
    source = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]
    gpu = torch.cuda.get_device_name(device)
    return f"{gpu}, PyTorch {torch.__version__}, Triton {runtime.VERSION}, source {source}"
