"""What qualification found, as :mod:`raccgan.kernels.dispatch` looks it up; empty until :mod:`.cache` fills it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Class(NamedTuple):
    """Calls that one backend serves best: all of an op on images of one size, of any number."""

    op: str
    dtype: str  # of the arithmetic, such as "float32"
    shape: tuple[int, ...]  # of the first input, without its number of samples
    kernel_size: int  # of a convolution; 0 elsewhere

    @classmethod
    def of(cls, op: str, dtype: torch.dtype, shape: tuple[int, ...], kernel_size: int) -> Class:
        return cls(op, str(dtype).removeprefix("torch."), tuple(shape[1:]), kernel_size)

    def __str__(self) -> str:
        k = f" {self.kernel_size}x{self.kernel_size}" if self.kernel_size else ""
        return f"{self.op}{k} on {'x'.join(map(str, self.shape))} in {self.dtype}"


@dataclass(frozen=True)
class Row:
    """What was found of a class of calls."""

    order: tuple[str, ...]  # the backends to take, the fastest first
    refused: Mapping[str, str] = field(default_factory=dict)  # by backend: why it is not taken, in words
    milliseconds: Mapping[str, float] = field(default_factory=dict)  # by backend, of all calls of the class together
    errors: Mapping[str, float] = field(default_factory=dict)  # by backend, relative to float64: the largest


Rows = Mapping[Class, Row]

_tables: dict[torch.device, Rows] = {}


def use(device: torch.device, rows: Rows) -> None:
    """Have ``fused`` follow ``rows`` on a device, with an index where it is a GPU; no rows are none."""
    _tables.pop(device, None)
    if rows:
        _tables[device] = rows


def rows_of(device: torch.device) -> Rows:
    """What ``fused`` follows on a device."""
    return _tables.get(indexed(device), {}) if _tables else {}


def row(op: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], kernel_size: int) -> Row | None:
    """What was found of a call; None where nothing is known."""
    if not _tables:
        return None
    rows = rows_of(device)
    return rows.get(Class.of(op, dtype, shape, kernel_size)) if rows else None


def indexed(device: torch.device) -> torch.device:
    """The device with its index, where it is a GPU: ``cuda`` is the current one."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return device
