"""The pointwise half of the native backend: csrc/cpu/pointwise.

    P(x, w) + b + residual,    T(g, w),    the product of x and g over all pixels with g's sum: see :mod:`convolutions`

These three matrix products are closed under differentiation. Bias and residual are added before a result is written. In
bfloat16, weights stay float32: they are rounded as they are packed, and their gradient is not rounded.

Measured on a core of an AMD EPYC, from 256 pixels on: 230 to 260 GFLOP/s in float32 and 440 to 520 in bfloat16, of the
core's 255 and 530. PyTorch's convolution, which packs its operands at each call, and its matrix product took 1.1 to 4
times as long.

Where a library multiplies faster, the native backend takes the library's product: on a GPU, and on a CPU in the dtypes
of :data:`LIBRARY`. ``python -m raccgan.doctor`` prints these with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import library, torch_internals
from raccgan.kernels.autograd import inputs_of, register, save_inputs
from raccgan.kernels.depthwise_separable import convolutions
from raccgan.kernels.layout import empty_image, in_autocast_dtype


def _library() -> dict[torch.dtype, str]:
    build = library.build()
    if build is None or build["cpu_capability"] == "portable":
        return dict.fromkeys((torch.float32, torch.bfloat16), "the compiled ones need AVX2")
    if torch_internals.has_amx():
        return {torch.bfloat16: "oneDNN multiplies with this processor's AMX tiles, the compiled ones do not"}
    if build["cpu_capability"] != "avx512bf16":
        return {torch.bfloat16: "the compiled ones need AVX512-BF16"}
    return {}


# In which dtypes a CPU's products are PyTorch's here, and why; and in which the compiled ones. Settled once, at import,
# so that torch.compile sees constants.
LIBRARY = _library()
DTYPES = tuple(dtype for dtype in (torch.float32, torch.bfloat16) if dtype not in LIBRARY)


def product(
    x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """P(x, w) + b + residual, channels_last; by PyTorch where x is on no CPU, or its dtype not in :data:`DTYPES`.

    x is read in place where it is channels_last, copied otherwise. The same bits whatever the number of threads, like
    all gradients; another processor may round differently.
    """
    x = in_autocast_dtype(x)
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return convolutions.pointwise(x, w, b, residual)
    inside = residual if residual is not None and residual.dtype == x.dtype else None
    y: Tensor = torch.ops.raccgan.pointwise_native(x, w.float(), None if b is None else b.float(), inside, packed)
    return y if residual is None or inside is not None else y + residual


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> Tensor:
    return product(x, weight, bias, None, packed)


def packed(w: Tensor, dtype: torch.dtype) -> Tensor | None:
    """w [D, C, 1, 1] as :func:`product` reads it for images of ``dtype``, with a label, or None; other calls read w."""
    if w.device.type != "cpu" or dtype not in DTYPES:
        return None
    return torch.ops.raccgan.pointwise_native_packed(w.detach().float(), dtype == torch.bfloat16)


def _backward(ctx: Any, needs: Sequence[bool], g: Tensor) -> tuple[Tensor | None, ...]:
    x, w = inputs_of(ctx)
    of_x = torch.ops.raccgan.pointwise_native_transposed(g, w) if needs[0] else None
    of_w = of_b = None
    if needs[1] or needs[2]:
        of_w, of_b = torch.ops.raccgan.pointwise_native_product(x, g, needs[2])
    return of_x, of_w, of_b, g


def _transposed_backward(ctx: Any, needs: Sequence[bool], t: Tensor) -> tuple[Tensor | None, ...]:
    g, w = inputs_of(ctx)
    of_g = torch.ops.raccgan.pointwise_native(t, w, None, None) if needs[0] else None
    return of_g, torch.ops.raccgan.pointwise_native_product(t, g, False)[0] if needs[1] else None


def _product_shape(x: Tensor, g: Tensor, needs_sums: bool) -> tuple[Tensor, Tensor]:
    w = x.new_empty((g.shape[1], x.shape[1], 1, 1), dtype=torch.float32)
    return w, w.new_empty(g.shape[1] if needs_sums else 0)


def _product_backward(ctx: Any, needs: Sequence[bool], v: Tensor, s: Tensor) -> tuple[Tensor | None, ...]:
    x, g, needs_sums = inputs_of(ctx)
    of_x = torch.ops.raccgan.pointwise_native_transposed(g, v) if needs[0] else None
    return of_x, torch.ops.raccgan.pointwise_native(x, v, s if needs_sums else None, None) if needs[1] else None


if library.load():
    register(
        "raccgan::pointwise_native",
        lambda x, w, *_: empty_image(x, w.shape[0], *x.shape[2:]),
        _backward,
        lambda ctx, inputs, output: save_inputs(ctx, inputs[:2]),
    )
    register(
        "raccgan::pointwise_native_transposed",
        lambda g, w: empty_image(g, w.shape[1], *g.shape[2:]),
        _transposed_backward,
    )
    save_product = partial(save_inputs, materialize=True)
    register("raccgan::pointwise_native_product", _product_shape, _product_backward, save_product)
    torch.library.register_fake("raccgan::pointwise_native_packed")(  # of weights without gradients
        lambda w, _: w.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)
    )
