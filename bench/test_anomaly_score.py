"""The anomaly score at the two published image sizes: reads much, computes little, so memory is its floor."""

from __future__ import annotations

import pytest
import torch

from bench import layers
from bench.measure import Compare
from bench.peers import enter, op_case
from bench.results import fastest

DTYPES = (torch.float32, torch.bfloat16)
QUICK = {
    ("32px b64", torch.float32, "forward"),
    ("128px b16", torch.float32, "forward"),
    ("128px b16 map", torch.float32, "forward"),
    ("128px b16 map", torch.bfloat16, "forward"),
    ("128px b16 map", torch.float32, "backward"),
}
PARAMETERS = [
    pytest.param(
        name, dtype, pass_, id=f"{name}-{dtype}-{pass_}",
        marks=() if (name, dtype, pass_) in QUICK else pytest.mark.full,
    )
    for pass_ in ("forward", "backward", "penalty")
    for name in layers.cases("anomaly_score", pass_)
    for dtype in DTYPES
    # Half precision is for scoring; gradients go through the score in float32.
    if dtype == torch.float32 or pass_ == "forward"
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_anomaly_score(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    arguments = layers.cases("anomaly_score", pass_)[name]
    case = op_case("anomaly_score", name, arguments, dtype, pass_, device)
    rows = measured(case, *enter(case, arguments))
    if device == "cpu" and pass_ == "forward" and any(row.implementation == "native" for row in rows):
        # Eager writes and re-reads every squared difference; the kernel reads each tensor once and writes a number.
        assert fastest(rows, "native") <= fastest(rows, "reference")
