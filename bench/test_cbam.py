"""CBAM where the two published models have it: after generator blocks; after discriminator blocks by option."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.measure import Compare
from bench.peers import enter, op_case

QUICK = {
    "forward": ("G32.3 64 @32 b16", "G128.5 96 @128 b4"),
    "backward": ("G32.3 64 @32 b16", "G128.4 192 @64 b4"),
    "penalty": ("D32.2 128 @8 b16",),
}


PARAMETERS = [
    pytest.param(
        name, dtype, pass_, id=f"{name}-{dtype}-{pass_}",
        marks=() if name in QUICK[pass_] and dtype == torch.float32 else pytest.mark.full,
    )
    for pass_ in QUICK
    for name in layers.cases("cbam", pass_)
    for dtype in ((torch.float32, torch.bfloat16) if pass_ == "forward" else (torch.float32,))
]  # fmt: skip
assert all(set(QUICK[pass_]) <= layers.cases("cbam", pass_).keys() for pass_ in QUICK)


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_cbam(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    arguments = layers.cases("cbam", pass_)[name]
    case = op_case("cbam", name, arguments, dtype, pass_, device)
    measured(case, *enter(case, arguments))
