"""The anomaly score in compiled code: C++ on a CPU, CUDA C++ on a GPU. One read of each tensor.

    residual[n] = mean over c,h,w of d^2    map[n, h, w] = mean over c of d^2    with d = x - x_hat
    dL/dx       = 2 d (g_residual / CHW + g_map / C) = -dL/dx_hat,    f and f_hat likewise

The kernel is the forward pass. Its backward is written in PyTorch's own differentiable operations, so gradients of
every order follow from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import dispatch, library
from raccgan.kernels.autograd import register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NAME = "raccgan::anomaly_score_native"
# Settled once, at import, so that torch.compile sees constants.
_MISSING = library.why_not()


def supports(call: dispatch.Call) -> str | None:
    """Why the compiled kernels cannot serve ``call``, in one line; ``None`` where they can."""
    if call.dtype not in DTYPES:
        return f"the compiled kernels add in float32 and do not take {call.dtype}"
    return dispatch.compiled_on(call, "anomaly score")


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

    Gradients: every order, for all four tensors.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not match, or no compiled kernel (see :func:`supports`).
    """
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.raccgan.anomaly_score_native(x, x_hat, f, f_hat, want_map)
    return outputs


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _shapes(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return empty(n), empty(n), empty(n, h, w) if want_map else empty(0)


def _save(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, x_hat, f, f_hat, _ = inputs
    ctx.save_for_backward(x, x_hat, *(t for t in (f, f_hat) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: _Context, g_residual: Tensor | None, g_feature: Tensor | None, g_map: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, x_hat, *features = ctx.saved_tensors
    need = ctx.needs_input_grad
    n, c, h, w = x.shape
    weight: Tensor | None = None  # [N, 1, H, W] or [N, 1, 1, 1]
    if g_residual is not None:
        weight = (g_residual / (c * h * w)).view(n, 1, 1, 1)
    if g_map is not None and g_map.dim() == 3:
        per_pixel = (g_map / c).unsqueeze(1)
        weight = per_pixel if weight is None else weight + per_pixel
    g_x, g_x_hat = _gradients(x, x_hat, weight, need[0], need[1])
    if not features or g_feature is None:
        return g_x, g_x_hat, None, None, None
    f, f_hat = features
    size = f[0].numel() if n else 0
    weight = (g_feature / size).view(n, *(1 for _ in f.shape[1:]))
    return g_x, g_x_hat, *_gradients(f, f_hat, weight, need[2], need[3]), None


def _gradients(
    a: Tensor, b: Tensor, weight: Tensor | None, need_a: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of sum(weight * (a - b)^2) for a and b, computed in float32, each in its tensor's dtype."""
    if weight is None or not (need_a or need_b):
        return None, None
    g = 2 * weight * (a.float() - b.float())
    return g.to(a.dtype) if need_a else None, -g.to(b.dtype) if need_b else None


if _MISSING is None:
    register(_NAME, _shapes, _backward, _save)
