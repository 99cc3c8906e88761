"""Every kernel and configuration that CBAM ships in Triton, for tests that compile them without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam.triton import backward as back
from raccgan.kernels.cbam.triton import forward
from raccgan.kernels.cbam.triton.plan import ELEMENTS, ITEMS, SCORES, mlp_tile, sweep_tile, taps_tile
from raccgan.kernels.triton_runtime import Compilation

_SWEEPS = (forward.pool, forward.find_planes, forward.apply, back.find_flow, back.gather, back.apply_back)
_OTHERS: dict[str, dict[Any, tuple[str, ...]]] = {  # and what may be absent
    "mlp": {forward.find_gate: (), back.gate_back: ()},
    "scores": {forward.find_scores: ("partial",), back.score_back: ()},
    "items": {forward.join_moments: (), back.join_norm: ("grad_mean", "grad_var")},
}
_FLOATS = (
    "sums", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "gate", "pooled", "hidden", "planes",
    "spatial_weight", "scores", "partial", "mean", "var", "kept", "norm_weight", "norm_bias", "flow", "ties", "through",
    "grad_mean", "grad_var", "coefficients", "grad_norm", "grad_planes", "grad_logits", "grad_hidden", "grad_pooled",
    "tied",
)  # fmt: skip
_TYPES = {
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(("pixels", "width", "tiles", "items"), "i32"),
    **dict.fromkeys(("pixel_count", "count", "eps"), "fp32"),
}


def compilations() -> Iterator[Compilation]:
    """Sweeps in every configuration, dtype and layout; the rest for few and many channels, each norm once."""
    for config, dtype, (c, pixels, last) in product(ELEMENTS, runtime.DTYPES, ((96, 2**14, False), (128, 2**14, True))):
        typed = {**_TYPES, **dict.fromkeys(("x", "grad_y", "y", "grad_x"), runtime.pointer(dtype))}
        for kernel in _SWEEPS:
            constants = {"CHANNELS": c, "CHANNELS_LAST": last, "GROUPED": dtype == torch.float32}
            yield Compilation.of(kernel, sweep_tile(config, c, pixels, last), typed, constants)
    for c, hidden, k, grouped in ((96, 6, 7, True), (1536, 96, 3, False)):
        tiles = {"mlp": mlp_tile(c, hidden), "scores": SCORES, "items": ITEMS}
        sizes = {"CHANNELS": c, "HIDDEN": hidden, "KERNEL_SIZE": k, "GROUPED": grouped, "FIXED": not grouped}
        sizes |= SCORES.tile
        for name, kernels in _OTHERS.items():
            for kernel, absent in kernels.items():
                constants = sizes if grouped else sizes | dict.fromkeys(absent)
                constants = {n: value for n, value in constants.items() if n not in tiles[name].tile}
                yield Compilation.of(kernel, tiles[name], _TYPES, constants)
        yield Compilation.of(back.spatial_back, taps_tile(k), _TYPES, sizes)
