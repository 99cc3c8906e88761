"""The job of this process: one rank among several that ``torchrun`` started, or a process of its own.

A command joins the job with :func:`join`, hands what it gets to whatever couples ranks, and parts with :func:`leave`.
Importing this module imports no torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from raccgan.errors import InputError

if TYPE_CHECKING:
    import torch

    from raccgan.distributed.collectives import Collectives


@dataclass(frozen=True)
class Place:
    """A process in its job; ``local_rank`` and ``local_world`` count the ranks on the same machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


_VARIABLES = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}

_job: Collectives | None = None
_was_rank = False


def job() -> Collectives:
    """The job that this process has joined, or :data:`~raccgan.distributed.collectives.SINGLE`."""
    from raccgan.distributed.collectives import SINGLE

    return SINGLE if _job is None else _job


def place_in(environment: Mapping[str, str] = os.environ) -> Place:
    """What torchrun, or a launcher with the same variables, says of this process; an InputError if some are missing."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return Place()
    try:
        return Place(**{name: int(environment[variable]) for name, variable in _VARIABLES.items()})
    except (KeyError, ValueError):
        raise InputError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r}, and not all of {', '.join(_VARIABLES.values())} are set to "
            "a number: start with torchrun, or unset it"
        ) from None


def torchrun_job() -> str | None:
    """The name of this job of torchrun, the same after it restarts its ranks; None without torchrun."""
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    # "none" is what torchrun calls a job on several machines that was given no name.
    return f"{socket.gethostname()}/{os.getppid()}" if given == "none" else given


def join(device: torch.device, timeout: float) -> Collectives:
    """Become a rank of the job that the environment names, if it names one, until :func:`leave`.

    The rank computes on ``device``, a GPU with NCCL or a CPU with gloo, and waits ``timeout`` seconds for the others
    before it gives them up; an InputError if they did not come.
    """
    global _job, _was_rank
    place = place_in()
    if place.world == 1:
        return job()
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from raccgan.distributed.collectives import Collectives
    from raccgan.distributed.heartbeat import Heartbeat, first_line

    wait = timedelta(seconds=timeout)
    store: Any
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=wait))
        store = PrefixStore(_meet(store, place, timeout), store)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=wait)
        heartbeat = Heartbeat(PrefixStore("heartbeat", store.clone()), place.rank, place.world, timeout)
    except RuntimeError as error:
        raise InputError(
            f"rank {place.rank} of {place.world} found no job at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {timeout:.0f} s: {first_line(error)}{_mend(error)}"
        ) from None
    _job, _was_rank = Collectives(place.rank, place.world, place.local_world, heartbeat), True

    def terminated(number: int, frame: Any) -> None:
        heartbeat.terminated = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    return _job


def _mend(error: RuntimeError) -> str:
    """The way out where gloo finds no address of its own machine, to which it says no more than that."""
    unresolved = any(word in str(error).lower() for word in ("resolve", "getaddrinfo", "hostname", "address", "ifaddr"))
    how = "torchrun --local-addr 127.0.0.1 (or this machine's address), or GLOO_SOCKET_IFNAME with the interface to use"
    return f"; where this machine's own name leads nowhere, {how}, mends that" if unresolved else ""


def _meet(store: Any, place: Place, timeout: float) -> str:
    """A new name for this meeting of all ranks, for their keys in the store; a RuntimeError after ``timeout`` seconds.

    torchrun keeps the store and its keys when it restarts the ranks, and its restart count differs between machines
    after a failure. So every rank asks under a random name, and rank 0 answers the last that asked in each place.
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
    """Part from the job, if there is one, and report the ``error`` that ended this rank's work (Heartbeat.report)."""
    global _job
    if _job is None or _job.heartbeat is None:
        return
    import torch
    import torch.distributed as dist

    heartbeat, _job = _job.heartbeat, None
    try:
        if error is not None:
            heartbeat.report(error)
    finally:
        heartbeat.leave()
        # Python must not end while gloo's threads run. NCCL's may take for ever to end if a rank is gone.
        if error is None or not torch.cuda.is_initialized():
            dist.destroy_process_group()


def end(status: int) -> None:
    """End the process with this exit status if it was a rank.

    Python's own end destroys C++ objects while their threads may still run: it aborted one in 16 short jobs under load.
    """
    if _was_rank:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
