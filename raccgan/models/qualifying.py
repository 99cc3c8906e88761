"""Qualifies the kernels for the calls of a command, before ``--kernels fused`` takes one on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch

from raccgan.kernels import probe
from raccgan.kernels.qualification import run, table
from raccgan.kernels.qualification.record import Recorded
from raccgan.kernels.qualification.run import Limits
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say

Calls = Callable[[], Iterable[Recorded]]


def qualify(kernels: str, device: torch.device, calls: Calls, *, shown: bool = True) -> None:
    """Have ``fused`` take what is proven on the device: what was found before, and on a GPU what is found now.

    A first start takes at most two minutes, says so in one line and shows its progress; later ones read a file. On a
    CPU nothing is tried: there ``python -m raccgan.doctor --qualify`` is the way. ``RACCGAN_QUALIFY=0`` takes and tries
    nothing.

    Args:
        kernels: the setting; only ``fused`` has anything to choose.
        calls: lists what the command will call. It is not asked on a CPU.
        shown: whether this process says anything. All processes of a machine call this, and one qualifies.
    """
    if kernels != "fused" or os.environ.get("RACCGAN_QUALIFY") == "0":
        return
    if device.type == "cuda":
        try_all(calls(), device, shown=shown)
    elif device not in _read:
        _read.add(device)
        run.known(device)


_read: set[torch.device] = set()


def try_all(
    calls: Iterable[Recorded], device: torch.device, *, limits: Limits | None = None, shown: bool = True
) -> table.Rows:
    """Qualify ``calls`` on any device, and show how far it is; returns all rows of the device."""
    limits = limits or Limits()

    def begin(total: int) -> Callable[[int], None]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this processor"
        if shown:
            say(
                f"trying our kernels on {name}, once, for at most {limits.all / 60:.0f} min: {total} classes of calls; "
                "RACCGAN_QUALIFY=0 leaves it out and takes PyTorch's operations"
            )
            if note := probe.note(device):
                say(note)
        bar = shows.enter_context(Progress("kernels", total, unit="class", shown=shown))
        return lambda done: bar.update(done - bar.done)

    with ExitStack() as shows:
        return run.qualify(calls, device, limits=limits, begin=begin, say=say if shown else lambda line: None)
