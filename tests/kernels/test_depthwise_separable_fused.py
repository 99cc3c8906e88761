"""The compiled kernel of a whole depthwise-separable convolution: on a GPU, or emulated (test_cuda_emulation.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import native_fused, reference
from tests.kernels.grid import assert_close, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE not in native_fused.DEVICES, reason=f"there is no fused kernel for {DEVICE} here"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESIZINGS = ((1, 1), (2, 1), (1, 2))
# Batch, channels, height, width and output channels: one pixel; a tile and its neighbours; chunks of channels, whole
# and not; two blocks of output channels, the second one part of a tile of columns.
SHAPES = ((1, 1, 1, 1, 1), (2, 3, 9, 18, 5), (1, 40, 4, 6, 17), (1, 64, 3, 5, 128), (1, 8, 2, 2, 137))
AROUND = (
    {},
    {"activation": "relu"},
    {"norm": "instance", "activation": "relu"},
    {"preactivation": "relu", "norm": "instance", "activation": "relu"},
)


def made(
    n: int, c: int, h: int, v: int, d: int, k: int, upsample: int = 1, pool: int = 1, *, bare: bool = False
) -> list[Tensor | None]:
    """The seven tensors of :func:`native_fused.fused` in float64; without the optional ones where ``bare``."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE)

    optional = [
        normal(d),
        1 + normal(n, c) / 4,
        normal(n, c) / 4,
        normal(n, d, h * upsample // pool, v * upsample // pool),
    ]
    x = normal(n, c, h, v).contiguous(memory_format=torch.channels_last)
    return [x, normal(c, 1, k, k) / k, normal(d, c) / c**0.5, *([None] * 4 if bare else optional)]


def placed(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """In ``dtype``, but for the bias, which the kernel takes in float32."""
    at_least = torch.promote_types(dtype, torch.float32)
    return [None if t is None else t.to(at_least if i == 3 else dtype) for i, t in enumerate(tensors)]


def definition(
    x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, upsample: int = 1, pool: int = 1, **around: str,
) -> Tensor:  # fmt: skip
    """What the kernel computes, as the reference does."""
    pre, norm, act = (around.get(name, "none") for name in ("preactivation", "norm", "activation"))
    bias = None if bias is None else bias.to(x.dtype)
    return reference.depthwise_separable(
        x, w, None, pointwise[:, :, None, None], bias, pre, norm, 1e-5, scale, shift, act, upsample, pool, residual
    )


def check(tensors: list[Tensor | None], dtype: torch.dtype, *options: Any, **around: str) -> None:
    """Hold the kernel's result to float64 as the shared grid does, and its statistics to the result's."""
    given = placed(tensors, dtype)
    y, *statistics = native_fused.fused(*given, *options, **around, statistics=True)  # type: ignore[arg-type, misc]
    beside = definition(*given, *options, **around)  # type: ignore[arg-type]
    wanted = definition(*placed(given, torch.float64), *options, **around)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wanted, beside, "y")
    of_y = native_fused.statistics_of(y.double())
    for name, got, one in zip(("sum", "squares", "max"), statistics, of_y, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, one) < 1e-5, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for upsample, pool in RESIZINGS:
        if shape[2] >= pool:
            check(made(*shape, 3, upsample, pool), dtype, upsample, pool, activation="relu")


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_sizes_and_what_stands_around(k: int, dtype: torch.dtype) -> None:
    for (upsample, pool), around, bare in itertools.product(RESIZINGS, AROUND, (False, True)):
        check(made(2, 6, 5, 6, 9, k, upsample, pool, bare=bare), dtype, upsample, pool, **around)
