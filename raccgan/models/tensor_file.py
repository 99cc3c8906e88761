"""Files of named tensors with a JSON header and a checksum, in the safetensors format. Reading one runs no code.

The format's metadata is one entry, ``raccgan``: a hash of the header's text and of every tensor, a space, the header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from raccgan.errors import InputError

Tensors = dict[str, Tensor]


def packed(header: Mapping[str, Any], tensors: Tensors) -> bytes:
    """The content of a file. Tensors of any device and memory format are stored in the order of their axes."""
    text = json.dumps(header)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(plain, {"raccgan": f"{hash_of(text, plain)} {text}"})


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The header and tensors of a file, in three times its size of memory; an InputError if it is not whole or ours."""
    with path.open("rb") as file:
        start = file.read(9)
        file.seek(0)
        content = file.read() if start[8:] == b"{" else b""  # a large file of another kind is not read
    if not content and start.startswith((b"PK", b"\x80")):
        raise InputError(
            f"{path} is a pickle, as raccgan's checkpoints were up to format 4; reading one could run code, so this "
            "version reads safetensors alone: train anew, or use the version that wrote it"
        )
    try:
        if not content:
            raise SafetensorError("it does not begin as a safetensors file does")
        tensors = safetensors.torch.load(content)  # which compares shapes and offsets with the size of the content
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        digest, _, text = metadata["raccgan"].partition(" ")
        header, whole = json.loads(text), digest == hash_of(text, tensors)
        if isinstance(header, dict) and whole:
            return header, tensors
        reason = "its content is not as it was written"
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError):
        reason = "its header is not one of raccgan's"
    raise InputError(f"{path} is truncated or no checkpoint: {reason}")


def hash_of(text: str, tensors: Tensors) -> str:
    """Of a text and the names, shapes, dtypes and values of tensors, in 32 hexadecimal digits."""
    hashed = hashlib.blake2b(text.encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        hashed.update(f"{name} {form(value)}".encode())
        hashed.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def form(tensor: Tensor) -> str:
    """Shape and dtype, for a person: ``(3, 4) float32``."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tensors:
    """The tensors of nested dictionaries, by the names of the dictionaries with dots between them."""
    found: Tensors = {}
    for name, value in tree.items():
        found |= {prefix + name: value} if isinstance(value, Tensor) else flat(value, f"{prefix}{name}.")
    return found


def matches(value: Any, kind: Any) -> bool:
    """Whether a value that JSON gave is of an annotated type. Numbers are finite and fit 64 bits; a tuple is a list."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(matches(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(matches(k, inner[0]) and matches(v, inner[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(matches(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(matches, value, inner))
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind is float:
        return matches(value, int) or (type(value) is float and math.isfinite(value))
    return isinstance(value, kind)
