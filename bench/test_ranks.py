"""Efficiency: the training step by one process and the same step, of the same batch, by two ranks.

The time is that of the cores, of all ranks together: ``x peer`` is the share of it that one process would have needed,
1.00 where the work divides without loss. On a CPU every rank has one thread, and gloo's own count as its. With
``--threads 1`` the processor's time counts, without the waiting of a rank for another, which on a machine that is not
quiet is mostly waiting for a core.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import Case, Compare, Contestant
from bench.networks import doubled, networks
from bench.roofline import training_step
from bench.test_step import CASES, TOLERANCE, batch_of, count, gradients, stepping, training_of
from raccgan.distributed import ranks
from raccgan.distributed.collectives import Collectives

PARAMETERS = ["digits 8px b32", *(pytest.param(name, marks=pytest.mark.full) for name in ("32px b64", "128px b4"))]


@pytest.mark.parametrize("name", PARAMETERS)
def test_training_step_by_ranks(measured: Compare, device: str, name: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    config, channels = CASES[name]
    exact = networks(config, channels, device, "reference", "NCHW")
    costs = training_step(config, channels, count(exact.generator), count(exact.discriminator), torch.float32)
    wanted = gradients(training_of(config, doubled(exact)), *batch_of(config, channels, device, torch.float64))
    case = Case("training_ranks", name, torch.float32, "step", device, costs, TOLERANCE["float32"], config.batch_size)
    with _job(1, device, name) as alone, _job(2, device, name) as both:
        rows = measured(case, [_contestant("one process", alone), _contestant("2 ranks", both)], wanted)
    assert all(row.median_ms for row in rows)


def _contestant(name: str, job: Sequence[Connection]) -> Contestant:
    def ask(what: str) -> list[Any]:
        for rank in job:
            rank.send(what)
        return [rank.recv() for rank in job]

    def seconds() -> float:
        walls, processors = zip(*ask("step"), strict=True)
        return sum(processors) if torch.get_num_threads() == 1 else len(job) * max(walls)

    return Contestant(
        name, "channels_last", peer=len(job) == 1, fused=len(job) > 1,
        check=lambda: ask("check")[0], call=lambda: None, seconds=seconds,
    )  # fmt: skip


@contextmanager
def _job(world: int, device: str, name: str) -> Iterator[list[Connection]]:
    """Processes that compute when they are told to, and end with the block."""
    with closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    connections, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, rank, world, port, device, name), daemon=True)
        process.start()
        connections.append(ours)
        processes.append(process)
    yield connections
    for connection, process in zip(connections, processes, strict=True):
        connection.send("leave")
        process.join()


def _work(connection: Connection, rank: int, world: int, port: int, device: str, name: str) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {variable: str(value) for variable, value in place.items()} | {"MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    where = f"cuda:{rank}" if device == "cuda" else device
    job = ranks.join(torch.device(where), 300)
    config, channels = CASES[name]
    step = stepping(config, channels, where, "fused", "channels_last", how="", job=job)  # ranks cannot trace
    for asked in itertools.count():
        what = connection.recv()
        if what == "leave":
            break
        connection.send(_check(name, where, job) if what == "check" else _timed(step, device, job, warm=asked > 1))
    ranks.leave()


def _check(name: str, where: str, job: Collectives) -> list[Tensor]:
    """Gradients of the whole batch, from every rank's slice of it."""
    config, channels = CASES[name]
    x, y = map(job.own_rows, batch_of(config, channels, where))
    training = training_of(config, networks(config, channels, where, "fused", "channels_last"), job=job)
    return [job.averaged(vector) for vector in gradients(training, x, y)]


def _timed(step: Iterator[Any], device: str, job: Collectives, *, warm: bool) -> tuple[float, float]:
    """Seconds of a step on the wall and of this process's cores, its threads' together; all ranks begin at once."""
    if not warm:
        next(step)
    job.anywhere(False)
    begun, used = time.perf_counter(), time.process_time()
    next(step)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, time.process_time() - used
