"""The triton backend of the anomaly score. It reads each tensor once forward, and once for the gradient.

A program writes the sum of one tile; a second launch adds the sums of a sample in a fixed order. The kernels have not
run on a GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.anomaly_score.gradients import ScoreGrads, ScoreTensors, gradients, output_shapes
from raccgan.kernels.anomaly_score.triton import launch
from raccgan.kernels.autograd import define, differentiate, needs_grad

_TENSORS = len(ScoreTensors._fields)
_GRADS = len(ScoreGrads._fields)


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual [N], feature [N] (zeros without f) and map [N, H, W] ([0] unless wanted), all float32.

    Images are read in place where both are NCHW or both channels_last, copied otherwise. A sample's bits depend on the
    sample and its memory order, not on the batch.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.raccgan.anomaly_score_triton(x, x_hat, f, f_hat, want_map)
    return outputs


def _backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    tensors, needed = launch.all_alike(*inputs[:_TENSORS]), inputs[_TENSORS + _GRADS :]
    return tuple(
        torch.empty_like(t) if t is not None and need else inputs[0].new_empty(0)
        for t, need in zip(tensors, needed, strict=True)
    )


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.set_materialize_grads(False)


def _of_forward(
    ctx: Any, grad_residual: Tensor | None, grad_feature: Tensor | None, grad_map: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if grad_map is not None and grad_map.dim() == 1:
        grad_map = None  # of a map that was not wanted
    comes = (grad_residual is not None or grad_map is not None, grad_feature is not None and tensors[2] is not None)
    needed = [comes[i // 2] and needs_grad(ctx, i, tensors) for i in range(_TENSORS)]
    if not any(needed):
        return (None,) * (_TENSORS + 1)
    found = torch.ops.raccgan.anomaly_score_triton_backward(*tensors, grad_residual, grad_feature, grad_map, *needed)
    return *(grad if need else None for grad, need in zip(found, needed, strict=True)), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + _GRADS])
    ctx.set_materialize_grads(False)
    ctx.needed = inputs[_TENSORS + _GRADS :]


def _of_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    through = [grad if computed else None for grad, computed in zip(grad_grads, ctx.needed, strict=True)]
    needed = [needs_grad(ctx, i, ctx.saved_tensors) for i in range(_TENSORS + _GRADS)]
    return *differentiate(_gradients, ctx.saved_tensors, through, needed), *(None,) * _TENSORS


def _gradients(*inputs: Any) -> ScoreTensors:
    x, x_hat, f, f_hat, *grads = inputs
    return gradients(x, x_hat, f, f_hat, ScoreGrads(*grads))


@define(
    "anomaly_score_triton(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool want_map) -> (Tensor, Tensor, Tensor)",
    output_shapes,
    _of_forward,
    _save_forward,
)
def _forward(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    residual, feature, to_map = output_shapes(x, x_hat, f, f_hat, want_map)
    launch.forward_pass(launch.all_alike(x, x_hat, f, f_hat), residual, feature, to_map if want_map else None)
    return residual, feature, to_map


@define(
    "anomaly_score_triton_backward(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, Tensor? grad_residual, "
    "Tensor? grad_feature, Tensor? grad_map, bool needs_x, bool needs_x_hat, bool needs_f, bool needs_f_hat)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shapes,
    _of_backward,
    _save_backward,
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found = _backward_shapes(*inputs)
    needed = inputs[_TENSORS + _GRADS :]
    launch.backward_pass(
        launch.all_alike(*inputs[:_TENSORS]),
        ScoreGrads(*inputs[_TENSORS : _TENSORS + _GRADS]),
        ScoreTensors(*(grad if need else None for grad, need in zip(found, needed, strict=True))),
    )
    return found
