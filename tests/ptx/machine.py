"""The machine from Python: PTX text on numpy arrays or PyTorch's CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.ptx import build

ORDERS = {"ascending": 0, "descending": 1, "random": 2}


@functools.cache
def _loaded() -> ctypes.CDLL:
    """libptx.so, built at the first use."""
    with build.alone():
        folder = build.machine()
    library = ctypes.CDLL(str(folder / "libptx.so"), mode=ctypes.RTLD_GLOBAL)
    for name, result in (("ptx_error", ctypes.c_char_p), ("ptx_findings", ctypes.c_char_p),
                         ("ptx_counts", ctypes.c_char_p), ("ptx_launches", ctypes.c_uint64),
                         ("ptx_finding_count", ctypes.c_size_t), ("ptx_kernels", ctypes.c_char_p)):  # fmt: skip
        getattr(library, name).restype = result
    library.ptx_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.ptx_forget.argtypes = [ctypes.c_void_p]
    return library


class PtxError(RuntimeError):
    """A launch that a GPU would refuse or never end, or PTX that is not known."""


class Module:
    """PTX text."""

    def __init__(self, text: str) -> None:
        data = text.encode()
        self.number = _loaded().ptx_load(data, ctypes.c_size_t(len(data)))
        if self.number < 0:
            raise PtxError(_loaded().ptx_error().decode())

    def launch(self, entry: str, grid: Sequence[int], block: Sequence[int], *arguments: Any, shared: int = 0) -> None:
        """Run an entry. Arguments are ctypes values; an object that says where it lies stands for its address."""
        values = [a if isinstance(a, ctypes._SimpleCData) else ctypes.c_void_p(address(a)) for a in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        three = ctypes.c_uint32 * 3
        blocks, threads = (three(*sizes, *[1] * (3 - len(sizes))) for sizes in (grid, block))
        if _loaded().ptx_launch(self.number, entry.encode(), blocks, threads, ctypes.c_uint32(shared), pointers):
            raise PtxError(_loaded().ptx_error().decode())

    def allow_shared(self, entry: str, size: int) -> None:
        """As cudaFuncSetAttribute allows more than 48 KB."""
        if _loaded().ptx_allow_shared(self.number, entry.encode(), ctypes.c_uint32(size)):
            raise PtxError(_loaded().ptx_error().decode())


def address(a: Any) -> int:
    return int(a.data_ptr() if hasattr(a, "data_ptr") else a.ctypes.data)


def buffer(a: Any) -> Any:
    """Make an array known as memory that kernels may use; returns it."""
    _loaded().ptx_buffer(address(a), a.nbytes)
    return a


def forget(a: Any) -> None:
    _loaded().ptx_forget(address(a))


def settings(order: str = "ascending", seed: int = 0, check: bool = True, count: bool = True,
             shared: int = 99 * 1024) -> None:  # fmt: skip
    _loaded().ptx_set(ORDERS[order], seed, int(check), int(count), shared)


def findings() -> list[dict[str, Any]]:
    """What was found since the last call."""
    found: list[dict[str, Any]] = json.loads(_loaded().ptx_findings())
    return found


def described(finding: dict[str, Any]) -> str:
    where = f" ({finding['source']})" if finding["source"] else ""
    return (f"{finding['kind']}: {finding['detail']}; {finding['opcode']}, PTX line {finding['line']}{where}, block "
            f"{finding['block']}, thread {finding['thread']}, {finding['times']} times, "
            f"in {finding['kernel']}")  # fmt: skip


def counts() -> dict[str, Any]:
    """What the last launch executed."""
    counted: dict[str, Any] = json.loads(_loaded().ptx_counts())
    return counted


def launches() -> int:
    return int(_loaded().ptx_launches())


def kernels() -> list[dict[str, Any]]:
    """The entries launched so far: module, entry, and code, a list of line, opcode and whether it was ever executed."""
    launched: list[dict[str, Any]] = json.loads(_loaded().ptx_kernels())
    return launched


@contextmanager
def without(module: int, entry: str, line: int) -> Iterator[None]:
    """As if the instruction of that line had been forgotten."""
    if _loaded().ptx_leave_out(module, entry.encode(), ctypes.c_uint32(line), 1):
        raise PtxError(_loaded().ptx_error().decode())
    try:
        yield
    finally:
        _loaded().ptx_leave_out(module, entry.encode(), ctypes.c_uint32(line), 0)


def know_tensors() -> None:
    """From now on every CPU tensor of PyTorch's is a buffer, with nothing behind it; its memory is NaN at first."""
    import torch  # noqa: F401, its libraries

    _loaded()
    ctypes.CDLL(str(build.machine() / "libtensors.so")).tensors_begin()
