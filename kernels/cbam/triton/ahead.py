"""Every kernel that CBAM ships in Triton, in its configurations, for tests that compile them without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam.autograd import BackwardArguments, CbamNeeds, CbamTensors, backward_shapes, forward_shapes
from raccgan.kernels.cbam.triton import launch
from raccgan.kernels.triton_runtime import Compilation, meta

# Channels, of the hidden layer, kernel size, height and width, channels_last: few and many, and each sweep's tiles.
_LAYERS = ((96, 6, 7, 128, False), (128, 6, 7, 128, True), (4, 2, 7, 64, False), (8, 2, 7, 128, True))
_MANY = (1536, 96, 3, 32, True)


def compilations() -> Iterator[Compilation]:
    """Sweeps in every dtype and layout, the rest for few and many channels, with each norm."""
    with runtime.noted() as found:
        for dtype, layer in product(runtime.DTYPES, _LAYERS):
            _both_passes(dtype, *layer, kind="instance" if dtype == torch.float32 else "batch")
        _both_passes(torch.float32, *_MANY, kind="fixed")
    return iter(found)


def _both_passes(dtype: torch.dtype, c: int, hidden: int, k: int, size: int, last: bool, *, kind: str) -> None:
    floats = partial(meta, torch.float32)
    moments = floats(1) if kind == "fixed" else None
    mlp = floats(hidden, c), floats(hidden), floats(c, hidden), floats(c)
    x = meta(dtype, 2, c, size, size, last=last)
    tensors = CbamTensors(x, *mlp, floats(1, 2, k, k), floats(1), floats(1), moments, moments)
    given = (*tensors, kind == "batch", 1e-5)
    outputs = launch.Forward(*forward_shapes(launch.like, launch.saved, *given))
    launch.forward_pass(tensors, *given[-2:], outputs)
    grad = None if kind == "fixed" else outputs.mean
    arguments = (x, grad, grad, *given, outputs.saved, *CbamNeeds(*5 * (True,)))
    found = CbamTensors(*backward_shapes(launch.like, *arguments))
    launch.backward_pass(BackwardArguments.of(arguments), found)
