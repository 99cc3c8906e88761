"""The triton backend of the anomaly score. It reads each tensor once forward, and once for the gradient.

A program writes the sum of one tile; a second launch adds the sums of a sample in a fixed order. The kernels have not
run on a GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels.anomaly_score.gradients import ScoreGrads, ScoreTensors, gradients, output_shapes
from raccgan.kernels.anomaly_score.triton import launch
from raccgan.kernels.autograd import define, differentiate, inputs_of

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


def _of_forward(
    ctx: Any, needs: Sequence[bool], grad_residual: Tensor | None, grad_feature: Tensor | None, grad_map: Tensor | None
) -> Sequence[Tensor | None]:
    *tensors, want_map = inputs_of(ctx)
    grad_map = grad_map if want_map else None
    images, features = grad_residual is not None or grad_map is not None, grad_feature is not None
    comes = [need and there for need, there in zip(needs, (images, images, features, features, False), strict=True)]
    if not any(comes):
        return ()
    grads = torch.ops.raccgan.anomaly_score_triton_backward(
        *tensors, grad_residual, grad_feature, grad_map, *comes[:_TENSORS]
    )
    return [grad if there else None for grad, there in zip(grads, comes, strict=False)]


def _of_backward(ctx: Any, needs: Sequence[bool], *grad_grads: Tensor | None) -> list[Tensor | None]:
    given = _TENSORS + _GRADS
    inputs = inputs_of(ctx)
    through = [grad if computed else None for grad, computed in zip(grad_grads, inputs[given:], strict=True)]
    return differentiate(_gradients, inputs[:given], through, needs[:given])


def _gradients(*inputs: Any) -> ScoreTensors:
    return gradients(*inputs[:_TENSORS], ScoreGrads(*inputs[_TENSORS:]))


@define(
    "anomaly_score_triton(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool want_map) -> (Tensor, Tensor, Tensor)",
    output_shapes,
    _of_forward,
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
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found = _backward_shapes(*inputs)
    wanted = (grad if need else None for grad, need in zip(found, inputs[_TENSORS + _GRADS :], strict=True))
    tensors, grads = launch.all_alike(*inputs[:_TENSORS]), ScoreGrads(*inputs[_TENSORS : _TENSORS + _GRADS])
    launch.backward_pass(tensors, grads, ScoreTensors(*wanted))
    return found
