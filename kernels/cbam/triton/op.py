"""CBAM in Triton: three sweeps over x forward, three backward, of which the last writes.

The kernels are the forward pass (:mod:`.forward`) and its gradients (:mod:`.backward`); :mod:`.launch` launches them.
Gradients of these gradients are the reference's: CBAM stands in a critic, where they are needed, by option only. Not
run on a GPU yet: the tests run their PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch
from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import TENSORS, BackwardArguments, CbamNeeds, CbamTensors
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights
from raccgan.kernels.cbam.triton import launch


def supports(call: dispatch.Call) -> str | None:
    """Why the Triton kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return runtime.supports(call)


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and var, as of :func:`raccgan.kernels.cbam.cbam`.

    Args:
        x: float32, bfloat16 or float16; read in place where it is NCHW or channels_last, copied otherwise.
        weights, norm: of any floating dtype; used as float32.

    Returns:
        y in x's dtype and memory format, with or without autocast. The same bits in every run, like all gradients.
    """
    y, own_mean, own_var, _ = torch.ops.raccgan.cbam_triton(
        x, *weights, norm.mean, norm.var, norm.kind == "batch", norm.eps
    )
    return y, own_mean if norm.mean is None else norm.mean, own_var if norm.var is None else norm.var


# ---- the registered ops --------------------------------------------------------------------------------------------

_INPUTS = ", ".join(
    [
        *(f"Tensor{'?' if name in ('mean', 'var') else ''} {name}" for name in CbamTensors._fields),
        "bool batch, float eps",
    ]
)
_NEEDS = ", ".join(f"bool needs_{name}" for name in CbamNeeds._fields)
_GRADS = ", ".join(f"Tensor {name}" for name in CbamTensors._fields)


@torch.library.custom_op(
    "raccgan::cbam_triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)"
)
def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    outputs = _forward_shapes(*inputs)
    batch, eps = inputs[TENSORS:]
    launch.forward_pass(launch.contiguous(CbamTensors(*inputs[:TENSORS])), batch, eps, launch.Forward(*outputs))
    return outputs


def _forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, batch = CbamTensors(*inputs[:TENSORS]), inputs[TENSORS]
    groups = 0 if tensors.mean is not None else 1 if batch else tensors.x.shape[0]
    saved = sum(launch.saved_sizes(tensors.x, tensors.reduce_weight.shape[0], groups))
    return autograd.forward_shapes(tensors, batch, _like, saved)


@torch.library.custom_op(
    "raccgan::cbam_triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, {_INPUTS}, Tensor saved, {_NEEDS}) -> ({_GRADS})",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found = _backward_shapes(*inputs)
    launch.backward_pass(BackwardArguments.of(inputs), CbamTensors(*found))
    return found


def _backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    return autograd.backward_shapes(BackwardArguments.of(inputs), _like)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(launch.in_order(x))


autograd.register("cbam_triton", _forward_shapes, _backward_shapes)
