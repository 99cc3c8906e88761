"""Ranks: which part of a job this process is, and what the ranks tell one another.

``torchrun ... -m raccgan.train`` starts one process a rank, each with its place in the environment. A command joins the
job (:func:`join`) and everything else asks here. In a process of its own nothing below does anything, nor costs
anything.

Rules that make one process and many compute the same:

- a batch, its random numbers included, is that of the whole job; every rank draws it, and takes its own slice
  (:func:`own`);
- a loss is a mean over the batch, so the job's is the mean of the ranks', and so is its gradient;
- what couples samples, the moments of a batch norm, is of the whole batch, in both directions: a rank's gradient
  reaches the others' samples.

All ranks make the same calls in the same order. Files are read and written by rank 0 (:func:`on_first`).

Imports no torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from raccgan.errors import InputError

if TYPE_CHECKING:
    import torch

    from raccgan.distributed.heartbeat import Watch

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A process in its job; ``local`` is among those on the same machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


_VARIABLES = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}

_place = Place()
_watch: Watch | None = None
_was_rank = False


def rank() -> int:
    return _place.rank


def world() -> int:
    """How many ranks there are; 1 in a process of its own."""
    return _place.world


def first() -> bool:
    """Whether this is rank 0, which alone writes files and shows progress."""
    return _place.rank == 0


def local_world() -> int:
    """How many ranks share this machine."""
    return _place.local_world


# ---- the job --------------------------------------------------------------------------------------------------------


def place_in(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun, or another launcher that sets the same variables, says of this process.

    Raises:
        InputError: some of the variables are there and some are not.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return Place()
    try:
        return Place(**{name: int(environment[variable]) for name, variable in _VARIABLES.items()})
    except (KeyError, ValueError):
        raise InputError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, and not all of {', '.join(_VARIABLES.values())} are set to "
            "a number: start with torchrun, or unset it"
        ) from None


def job() -> str | None:
    """What tells this job of torchrun from others, the same when it starts its ranks again; None without torchrun."""
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    # "none" is what torchrun calls a job on several machines that was given no name.
    return f"{socket.gethostname()}/{os.getppid()}" if given == "none" else given


def join(device: torch.device, timeout: float) -> None:
    """Become a rank of the job that the environment names, if it names one; :func:`leave` is the end of it.

    Args:
        device: where this rank computes; NCCL serves a GPU, gloo a CPU.
        timeout: seconds that a rank waits for the others before it gives them up.

    Raises:
        InputError: the others are not there.
    """
    global _place, _watch, _was_rank
    place = place_in()
    if place.world == 1:
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from raccgan.distributed.heartbeat import Watch

    wait = timedelta(seconds=timeout)
    store: Any
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=wait))
        store = dist.distributed_c10d.PrefixStore(_meet(store, place, timeout), store)
        if device.type == "cuda":
            _use(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world,
            timeout=wait,
        )
        _watch = Watch(dist.distributed_c10d.PrefixStore("watch", store.clone()), place.rank, place.world, timeout)
    except RuntimeError as error:
        raise InputError(
            f"rank {place.rank} of {place.world} found no job at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {timeout:.0f} s: {_first_line(error)}"
        ) from None
    _place, _was_rank = place, True
    signal.signal(signal.SIGTERM, _terminated)


def _meet(store: Any, place: Place, timeout: float) -> str:
    """A name for this meeting of all ranks: torchrun keeps the store, and what is in it, when it starts them again.

    Every rank asks under a name of its own, and rank 0 answers whoever asks last in the place of each.

    Raises:
        RuntimeError: of those that are waited for, not all have come.
    """
    mine = secrets.token_hex(8)
    if place.rank:
        store.set(f"asks/{place.rank}", mine)
        meeting: str = store.get(f"answer/{mine}").decode()
        store.set(f"{meeting}/here/{place.rank}", "")
        return meeting
    missing = set(range(1, place.world))
    end = time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"{mine}/here/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} has not come")
        time.sleep(0.01)
    return mine


def leave(error: BaseException | None = None) -> None:
    """Part from the job, if there is one: with the work done, or with the ``error`` that ended it, told to the others.

    Raises:
        BaseException: in place of ``error``, where the others' state explains it better, or says it already.
    """
    global _place, _watch
    if _watch is None:
        return
    import torch
    import torch.distributed as dist

    watch, _watch, _place = _watch, None, Place()
    try:
        if error is not None:
            watch.report(error)
    finally:
        watch.leave()
        # Python must not end while gloo's threads run; to end NCCL's, where one is gone, can take for ever.
        if error is None or not torch.cuda.is_initialized():
            dist.destroy_process_group()


def end(status: int) -> None:
    """End the process, if it was a rank, with this exit status.

    Python's own end takes C++ objects down while threads of theirs may still run: one in 16 short jobs on a machine
    with seven times as much to do as it could was aborted there, with all its work done.
    """
    if not _was_rank:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _use(device: torch.device) -> None:
    import torch

    torch.cuda.set_device(device)


def _terminated(number: int, frame: Any) -> None:
    if _watch is not None:
        _watch.terminated = True
    raise KeyboardInterrupt


@contextmanager
def answered() -> Iterator[None]:
    """What a collective raises when a rank is gone, said in one line.

    Raises:
        InputError: of :class:`raccgan.distributed.heartbeat.LostRankError`.
    """
    try:
        yield
    except RuntimeError as error:
        if _watch is None:
            raise
        raise _watch.lost(_first_line(error)) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- shares ---------------------------------------------------------------------------------------------------------


def require_divisible(batch: int) -> None:
    """Refuse a batch that does not divide evenly: a mean over ranks would not be one over images.

    Raises:
        InputError: with the sizes that would do.
    """
    if batch % world():
        below = batch - batch % world()
        sizes = f"{below} or {below + world()}" if below else str(world())
        raise InputError(
            f"--batch-size {batch} is the whole job's and does not divide among {world()} ranks: take {sizes}"
        )


def own(batch: Sequence[T], size: int) -> list[T]:
    """This rank's slice of a batch, or of several batches of ``size`` behind one another."""
    share = size // world()
    begin = rank() * share
    return [item for start in range(begin, len(batch), size) for item in batch[start : start + share]]


# ---- objects --------------------------------------------------------------------------------------------------------


def on_first(function: Callable[[], T]) -> T:
    """What ``function`` returns on rank 0, where alone it runs, given to every rank; all of them wait for it.

    Raises:
        InputError: where it raised one on rank 0; the same on every rank.
    """
    if world() == 1:
        return function()
    import torch.distributed as dist

    found: list[Any] = [None, None]
    if first():
        try:
            found[0] = function()
        except InputError as error:
            found[1] = str(error)
    with answered():
        dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise InputError(found[1])
    result: T = found[0]
    return result


@contextmanager
def entered_on_first(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """What rank 0 alone enters, and leaves at the end; every rank gets what it gives, or raises (InputError)."""
    with ExitStack() as stack:
        yield on_first(lambda: stack.enter_context(make()))


def gathered(value: T) -> list[T] | None:
    """Every rank's ``value``, in their order, on rank 0; None on the others."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] | None = [None] * world() if first() else None
    with answered():
        dist.gather_object(value, found, dst=0)
    return found


def exchanged(value: T) -> list[T]:
    """Every rank's ``value``, in their order, on every rank."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    with answered():
        dist.all_gather_object(found, value)
    return found


def require_alike(what: str, value: Callable[[], object]) -> None:
    """Refuse to go on where ``value`` is another on a rank than on rank 0.

    Raises:
        InputError: naming the first such rank.
    """
    if world() == 1:
        return
    values = exchanged(value())
    for other, theirs in enumerate(values):
        if theirs != values[0]:
            raise InputError(f"{what} of rank {other} differ from those of rank 0: every machine needs the same")
