"""The depthwise-separable convolution at the layers of the two published models."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.measure import Compare
from bench.peers import NO_KERNEL, enter, op_case
from bench.results import fastest

# Representative: each network, both sizes, both places in a block, the image's own few channels and the wide end.
QUICK = {
    "forward": (
        "G32.2a 256-128 @8 b16", "G32.2b 128-128 @16 b16", "D32.2a 64-128 @16 b16", "D32.3b 256-256 @8 b16",
        "D32.1a 1-64 @32 b16", "G128.4a 384-192 @32 b4", "D128.2a 96-192 @64 b4",
    ),
    "backward": ("G32.2a 256-128 @8 b16", "G32.2b 128-128 @16 b16", "D32.3b 256-256 @8 b16", "G128.4a 384-192 @32 b4"),
    "penalty": ("D32.2a 64-128 @16 b16", "D32.3b 256-256 @8 b16", "D32.2s 64-128 @16 b16", "D128.2a 96-192 @64 b4"),
}  # fmt: skip
QUICK_BFLOAT16 = {"forward": ("G32.2b 128-128 @16 b16",), "backward": (), "penalty": ()}


def _parameters() -> list[object]:
    rows: list[object] = []
    for dtype, quick in ((torch.float32, QUICK), (torch.bfloat16, QUICK_BFLOAT16)):
        for pass_ in quick:
            cases = layers.cases("depthwise_separable", pass_)
            assert set(quick[pass_]) <= cases.keys()
            for name in cases:
                marks = () if name in quick[pass_] else pytest.mark.full
                rows.append(pytest.param(name, dtype, pass_, id=f"{name}-{dtype}-{pass_}", marks=marks))
    return rows


@pytest.mark.parametrize(("name", "dtype", "pass_"), _parameters())
def test_depthwise_separable(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    arguments = layers.cases("depthwise_separable", pass_)[name]
    case = op_case("depthwise_separable", name, arguments, dtype, pass_, device)
    rows = measured(case, *enter(case, arguments))
    if pass_ == "penalty" and dtype == torch.float32 and name in QUICK[pass_] and arguments["shape"][1] == 256:
        # Eager's double backward of a depthwise convolution is one small convolution a channel; the closed family's
        # is a handful at any width.
        assert 1.3 * fastest(rows, "pytorch" + NO_KERNEL) <= fastest(rows, "reference")
