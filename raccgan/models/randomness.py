"""Random numbers as a pure function of (seed, stream, step).

Every draw of a training step comes from a generator made for that step, so a resumed run continues with the numbers
that an uninterrupted one would have had, and no random state has to be saved. Draws are made on the CPU, so that a
seed means the same numbers on every device.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, name: str, step: int = 0) -> torch.Generator:
    """The generator of one step of one named stream."""
    digest = hashlib.blake2b(f"{seed}/{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
