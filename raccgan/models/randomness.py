"""Random numbers as a pure function of (seed, name, step).

A step draws from a generator made for it, so a resumed run continues with the numbers of an uninterrupted one, and no
random state is saved. Draws are made on the CPU: a seed means the same numbers on every device.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, name: str, step: int = 0) -> torch.Generator:
    """The generator, on the CPU, of one step of the random stream ``name``."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
