"""CBAM where the two published models have it: after generator blocks; after discriminator blocks by option."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.layers import MODELS, Arguments
from bench.measure import Compare
from bench.peers import enter, op_case

# A pass has the norm that it has in the networks: running moments to score, the batch's to train the generator, an
# instance's in a critic under the penalty.
NORMS = {"forward": "fixed", "backward": "batch", "penalty": "instance"}
QUICK = {
    "forward": ("G32.3 64 @32 b16", "G128.5 96 @128 b4"),
    "backward": ("G32.3 64 @32 b16", "G128.4 192 @64 b4"),
    "penalty": ("D32.2 128 @8 b16",),
}


def _cases(pass_: str) -> dict[str, Arguments]:
    return {
        layer.case(batch): layer.at(batch)
        for model in MODELS.values()
        for layer in layers.attention(model.config, NORMS[pass_])
        for batch in model.batches
    }


CASES = {pass_: _cases(pass_) for pass_ in NORMS}
PARAMETERS = [
    pytest.param(
        name, dtype, pass_, id=f"{name}-{dtype}-{pass_}",
        marks=() if name in QUICK[pass_] and dtype == torch.float32 else pytest.mark.full,
    )
    for pass_, cases in CASES.items()
    for name in cases
    for dtype in ((torch.float32, torch.bfloat16) if pass_ == "forward" else (torch.float32,))
]  # fmt: skip
assert all(set(QUICK[pass_]) <= CASES[pass_].keys() for pass_ in QUICK)


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_cbam(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    arguments = CASES[pass_][name]
    case = op_case("cbam", name, arguments, dtype, pass_, device)
    measured(case, *enter(case, arguments))
