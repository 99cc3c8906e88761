"""What two ranks compute together, against one process: run by test_ranks.py.

Each rank computes on the whole batch first, while it is still a process of its own, and then joins the other.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raccgan.distributed import ranks
from raccgan.distributed.collectives import SINGLE, Collectives
from raccgan.errors import InputError
from raccgan.kernels.moments import moments
from raccgan.models.blocks import CBAM, BatchNorm, ConditionalBatchNorm, Coupling, couple

CPU = torch.device("cpu")
N, C = 6, 5


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) + 1


class Conditional(nn.Module):
    """The norm applied, as the convolution after it does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ConditionalBatchNorm(C, 4, "reference")

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm(x, x[:, :4].mean(dim=(2, 3)))
        return x * scale[:, :, None, None] + shift[:, :, None, None]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: BatchNorm(C, "reference"),
    "conditional batch norm": Conditional,
    "cbam": lambda: CBAM(C, "reference"),
}


def layer(make: Callable[[], nn.Module], job: Collectives) -> dict[str, Tensor]:
    """What a training step leaves: this rank's gradient of the job's mean loss, the weights' gradients, the buffers."""
    torch.manual_seed(0)
    module = make().double().train()
    if job.world > 1:
        couple(module, Coupling(job.world, job.shared_moments))
    x = job.own_rows(values(N, C, 4, 3)).clone().requires_grad_()
    weight = job.own_rows(values(N, C, 4, 3).flip(0).sin())  # a norm's sum alone has no gradient
    (module(x).tanh() * weight).mean().backward()
    job.average_gradients(module.parameters())
    assert x.grad is not None
    whole = torch.cat(job.exchanged(x.grad)) / job.world
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert gradients, "nothing has learned"
    return {"x": whole, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def second_order(job: Collectives) -> dict[str, Tensor]:
    """The gradient of a gradient through both moments."""
    x = job.own_rows(values(N, C, 3, 2)).clone().requires_grad_()
    mean, var = job.shared_moments(*moments(x, kernels="reference"))
    (gradient,) = torch.autograd.grad((mean.tanh() * var).sum() / job.world, x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    return {"x": torch.cat(job.exchanged(x.grad))}


def numbers(job: Collectives) -> dict[str, dict[str, Tensor]]:
    return {name: layer(make, job) for name, make in LAYERS.items()} | {"second order": second_order(job)}


def check_numbers(job: Collectives, wanted: dict[str, dict[str, Tensor]]) -> None:
    for name, got in numbers(job).items():
        assert got.keys() == wanted[name].keys()
        for key, value in got.items():
            expected = wanted[name][key].to(value)
            assert value.isfinite().all(), (name, key)
            assert torch.allclose(value, expected, rtol=1e-9, atol=1e-12), (name, key)


def check_messages(job: Collectives) -> None:
    assert job.exchanged(job.rank) == [0, 1]
    assert job.gathered("x") == (["x", "x"] if job.first else None)
    assert job.on_first(lambda: job.rank) == 0
    assert job.anywhere(job.rank == 1)
    assert not job.anywhere(False)
    assert job.averaged(torch.tensor([float(job.rank), 4.0])).tolist() == [0.5, 4.0]
    network = nn.Linear(2, 2)
    job.copy_from_first([network])
    assert job.exchanged(network.weight.tolist())[1] == network.weight.tolist()
    coupled = ConditionalBatchNorm(C, 4, "reference")
    couple(coupled, Coupling(job.world, job.shared_moments))
    copy.deepcopy(coupled)  # as an inference copy is made: the job has a thread, which cannot be copied
    job.require_alike("numbers", lambda: 3)
    refused = []
    for refuse in (lambda: job.on_first(no_file), lambda: job.require_alike("numbers", lambda: job.rank)):
        try:
            refuse()
        except InputError as error:
            refused.append(str(error))
    assert refused == [
        "no such file",
        "numbers of rank 1 differ from those of rank 0: every machine needs the same",
    ]


def no_file() -> None:
    raise InputError("no such file")


def main() -> None:
    torch.set_num_threads(1)
    wanted = numbers(SINGLE)
    job = ranks.join(CPU, 60)
    assert job.world == 2
    assert ranks.job() is job
    check_messages(job)
    check_numbers(job, wanted)
    ranks.leave()
    assert ranks.job() is SINGLE
    print("checked", file=sys.stderr)


if __name__ == "__main__":
    main()
