"""The triton backend of CBAM.

The forward pass (:mod:`.forward`) sweeps over x three times. So does the backward pass (:mod:`.backward`), whose last
sweep writes. :mod:`.launch` launches the kernels. The reference computes gradients of these gradients, which only a
CBAM in the discriminator needs, and which is an option. The kernels have not run on a GPU yet: the tests execute their
PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import TENSORS, BackwardArguments, CbamNeeds, CbamTensors
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights
from raccgan.kernels.cbam.triton import launch
from raccgan.kernels.triton_runtime import Compilation, empty_in_order, meta


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`raccgan.kernels.cbam.cbam`. x is read in place where it is NCHW or channels_last, copied otherwise.

    The same bits in every run, like all gradients.
    """
    return autograd.run(torch.ops.raccgan.cbam_triton, x, weights, norm)


_TENSORS = ", ".join(f"Tensor{'?' if name in ('mean', 'var') else ''} {name}" for name in CbamTensors._fields)
_INPUTS = f"{_TENSORS}, bool batch, float eps"
_NEEDS = ", ".join(f"bool needs_{name}" for name in CbamNeeds._fields)
_GRADS = ", ".join(f"Tensor {name}" for name in CbamTensors._fields)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = autograd.forward_shapes(empty_in_order, launch.saved_size, *inputs)
    launch.forward_pass(CbamTensors(*inputs[:TENSORS]), *inputs[TENSORS:], *outputs)
    return outputs


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found = autograd.backward_shapes(empty_in_order, *inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        launch.backward_pass(BackwardArguments.of(inputs), found)
    return found


_OPS = [
    torch.library.custom_op(f"raccgan::cbam_triton{name}", run, mutates_args=(), schema=schema)
    for name, run, schema in (
        ("", _forward, f"({_INPUTS}) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)"),
        (
            "_backward",
            _backward,
            f"(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, {_INPUTS}, Tensor saved, {_NEEDS}) -> ({_GRADS})",
        ),
    )
]
autograd.register_both("cbam_triton", empty_in_order, launch.saved_size)

# Channels, of the hidden layer, kernel size, height and width, channels_last: few and many, and each sweep's tiles.
_LAYERS = ((96, 6, 7, 128, False), (128, 6, 7, 128, True), (4, 2, 7, 64, False), (8, 2, 7, 128, True))
_MANY = (1536, 96, 3, 32, True)


def compilations() -> Iterator[Compilation]:
    """For tests without a GPU: sweeps in every dtype and layout, the rest for few and many channels, with each norm."""
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
    _, mean, _, saved = _forward(*given)
    grad = None if kind == "fixed" else mean
    arguments = (x, grad, grad, *given, saved, *CbamNeeds(*5 * (True,)))
    launch.backward_pass(BackwardArguments.of(arguments), autograd.backward_shapes(empty_in_order, *arguments))
