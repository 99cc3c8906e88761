"""The native backend of the anomaly score: C++ on a CPU, CUDA C++ on a GPU. It reads each tensor once.

The forward pass is a kernel. Gradients of every order are PyTorch's operations: :func:`.reference.gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.anomaly_score.reference import Tensors, gradients, output_shapes
from raccgan.kernels.autograd import inputs_of, register


def supports(call: dispatch.Call) -> str | None:
    return dispatch.compiled(call, "anomaly score", "cuda")  # a CPU's too, as nothing is written in float16


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.reference.anomaly_score`, in float32.

    Images are read in place where each is dense and both are NCHW or both channels_last, features where both have the
    same dense strides; else copied. A sample's bits depend on the sample and the memory order of its features alone:
    not on the batch, the threads, the processor or ``want_map``.
    """
    return torch.ops.raccgan.anomaly_score_native(x, x_hat, f, f_hat, want_map)


def _backward(ctx: Any, needs: Sequence[bool], *grads: Tensor | None) -> Tensors:
    return gradients(inputs_of(ctx)[:4], grads, needs)


if library.load():
    register("raccgan::anomaly_score_native", output_shapes, _backward)
