"""What the ranks of a job compute together: moments, gradients, losses, and answers of rank 0.

Rules that make one process and many compute the same:

- A batch, its random numbers included, is that of the whole job. Every rank draws the whole batch and takes its slice.
- A loss is a mean over the batch, so the job's loss is the mean of the ranks' losses; likewise its gradient.
- The moments of a batch norm are those of the whole batch: a rank's gradient reaches the samples of the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raccgan.errors import InputError

if TYPE_CHECKING:
    from raccgan.distributed.heartbeat import Heartbeat

BUCKET = 16 << 20  # bytes of gradients that are reduced at once

T = TypeVar("T")


@dataclass(frozen=True)
class Collectives:
    """Rank ``rank`` of ``world`` ranks, ``local_world`` of them on this machine. Rank 0 alone writes files.

    It is handed to whatever couples ranks. All ranks make the same calls in the same order. In a process of its own
    (``world`` 1) each method returns what it was given, at no cost. Every method raises a
    :class:`raccgan.distributed.heartbeat.LostRankError` if another rank stopped or was lost.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    heartbeat: Heartbeat | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def __deepcopy__(self, memo: object) -> Collectives:
        """The same job: a network may be copied together with the object that it was handed."""
        return self

    def require_divisible(self, batch: int) -> None:
        """Raise an InputError if ranks would not have equally many images: their mean would not be that of all."""
        if batch % self.world:
            below = batch - batch % self.world
            sizes = f"{below} or {below + self.world}" if below else str(self.world)
            raise InputError(
                f"--batch-size {batch} is the whole job's and does not divide among {self.world} ranks: take {sizes}"
            )

    def own(self, batch: Sequence[T], size: int) -> list[T]:
        """This rank's slice of a batch, or of several batches of ``size`` one after the other."""
        share = size // self.world
        begin = self.rank * share
        return [item for start in range(begin, len(batch), size) for item in batch[start : start + share]]

    def own_rows(self, batch: Tensor) -> Tensor:
        """This rank's slice of a tensor of one row a sample, [N, ...] to [N / world, ...]."""
        return batch.chunk(self.world)[self.rank]

    def averaged(self, t: Tensor) -> Tensor:
        """The mean of every rank's ``t``, of one shape, without gradient."""
        return t if self.world == 1 else self._add_up(t.detach().clone()) / self.world

    def shared_moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of all ranks' values, from those of this rank's; every rank has equally many.

        Sums are of float64, in which mean (x^2) - (mean x)^2 loses nothing of a float32 variance. Gradients: any order,
        through every rank's moments.
        """
        if self.world == 1:
            return mean, var
        wide = mean.double()
        both = _Sum.apply(self, torch.stack([wide, var.double() + wide.square()])) / self.world
        return both[0].to(mean.dtype), (both[1] - both[0].square()).to(var.dtype)

    def anywhere(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank."""
        # The tensor is on the CPU also where ranks compute on GPUs: gloo notices a lost rank before a GPU's queue does.
        return flag if self.world == 1 else bool(self._add_up(torch.tensor(float(flag))))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make every ``grad`` the mean over ranks after the backward pass; hooks save nothing (docs/distributed.md)."""
        if self.world == 1:
            return
        for bucket in _buckets(p.grad for p in parameters if p.grad is not None):
            total = self._add_up(torch.cat([g.flatten() for g in bucket])) / self.world
            for g, mean in zip(bucket, total.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))

    @torch.no_grad()
    def copy_from_first(self, networks: Iterable[nn.Module]) -> None:
        """Give every rank the weights and buffers that rank 0 has."""
        if self.world == 1:
            return
        with self._answered():
            for t in (t for network in networks for t in network.state_dict().values()):
                plain = t.contiguous()
                dist.broadcast(plain, src=0)
                t.copy_(plain)

    def _add_up(self, t: Tensor) -> Tensor:
        with self._answered():
            dist.all_reduce(t)
        return t

    def on_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` on rank 0 alone; every rank waits and gets its result, or raises its InputError."""
        if self.world == 1:
            return function()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = function()
            except InputError as error:
                found[1] = str(error)
        with self._answered():
            dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise InputError(found[1])
        return found[0]

    @contextmanager
    def entered_on_first(self, make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """A context manager that rank 0 alone enters and leaves; every rank gets its value, or its InputError."""
        with ExitStack() as stack:
            yield self.on_first(lambda: stack.enter_context(make()))

    def gathered(self, value: T) -> list[T] | None:
        """Every rank's ``value``, in the order of ranks, on rank 0; None on the others."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.first else None
        with self._answered():
            dist.gather_object(value, found, dst=0)
        return found

    def exchanged(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._answered():
            dist.all_gather_object(found, value)
        return found

    def require_alike(self, what: str, value: Callable[[], object]) -> None:
        """Raise an InputError if a rank's ``value`` differs from that of rank 0; one process does not call it."""
        values = self.exchanged(value()) if self.world > 1 else []
        for other, theirs in enumerate(values):
            if theirs != values[0]:
                raise InputError(f"{what} of rank {other} differ from those of rank 0: every machine needs the same")

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn what a collective raises when a rank is gone into one line."""
        try:
            yield
        except RuntimeError as error:
            if self.heartbeat is None:
                raise
            raise self.heartbeat.lost(error) from None


SINGLE = Collectives()  # a process of its own


class _Sum(torch.autograd.Function):
    """The sum over ranks. Its gradient reaches every summand: the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, job: Collectives, t: Tensor) -> Tensor:
        ctx.job = job
        return job._add_up(t.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _Sum.apply(ctx.job, gradients[0])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for t in tensors:
        bucket.append(t)
        filled += t.nbytes
        if filled >= BUCKET:
            yield bucket
            bucket, filled = [], 0
    if bucket:
        yield bucket
