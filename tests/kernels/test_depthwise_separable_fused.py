"""The compiled kernel of a whole depthwise-separable convolution: on a GPU, or emulated (test_cuda_emulation.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import native, native_fused, reference
from tests.kernels.grid import assert_close, relative_error
from tests.kernels.test_cuda_on_gpu import recorded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE not in native_fused.DEVICES, reason=f"there is no fused kernel for {DEVICE} here"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESIZINGS = ((1, 1), (2, 1), (1, 2))
# Batch, channels, height, width and output channels: one pixel; a tile and its neighbours; chunks of channels, whole
# and not; half a block of output channels, a whole one, and two, the second one part of a tile of columns.
SHAPES = ((1, 1, 1, 1, 1), (2, 3, 9, 18, 5), (1, 40, 4, 6, 17), (1, 8, 5, 4, 64), (1, 64, 3, 5, 128), (1, 8, 2, 2, 137))
AROUND: tuple[dict[str, str], ...] = (
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
    """Hold the kernel's result to float64 as the shared grid does."""
    given = placed(tensors, dtype)
    y = native_fused.fused(*given, *options, **around)  # type: ignore[arg-type]
    beside = definition(*given, *options, **around)  # type: ignore[arg-type]
    wanted = definition(*placed(given, torch.float64), *options, **around)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wanted, beside, "y")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for upsample, pool in RESIZINGS:
        if shape[2] >= pool:
            check(made(*shape, 3, upsample, pool), dtype, upsample, pool, activation="relu")


@pytest.mark.parametrize(
    ("k", "dtype"),
    [(3, torch.float32), (5, torch.float32), (7, torch.float32), (7, torch.bfloat16), (5, torch.float16)],
    ids=str,
)
def test_kernel_sizes_and_what_stands_around(k: int, dtype: torch.dtype) -> None:
    for (upsample, pool), around, bare in itertools.product(RESIZINGS, AROUND, (False, True)):
        check(made(2, 6, 5, 6, 9, k, upsample, pool, bare=bare), dtype, upsample, pool, **around)


def test_tf32_is_rounded_to_where_it_is_asked_for() -> None:
    """Then alone: one product has some three digits, and three products of what it leaves over have float32's."""
    x, w, pointwise, *_ = placed(made(1, 40, 4, 6, 17, 3, bare=True), torch.float32)
    assert x is not None
    assert w is not None
    assert pointwise is not None
    nothing = (None,) * 4
    wanted = definition(x.double(), w.double(), pointwise.double(), *nothing)
    errors = [
        relative_error(
            torch.ops.raccgan.depthwise_native_fused(x, w, pointwise, *nothing, 1, 1, False, False, False, 1e-5, tf32),
            wanted,
        )
        for tf32 in (False, True)
    ]
    assert errors[0] < 2e-6
    assert 2e-5 < errors[1] < 2e-3


def penalised(run: Any, tensors: list[Tensor | None]) -> list[Tensor]:
    """The gradients of all tensors, and those of a penalty on x's."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    given = [t for t in inputs if t is not None]
    y = run(*inputs)
    first = torch.autograd.grad((y + y.square()).sum(), given, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), given, allow_unused=True)
    return [*first, *(torch.zeros_like(t) if g is None else g for t, g in zip(given, second, strict=True))]


@pytest.mark.parametrize(("upsample", "pool"), RESIZINGS)
def test_gradients_through_a_penalty(upsample: int, pool: int) -> None:
    around = {"preactivation": "relu", "norm": "instance", "activation": "relu"}
    tensors = made(2, 3, 4, 6, 5, 3, upsample, pool)

    def reference_run(*given: Any) -> Tensor:
        return definition(*given, upsample, pool, **around)

    got = penalised(lambda *given: native_fused.fused(*given, upsample, pool, **around), placed(tensors, torch.float32))
    beside = penalised(reference_run, placed(tensors, torch.float32))
    wanted = penalised(reference_run, tensors)
    assert len(got) == 14
    for i, (g, w, b) in enumerate(zip(got, wanted, beside, strict=True)):
        if (g.double() - w).abs().max() > 1e-5:
            assert_close(g, w, b, f"gradient {i}")


def test_opcheck() -> None:
    tensors = placed(made(1, 3, 4, 4, 5, 3), torch.float32)
    inputs = tuple(None if t is None else t.requires_grad_() for t in tensors)
    op = torch.ops.raccgan.depthwise_native_fused.default
    torch.library.opcheck(op, (*inputs, 1, 1, True, True, True, 1e-5, False))


def test_nothing_in_nothing_out() -> None:
    x = torch.zeros(0, 3, 4, 4, device=DEVICE)
    y = native_fused.fused(x, torch.ones(3, 1, 3, 3, device=DEVICE), torch.ones(5, 3, device=DEVICE))
    assert y.shape == (0, 5, 4, 4)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w, pointwise, bias, scale, shift, residual = placed(made(1, 3, 4, 4, 5, 3), torch.float32)
    assert x is not None
    assert w is not None
    assert pointwise is not None
    assert bias is not None
    assert residual is not None
    for change, message in (
        ({"pointwise": pointwise[:, :2]}, "pointwise must be"),
        ({"pointwise": pointwise.half()}, "of one dtype"),
        ({"bias": bias[:4]}, "bias must be"),
        ({"residual": residual[:, :, :3]}, "residual must be"),
    ):
        arguments = {"pointwise": pointwise, "bias": bias, "residual": residual, **change}
        with pytest.raises(RuntimeError, match=message):
            native_fused.fused(x, w, scale=scale, shift=shift, **arguments)


def test_one_kernel_serves_where_it_is_less_work() -> None:
    """channels_last, without a gradient of the pointwise weight, not up and down at once, at most two blocks."""
    x = torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weights = {d: torch.zeros(d, 8, 1, 1, device=DEVICE) for d in (128, 256, 257)}
    fuses = native_fused.fuses
    assert fuses(x, weights[128], 7, 1, 1)
    assert not fuses(x.contiguous(), weights[128], 7, 1, 1)
    assert not fuses(x, weights[128], 7, 2, 2)
    assert not fuses(x, weights[128].requires_grad_(), 7, 1, 1)
    with torch.no_grad():
        assert fuses(x, weights[128], 7, 1, 1)
    assert fuses(x, weights[256], 3, 1, 1)
    assert not fuses(x, weights[256], 7, 1, 1)
    assert fuses(x, weights[256], 7, 2, 1)
    assert not fuses(x, weights[257], 3, 1, 1)


@pytest.mark.parametrize("upsample", [1, 2])
def test_native_takes_it(upsample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result as of the two kernels, up to rounding, with biases and a residual of another dtype."""
    x, w, pointwise, bias, scale, shift, residual = placed(made(2, 3, 4, 6, 5, 3, upsample), torch.float32)
    assert x is not None
    assert pointwise is not None
    assert residual is not None
    taken = []
    one_kernel = native_fused.fused
    monkeypatch.setattr(native_fused, "fused", lambda *a, **o: taken.append(a) or one_kernel(*a, **o))
    arguments = (
        x, w, torch.linspace(-1, 1, 3, device=DEVICE), pointwise[:, :, None, None], bias, "relu", "instance", 1e-5,
        scale, shift, "relu", upsample, 1, residual.double(),
    )  # fmt: skip
    got = native.depthwise_separable(*arguments)
    assert len(taken) == 1
    two = native.depthwise_separable(x.contiguous(), *arguments[1:])
    assert len(taken) == 1
    assert got.dtype == two.dtype == torch.float64
    assert relative_error(got, two) < (2e-3 if x.is_cuda else 2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are a GPU's")
def test_a_graph_records_it() -> None:
    """Nothing waits or asks the device: a captured call computes anew from what its inputs hold when it is replayed."""
    tensors = placed(made(2, 40, 9, 18, 17, 3), torch.bfloat16)

    def run() -> list[Tensor]:
        return [native_fused.fused(*tensors, norm="instance")]  # type: ignore[arg-type]

    graph, captured = recorded(run)
    for t in tensors:
        assert t is not None
        t.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
