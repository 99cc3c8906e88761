"""The compiled kernel of a whole depthwise-separable convolution: on a GPU, or on the PTX machine (tests/ptx)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable
from raccgan.kernels.depthwise_separable.native import op as native_fused
from tests.kernels.compare import allowed_beside, assert_close, relative_error
from tests.kernels.grid import OwnOps
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
PROLOGUES = (
    Prologue(),
    Prologue(relu=True),
    Prologue(norm="instance", relu=True),
    Prologue(True, "instance", relu=True),
)


def made(
    n: int, c: int, h: int, v: int, d: int, k: int, upsample: int = 1, pool: int = 1, *, bare: bool = False
) -> list[Tensor | None]:
    """The seven tensors of the op in float64; without the optional ones where ``bare``."""
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


def definition(tensors: list[Tensor | None], prologue: Prologue, resizing: tuple[int, int] = (1, 1)) -> Tensor:
    """What the kernel computes, by the reference."""
    x, w, pointwise, bias, scale, shift, residual = tensors
    assert x is not None
    assert w is not None
    assert pointwise is not None
    weights = Weights(w, None, pointwise[:, :, None, None], None if bias is None else bias.to(x.dtype))
    around = prologue._replace(scale=scale, shift=shift)
    return depthwise_separable(x, weights, around, Resize(*resizing), residual=residual, kernels="reference")


def fused(tensors: list[Tensor | None], prologue: Prologue, resizing: tuple[int, int] = (1, 1)) -> Tensor:
    x, w, pointwise, bias, scale, shift, residual = tensors
    around = prologue._replace(scale=scale, shift=shift)
    return native_fused.fused(x, w, pointwise, bias, residual, around, Resize(*resizing))  # type: ignore[arg-type]


def check(
    tensors: list[Tensor | None], dtype: torch.dtype, prologue: Prologue, resizing: tuple[int, int] = (1, 1)
) -> None:
    """Hold the kernel's result to float64 as the shared grid does."""
    given = placed(tensors, dtype)
    y = fused(given, prologue, resizing)
    wanted = definition(placed(given, torch.float64), prologue, resizing)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, wanted, allowed_beside(definition(given, prologue, resizing), wanted), dtype=dtype, what="y")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for upsample, pool in RESIZINGS:
        if shape[2] >= pool:
            check(made(*shape, 3, upsample, pool), dtype, Prologue(relu=True), (upsample, pool))


@pytest.mark.parametrize(
    ("k", "dtype"),
    [(3, torch.float32), (5, torch.float32), (7, torch.float32), (7, torch.bfloat16), (5, torch.float16)],
    ids=str,
)
def test_kernel_sizes_and_what_stands_around(k: int, dtype: torch.dtype) -> None:
    for resizing, prologue, bare in itertools.product(RESIZINGS, PROLOGUES, (False, True)):
        check(made(2, 6, 5, 6, 9, k, *resizing, bare=bare), dtype, prologue, resizing)


def test_tf32_is_rounded_to_where_it_is_asked_for() -> None:
    """Then alone: one product has some three digits, and three products of what it leaves over have float32's."""
    x, w, pointwise, *_ = placed(made(1, 40, 4, 6, 17, 3, bare=True), torch.float32)
    assert x is not None
    assert w is not None
    assert pointwise is not None
    nothing = (None,) * 4
    wanted = definition([x.double(), w.double(), pointwise.double(), *nothing], Prologue())
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
    y = run(inputs)
    value = (y + y.square()).sum()
    first = torch.autograd.grad(value, given, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), given, allow_unused=True)
    return [*first, *(torch.zeros_like(t) if g is None else g for t, g in zip(given, second, strict=True))]


@pytest.mark.parametrize(("upsample", "pool"), RESIZINGS)
def test_gradients_through_a_penalty(upsample: int, pool: int) -> None:
    prologue, tensors = Prologue(True, "instance", relu=True), made(2, 3, 4, 6, 5, 3, upsample, pool)
    single = placed(tensors, torch.float32)
    got = penalised(lambda given: fused(given, prologue, (upsample, pool)), single)
    beside = penalised(lambda given: definition(given, prologue, (upsample, pool)), single)
    wanted = penalised(lambda given: definition(given, prologue, (upsample, pool)), tensors)
    assert len(got) == 14
    for i, (g, w, b) in enumerate(zip(got, wanted, beside, strict=True)):
        assert_close(g, w, allowed_beside(b, w), absolute=1e-5, what=f"gradient {i}")


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
            native_fused.fused(x, w, prologue=Prologue(scale=scale, shift=shift), **arguments)


def test_one_kernel_serves_where_it_is_less_work() -> None:
    """channels_last, without a gradient of the pointwise weight, not up and down at once, at most two blocks."""
    x = torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weights = {d: torch.zeros(d, 8, 1, 1, device=DEVICE) for d in (128, 256, 257)}

    def fuses(x: Tensor, pointwise: Tensor, k: int, *resizing: int) -> bool:
        weights = Weights(torch.zeros(8, 1, k, k, device=DEVICE), None, pointwise, None)
        return native_fused.fuses(x, weights, Resize(*resizing))

    assert fuses(x, weights[128], 7)
    assert not fuses(x.contiguous(), weights[128], 7)
    assert not fuses(x, weights[128], 7, 2, 2)
    assert not fuses(x, weights[128].requires_grad_(), 7)
    with torch.no_grad():
        assert fuses(x, weights[128], 7)
    assert fuses(x, weights[256], 3)
    assert not fuses(x, weights[256], 7)
    assert fuses(x, weights[256], 7, 2, 1)
    assert not fuses(x, weights[257], 3)


@pytest.mark.parametrize("upsample", [1, 2])
def test_native_takes_it(upsample: int) -> None:
    """The same result as of the two kernels, up to rounding, with biases and a residual of another dtype."""
    x, w, pointwise, bias, scale, shift, residual = placed(made(2, 3, 4, 6, 5, 3, upsample), torch.float32)
    assert x is not None
    assert w is not None
    assert pointwise is not None
    assert residual is not None
    weights = Weights(w, torch.linspace(-1, 1, 3, device=DEVICE), pointwise[:, :, None, None], bias)
    prologue, resize = Prologue(True, "instance", 1e-5, scale, shift, True), Resize(upsample)

    def run(x: Tensor) -> tuple[Tensor, list[str]]:
        with OwnOps() as own:
            y = depthwise_separable(x, weights, prologue, resize, residual=residual.double(), kernels="native")
        return y, own.names

    (got, one), (two, several) = run(x), run(x.contiguous())
    assert one == ["raccgan::depthwise_native_fused"]
    assert "raccgan::depthwise_native_fused" not in several
    assert got.dtype == two.dtype == torch.float64
    assert_close(got, two, 2e-3 if x.is_cuda else 2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are a GPU's")
def test_a_graph_records_it() -> None:
    """Nothing waits or asks the device: a captured call computes anew from what its inputs hold when it is replayed."""
    tensors = placed(made(2, 40, 9, 18, 17, 3), torch.bfloat16)

    def run() -> list[Tensor]:
        return [fused(tensors, Prologue(norm="instance"))]

    graph, captured = recorded(run)
    for t in tensors:
        assert t is not None
        t.mul_(0.75)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
