"""The moments of a batch norm, at the tensors that the generators of the two published models normalise."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.measure import Compare
from bench.peers import enter, op_case

QUICK = {
    ("G32.2b 128 @16 b16", torch.float32, "forward"),
    ("G32.2b 128 @16 b16", torch.bfloat16, "forward"),
    ("G32.2b 128 @16 b16", torch.float32, "backward"),
    ("G128.5a 192 @64 b4", torch.float32, "backward"),
}
PARAMETERS = [
    pytest.param(
        name, dtype, pass_, id=f"{name}-{dtype}-{pass_}",
        marks=() if (name, dtype, pass_) in QUICK else pytest.mark.full,
    )
    for pass_ in ("forward", "backward")
    for name in layers.cases("moments", pass_)
    for dtype in (torch.float32, torch.bfloat16)
    # What flows back to the moments is float32, whatever x is.
    if dtype == torch.float32 or pass_ == "forward"
]  # fmt: skip
assert all(name in layers.cases("moments", pass_) for name, _, pass_ in QUICK)


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_moments(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    arguments = layers.cases("moments", pass_)[name]
    case = op_case("moments", name, arguments, dtype, pass_, device)
    measured(case, *enter(case, arguments))
