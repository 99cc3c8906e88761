"""What was measured, and what it says of a call: the table by which ``fused`` chooses.

``measured.json`` beside this file has a table for every device that the benchmarks ran on; ``python -m bench.measured``
makes it of their results. A row is a class of calls, and holds the milliseconds that each implementation took for its
cases together, channels_last as the networks are built:

========= =============================================================================================
op        the family
pass      ``forward``; ``backward`` where gradients are recorded; ``penalty`` where they are, and the op may stand
          in a critic, whose gradient is differentiated again
kind      what else the time depends on, in the family's own words: of a convolution its taps and resizing
dtype     of the first input
channels  of the first input, up to a power of two
side      the longer one, likewise
========= =============================================================================================

The batch has no part in it, since the order of a sum must not depend on it. A call belongs to the row that is nearest:
in its pass, then in its kind, in its dtype, and by the fewest doublings of channels and side. Of two that are as near
it is the first. A call without a shape belongs to all rows of its op together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).with_name("measured.json")
REGENERATE = "python -m bench.measured makes it anew of bench/results"

PASSES = ("forward", "backward", "penalty")
_NEXT_BEST = {
    "forward": PASSES,
    "backward": ("backward", "penalty", "forward"),
    "penalty": ("penalty", "backward", "forward"),
}
_HALVES = ("bfloat16", "float16")


class TableError(ValueError):
    """The file is no table of measurements. One line: which file, what is wrong, what would mend it."""


class Class(NamedTuple):
    """What calls have in common that are served alike."""

    op: str
    pass_: str
    kind: str
    dtype: str
    channels: int  # powers of two
    side: int


class Row(NamedTuple):
    """A class and what was measured of it."""

    of: Class
    cases: tuple[str, ...]
    milliseconds: Mapping[str, float]  # by implementation, fastest first


class Table(NamedTuple):
    """All that was measured on one device, in one run or in several."""

    device: str  # "cpu" or "cuda"
    name: str  # the processor's or the GPU's own
    date: str
    versions: str
    command: str
    rows: tuple[Row, ...]


def fastest_first(op: str, device: torch.device, of: Class | None) -> tuple[str, ...] | None:
    """The implementations that were measured for a class of calls, or for all calls of an op; ``None`` for none.

    Raises:
        TableError: the file is no table.
    """
    table = table_for(device)
    rows = () if table is None else tuple(row for row in table.rows if row.of.op == op)
    if not rows:
        return None
    if of is not None:
        return tuple(nearest(of, rows).milliseconds)
    return tuple(together([row.milliseconds for row in rows]))


def nearest(of: Class, rows: Sequence[Row]) -> Row:
    """The row that a class belongs to, of one op's."""
    order = _NEXT_BEST[of.pass_]

    def distance(row: Row) -> tuple[int, ...]:
        alike = 0 if row.of.dtype == of.dtype else 1 if row.of.dtype in _HALVES and of.dtype in _HALVES else 2
        doublings = abs(_doublings(row.of.channels) - _doublings(of.channels))
        doublings += abs(_doublings(row.of.side) - _doublings(of.side))
        return order.index(row.of.pass_), int(row.of.kind != of.kind), alike, doublings

    return min(rows, key=distance)


def together(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums of those that have a time in each, fastest first."""
    names = [name for name in times[0] if all(name in of for of in times)]
    sums = {name: sum(of[name] for of in times) for name in names}
    return dict(sorted(sums.items(), key=lambda pair: pair[1]))


def up_to_a_power_of_two(n: int) -> int:
    """The least one that is not below ``n``; of a number that torch.compile keeps open, too: it guards the range."""
    power = 1
    while power < n:
        power *= 2
    return power


def _doublings(power: int) -> int:
    return power.bit_length() - 1


@lru_cache(maxsize=16)
def table_for(device: torch.device) -> Table | None:
    """What was measured on this device, else on another one of its type, the latest; ``None`` where nothing was.

    Raises:
        TableError: the file is no table.
    """
    alike = [table for table in read(SHIPPED) if table.device == device.type]
    if not alike:
        return None
    here = [table for table in alike if table.name == name_of(device)]
    return max(here or alike, key=lambda table: table.date)


@cache
def name_of(device: torch.device) -> str:
    """The processor's or the GPU's own name, empty where it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else ""


def read(file: Path) -> list[Table]:
    """The tables in a file, none where there is no file.

    Raises:
        TableError: it is no such file.
    """
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{file} cannot be read: {error}; {REGENERATE}") from None
    try:
        return [_table(found) for found in _of(list, json.loads(text)["tables"], "tables")]
    except json.JSONDecodeError as error:
        raise TableError(f"{file} is not JSON: {error}; {REGENERATE}") from None
    except KeyError as error:
        raise TableError(f"{file} is no table of measurements: {error} is missing; {REGENERATE}") from None
    except (TypeError, ValueError) as error:
        raise TableError(f"{file} is no table of measurements: {error}; {REGENERATE}") from None


def _table(found: Any) -> Table:
    about = {name: _of(str, found[name], name) for name in Table._fields if name != "rows"}
    return Table(**about, rows=tuple(_row(row) for row in _of(list, found["rows"], "rows")))


def _row(found: Any) -> Row:
    texts = [_of(str, found[name], name) for name in ("op", "pass", "kind", "dtype")]
    if texts[1] not in PASSES:
        raise ValueError(f"pass is {texts[1]!r}, none of {', '.join(PASSES)}")
    sizes = [_of(int, found[name], name) for name in ("channels", "side")]
    if any(size < 1 or size != up_to_a_power_of_two(size) for size in sizes):
        raise ValueError(f"channels and side are {sizes[0]} and {sizes[1]}, which are not both powers of two")
    times = {str(name): float(time) for name, time in _of(dict, found["milliseconds"], "milliseconds").items()}
    if not times or not all(0 < time < float("inf") for time in times.values()):
        raise ValueError(f"milliseconds are {times}")
    cases = tuple(_of(str, case, "case") for case in _of(list, found["cases"], "cases"))
    return Row(Class(*texts, *sizes), cases, together([times]))


def _of(kind: Callable[..., Any], value: Any, name: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}")
    return value
