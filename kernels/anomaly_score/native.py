"""The anomaly score in compiled code: C++ on a CPU, CUDA C++ on a GPU. One read of each tensor.

    residual[n] = mean over c,h,w of d^2    map[n, h, w] = mean over c of d^2    with d = x - x_hat

The kernel is the forward pass. Its backward is written in PyTorch's own differentiable operations (:mod:`.gradients`),
so gradients of every order follow from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import dispatch, library
from raccgan.kernels.anomaly_score.gradients import ScoreGrads, gradients, output_shapes
from raccgan.kernels.autograd import register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(call: dispatch.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    reason = dispatch.compiled_on(call, "anomaly score")
    if reason is None and call.dtype not in DTYPES:
        reason = f"the compiled anomaly score adds in float32 and does not take {call.dtype}"
    return reason


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in :func:`raccgan.kernels.anomaly_score.anomaly_score`; the map is empty, [0], unless wanted.

    Args:
        x, x_hat: [N, C, H, W] of one dtype of :data:`DTYPES`, any strides. Read in place where every image is dense
            and both are NCHW or both channels_last; copied otherwise.
        f, f_hat: [N, ...] of one dtype, both or neither. Read in place where both have the same dense strides.
        want_map: also return the map.

    Returns:
        residual [N], feature [N] (zeros without f) and map [N, H, W], all float32. A sample's bits depend on the sample
        and the memory order of its features alone: not on the batch, the threads, the processor or ``want_map``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not match.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.raccgan.anomaly_score_native(x, x_hat, f, f_hat, want_map)
    return outputs


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _save(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _backward(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return *gradients(*ctx.saved_tensors, ScoreGrads(*grads), ctx.needs_input_grad[:4]), None


if library.load():
    register("raccgan::anomaly_score_native", output_shapes, _backward, _save)
