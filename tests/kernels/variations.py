"""What must change no bit of a result: how a tensor lies in memory, and how many threads work on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed", "shifted")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers; of one row's pixels of the first sample alone where ``expanded``, as a sum's gradient is."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.full((t.shape[0], t.shape[1] + 2, t.shape[2] + 1, 2 * t.shape[3]), torch.nan, dtype=t.dtype)
        wide[:, 1:-1, 1:, ::2] = t
        return wide[:, 1:-1, 1:, ::2]
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "shifted":  # dense, but a tensor's memory does not start where a vector's would
        longer = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        longer[1:] = t.flatten()
        return longer[1:].view(t.shape)
    return t[:1, :1, :, :1].expand_as(t) if layout == "expanded" else t


def scattered(t: Tensor) -> Tensor:
    """The same numbers of any shape but [], each behind a NaN."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., 1::2] = t
    return wide[..., 1::2]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
