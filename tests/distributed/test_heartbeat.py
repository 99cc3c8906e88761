"""Heartbeats of several ranks in one process: who is lost, and who says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from raccgan.distributed.heartbeat import Heartbeat
from raccgan.errors import InputError


@pytest.fixture
def heartbeats() -> Iterator[Callable[..., list[Heartbeat]]]:
    """Make the heartbeats of several ranks in this process, on one store."""
    made: list[Heartbeat] = []
    server = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)

    def make(world: int, timeout: float) -> list[Heartbeat]:
        threads = [
            threading.Thread(target=lambda rank=rank: made.append(Heartbeat(server.clone(), rank, world, timeout)))
            for rank in range(world)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        made.sort(key=lambda one: one.rank)
        return made

    yield make
    for one in made:
        if one.is_alive():
            one.leave()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how its process ends here
def test_a_rank_that_waits_in_vain_is_ended(
    heartbeats: Callable[..., list[Heartbeat]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The work of rank 0 is stuck where no error reaches it, as in a GPU's queue; rank 1 has said why it stopped."""
    exits: list[int] = []
    ended = threading.Event()

    def leave_the_process(status: int) -> None:
        exits.append(status)
        ended.set()
        raise SystemExit

    monkeypatch.setattr("os._exit", leave_the_process)
    monkeypatch.setattr("raccgan.distributed.heartbeat.GRACE", 0.2)
    first, second = heartbeats(2, 60)
    with pytest.raises(InputError, match="rank 1: the disk is full"):
        second.report(InputError("the disk is full"))
    second.leave()
    assert ended.wait(10)
    assert exits == [2]
    assert str(first.lost(RuntimeError("connection closed"))) == "rank 0: rank 1 stopped: the disk is full"
    assert capsys.readouterr().err == "error: rank 0: rank 1 stopped: the disk is full\n"


def test_a_rank_that_has_left_is_not_missed(heartbeats: Callable[..., list[Heartbeat]]) -> None:
    first, second, third = heartbeats(3, 1)
    second.leave()
    third._ended.set()  # as if its process were gone
    error = first.lost(RuntimeError("connection closed"))
    assert str(error).startswith("rank 0: rank 2 was lost")


def test_a_line_is_said_once(heartbeats: Callable[..., list[Heartbeat]]) -> None:
    first, second = heartbeats(2, 60)
    with pytest.raises(InputError, match="rank 1: no such folder"):
        second.report(InputError("no such folder"))
    with pytest.raises(SystemExit) as stop:
        first.report(InputError("no such folder"))
    assert stop.value.code == 2
