"""The anomaly score at the two published image sizes: reads much, computes little, so memory is its floor."""

from __future__ import annotations

import pytest
import torch

from bench.layers import MODELS, Arguments
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


def _arguments(size: int, batch: int, want_map: bool) -> Arguments:
    """Images and discriminator features as scoring has them."""
    model = MODELS[size]
    features = (model.config.widths[0], 4, 4)
    return {"shape": (batch, model.image_channels, size, size), "features": features, "want_map": want_map}


CASES = {
    f"{size}px b{batch}{' map' if want_map else ''}": _arguments(size, batch, want_map)
    for size in MODELS
    for batch in (1, 16, 64)
    for want_map in (False, True)
}
PARAMETERS = [
    pytest.param(
        name, dtype, pass_, id=f"{name}-{dtype}-{pass_}",
        marks=() if (name, dtype, pass_) in QUICK else pytest.mark.full,
    )
    for name in CASES
    for dtype in DTYPES
    for pass_ in ("forward", "backward", "penalty")
    # Half precision is for scoring; gradients go through the score in float32.
    if dtype == torch.float32 or pass_ == "forward"
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "pass_"), PARAMETERS)
def test_anomaly_score(measured: Compare, device: str, name: str, dtype: torch.dtype, pass_: str) -> None:
    case = op_case("anomaly_score", name, CASES[name], dtype, pass_, device)
    rows = measured(case, *enter(case, CASES[name]))
    if device == "cpu" and pass_ == "forward" and any(row.implementation == "native" for row in rows):
        # Eager writes and re-reads every squared difference; the kernel reads each tensor once and writes a number.
        assert fastest(rows, "native") <= fastest(rows, "reference")
