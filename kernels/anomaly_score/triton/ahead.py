"""Every kernel and configuration that the anomaly score ships in Triton, for tests that compile them without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.anomaly_score.triton.kernels import find_gradients, find_means, sum_squares
from raccgan.kernels.anomaly_score.triton.launch import ELEMENTS, FINISH, tile_of
from raccgan.kernels.triton_runtime import Compilation

_TYPES = {
    **dict.fromkeys(("pixels", "features", "image_tiles", "feature_tiles"), "i32"),
    **dict.fromkeys(("image_size", "feature_size"), "fp32"),
    **dict.fromkeys(("partial", "to_map", "grad_residual", "grad_feature", "grad_map", "residual", "feature"), "*fp32"),
}
_TENSORS = ("x", "x_hat", "f", "f_hat", "grad_x", "grad_x_hat", "grad_f", "grad_f_hat")
_NO_FEATURES = dict.fromkeys(("f", "f_hat", "grad_f", "grad_f_hat", "feature"))
"""Absent without features. A gradient of the feature term may come all the same: the op returns that term, as zeros."""
_LEAST = {**_NO_FEATURES, **dict.fromkeys(("to_map", "grad_feature", "grad_map", "grad_x_hat"))}


def compilations() -> Iterator[Compilation]:
    """Every configuration in every dtype and layout; for one of each also without features, and with the least."""
    for (i, config), dtype, (c, last) in product(enumerate(ELEMENTS), runtime.DTYPES, ((1, False), (3, True))):
        types = {**_TYPES, **dict.fromkeys(_TENSORS, runtime.pointer(dtype))}
        for kernel, absent in product((sum_squares, find_gradients), ({}, _NO_FEATURES, _LEAST) if i == 0 else ({},)):
            constants = {"CHANNELS": c, "CHANNELS_LAST": last, **absent}
            yield Compilation.of(kernel, tile_of(config, c, last), types, constants)
    yield Compilation.of(find_means, FINISH, _TYPES, {})
    yield Compilation.of(find_means, FINISH, _TYPES, _LEAST)
