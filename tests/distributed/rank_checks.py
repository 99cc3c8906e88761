"""What two ranks compute together, against one process: run by test_ranks.py.

Each rank computes on the whole batch first, as the process of its own that it still is, and then joins the other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raccgan.distributed import collectives, ranks
from raccgan.errors import InputError
from raccgan.kernels.moments import moments
from raccgan.models.blocks import CBAM, BatchNorm, ConditionalBatchNorm

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


def layer(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """What a training step leaves: this rank's gradient of the job's mean loss, the weights' gradients, the buffers."""
    torch.manual_seed(0)
    module = make().double().train()
    x = collectives.own_rows(values(N, C, 4, 3)).clone().requires_grad_()
    weight = collectives.own_rows(values(N, C, 4, 3).flip(0).sin())  # a norm's sum alone has no gradient
    (module(x).tanh() * weight).mean().backward()
    collectives.average_gradients(list(module.parameters()))
    assert x.grad is not None
    whole = torch.cat(ranks.exchanged(x.grad)) / ranks.world()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert gradients, "nothing has learned"
    return {"x": whole, **gradients, **{name: b.clone() for name, b in module.named_buffers()}}


def second_order() -> dict[str, Tensor]:
    """The gradient of a gradient through both moments."""
    x = collectives.own_rows(values(N, C, 3, 2)).clone().requires_grad_()
    mean, var = collectives.shared_moments(*moments(x, kernels="reference"))
    (gradient,) = torch.autograd.grad((mean.tanh() * var).sum() / ranks.world(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad is not None
    return {"x": torch.cat(ranks.exchanged(x.grad))}


def check_numbers(wanted: dict[str, dict[str, Tensor]]) -> None:
    for name, expected in wanted.items():
        got = second_order() if name == "second order" else layer(LAYERS[name])
        assert got.keys() == expected.keys()
        for key, value in got.items():
            assert value.isfinite().all(), (name, key)
            assert torch.allclose(value, expected[key].to(value), rtol=1e-9, atol=1e-12), (name, key)


def check_messages() -> None:
    assert ranks.exchanged(ranks.rank()) == [0, 1]
    assert ranks.gathered("x") == (["x", "x"] if ranks.first() else None)
    assert ranks.on_first(lambda: ranks.rank()) == 0
    assert collectives.anywhere(ranks.rank() == 1)
    assert not collectives.anywhere(False)
    assert collectives.averaged(torch.tensor([float(ranks.rank()), 4.0])).tolist() == [0.5, 4.0]
    network = nn.Linear(2, 2)
    collectives.copy_from_first([network])
    assert ranks.exchanged(network.weight.tolist())[1] == network.weight.tolist()
    ranks.require_alike("numbers", lambda: 3)
    refused = []
    for refuse in (lambda: ranks.on_first(no_file), lambda: ranks.require_alike("numbers", ranks.rank)):
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
    wanted = {name: layer(make) for name, make in LAYERS.items()} | {"second order": second_order()}
    ranks.join(CPU, 60)
    assert ranks.world() == 2
    check_messages()
    check_numbers(wanted)
    ranks.leave()
    assert ranks.world() == 1
    print("checked", file=sys.stderr)


if __name__ == "__main__":
    main()
