"""The compiled pointwise kernels, beyond what the shared grid and the family's own tests hold them to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raccgan.kernels import library
from raccgan.kernels.depthwise_separable.convolutions import PointwiseProduct
from raccgan.kernels.depthwise_separable.native.pointwise import DTYPES, product
from tests.kernels.capability import FEW_CAPABILITIES, said_under
from tests.kernels.compare import assert_close, largest, relative_error
from tests.kernels.variations import LAYOUTS, laid_out, threads

# Images, input channels, height, width, output channels: one of each, a panel of columns and its neighbours, an odd
# number of words, rows that fill no tile, by columns and by rows, several pieces of pixels, an image's few channels,
# long sums over few pixels.
SHAPES = (
    (1, 1, 1, 1, 1), (3, 5, 7, 3, 33), (2, 16, 4, 4, 32), (1, 33, 13, 1, 31), (2, 64, 23, 23, 48), (5, 3, 41, 42, 17),
    (2, 4, 9, 9, 4), (3, 70, 5, 6, 2),
    (1, 301, 3, 5, 41), (2, 256, 4, 6, 34),
)  # fmt: skip
OPS = torch.ops.raccgan

pytestmark = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def made(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, w, bias, residual and the cotangents of y and of x, in float64, as they are once rounded."""
    draw = torch.Generator().manual_seed(3)
    n, c, h, v, d = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draw).to(dtype).double()

    x, y = (n, c, h, v), (n, d, h, v)
    return [normal(*x), normal(d, c, 1, 1), normal(d), normal(*y), normal(*y), normal(*x)]


def by_convolution(x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.conv2d(x, w, b)
    return y if residual is None else y + residual


def by_kernel(x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor | None) -> Tensor:
    y: Tensor = OPS.pointwise_native(x, w.float(), None if b is None else b.float(), residual)
    return y


def by_packed(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """y, of weights that were packed for images of ``dtype``."""
    x, w, b, residual, *_ = tensors
    packed = OPS.pointwise_native_packed(w.float(), dtype == torch.bfloat16)
    y: Tensor = OPS.pointwise_native(x, w.float(), b.float(), residual, packed)
    return y


def all_orders(run: Any, tensors: list[Tensor]) -> list[Tensor]:
    """y, the gradients of all four, those of a penalty on x's, and those of one on the weights' and the bias's."""
    *inputs, g, t = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    g = g.clone().requires_grad_()
    y = run(*leaves)
    first = torch.autograd.grad(y, leaves, g, create_graph=True)
    penalty = torch.autograd.grad((first[0] * t).sum(), [leaves[1], g], retain_graph=True)
    weights = torch.autograd.grad((first[1] * inputs[1]).sum() + (first[2] * inputs[2]).sum(), [leaves[0], g])
    return [y, *first, *penalty, *weights]


def worst_error(dtype: torch.dtype) -> float:
    """Over all shapes, relative to float64."""
    worst = 0.0
    for shape in SHAPES:
        tensors = made(shape, dtype)
        wanted = all_orders(by_convolution, tensors)
        got = all_orders(by_kernel, [tensor.to(dtype) for tensor in tensors])
        errors = [relative_error(ours, exact) for ours, exact in zip(got, wanted, strict=True)]
        packed = by_packed([tensor.to(dtype) for tensor in tensors], dtype)
        worst = largest([worst, *errors, relative_error(packed, wanted[0])])
    return worst


@pytest.mark.parametrize("capability", FEW_CAPABILITIES)
def test_every_capability_is_right_at_every_shape_and_order(capability: str) -> None:
    said = said_under(
        capability,
        "import torch, tests.kernels.test_pointwise_native as t\n"
        "print(t.worst_error(torch.float32), t.worst_error(torch.bfloat16))",
    )
    single, half = map(float, said.split())
    assert single < 2e-6
    assert half < 2**-8  # each result is rounded once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 33, 24, 24, 40),
        (1, 40, 5, 7, 130),
        (3, 64, 70, 70, 9),
        (2, 40, 70, 70, 3),
        (2, 1, 70, 70, 40),
        (3, 320, 4, 4, 130),
    ],
    ids=str,
)
def test_threads_change_no_bit(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in made(shape, dtype)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append([*all_orders(by_kernel, tensors), by_packed(tensors, dtype)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_change_no_bit(dtype: torch.dtype, layout: str) -> None:
    tensors = [t.to(dtype) for t in made((2, 17, 5, 11, 35), dtype)]
    tensors = [laid_out(t, layout) if t.dim() == 4 and t.shape[2] > 1 else t for t in tensors]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    got, wanted = all_orders(by_kernel, tensors), all_orders(by_kernel, dense)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_a_result_does_not_depend_on_what_is_beside_it() -> None:
    """Infinity and NaN stay in their pixel and in their channel, and padding never turns into NaN."""
    x, w = torch.randn(1, 7, 3, 3), torch.randn(35, 7, 1, 1)
    clean = OPS.pointwise_native(x, w, None, None)
    x[0, 2, 1, 1], w[33, 0] = math.inf, math.nan
    y = OPS.pointwise_native(x, w, None, None)
    assert torch.isnan(y[0, 33]).all()
    rest = torch.ones(1, 35, 3, 3, dtype=torch.bool)
    rest[:, 33], rest[..., 1, 1] = False, False
    assert torch.equal(y[rest], clean[rest])
    assert torch.isinf(y[0, :33, 1, 1]).all()
    half = OPS.pointwise_native(x.bfloat16(), w, None, None)
    assert torch.isfinite(half[rest]).all()
    gradient, sums = OPS.pointwise_native_product(x, clean, True)
    assert torch.isfinite(gradient[:, [0, 1, 3, 4, 5, 6]]).all()
    assert torch.isfinite(sums).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_are_taken_for_what_they_were_packed_for(dtype: torch.dtype) -> None:
    """Those of another dtype's, or of another processor's, are left alone; what is none is refused."""
    tensors = [tensor.to(dtype) for tensor in made((2, 64, 3, 3, 40), dtype)]
    x, w = tensors[0], tensors[1].float()
    plain = by_kernel(*tensors[:4])
    packed = OPS.pointwise_native_packed(w, dtype == torch.bfloat16)
    assert torch.equal(OPS.pointwise_native(x, 0 * w, None, None, packed), OPS.pointwise_native(x, w, None, None))
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert torch.equal(by_packed(tensors, other), plain)
    elsewhere = packed.clone()
    elsewhere[4:6] = -1  # the label's target
    assert torch.equal(OPS.pointwise_native(x, w, None, None, elsewhere), OPS.pointwise_native(x, w, None, None))
    for wrong in (packed[:-1], packed[:5], packed.double(), packed.view(-1, 1), packed.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match="packed"):
            OPS.pointwise_native(x, w, None, None, wrong)


def test_who_serves() -> None:
    """Where no kernel serves, PyTorch does, with the same result."""
    w, b, residual = torch.randn(6, 5, 1, 1), torch.randn(6), torch.randn(2, 6, 4, 4)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 5, 4, 4).to(dtype)
        y = product(x, w.to(dtype), b.to(dtype), residual.to(dtype))
        wanted = F.conv2d(x.double(), w.to(dtype).double(), b.to(dtype).double()) + residual.to(dtype)
        assert_close(y, wanted, 4 * torch.finfo(dtype).eps, dtype=dtype)
    x = torch.randn(2, 5, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x, w, b).dtype == torch.bfloat16
        assert product(x, w, b, residual.bfloat16()).dtype == torch.bfloat16
        assert product(x, w, b, residual).dtype == torch.float32
    y = product(x, w, b, residual.double())
    assert_close(y, F.conv2d(x, w, b) + residual, 1e-6, dtype=torch.float64)


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_doctor_says_whose_the_products_are(capability: str) -> None:
    said = said_under(capability, "from raccgan import doctor; doctor.main([])")
    assert "matrix products in bfloat16 are PyTorch's: " in said
    assert ("matrix products in float32 are PyTorch's: the compiled ones need AVX2" in said) == (
        capability == "portable"
    )


def test_a_weight_in_autocast_keeps_its_own_gradient() -> None:
    """float32, and not rounded to bfloat16 on its way."""
    if torch.bfloat16 not in DTYPES:
        pytest.skip("PyTorch's own products serve bfloat16 here")
    x, w = torch.randn(2, 8, 16, 16).bfloat16(), torch.randn(4, 8, 1, 1, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product(x, w, None)
    y.backward(torch.ones_like(y))
    assert w.grad is not None
    assert_close(w.grad, x.double().sum(dim=(0, 2, 3)).expand(4, 8).view(4, 8, 1, 1), 1e-6)


def test_pytorchs_family_agrees_on_the_product_alone() -> None:
    x, g = torch.randn(3, 9, 5, 5), torch.randn(3, 4, 5, 5)
    w, sums = OPS.pointwise_native_product(x, g, True)
    assert_close(w, PointwiseProduct.apply(x.double(), g.double()), 1e-6)
    assert_close(sums, g.double().sum(dim=(0, 2, 3)), 1e-6)
    assert OPS.pointwise_native_product(x, g, False)[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    x, w, g = leaf(2, 5, 4, 3), leaf(6, 5, 1, 1, dtype=torch.float32), leaf(2, 6, 4, 3)
    b = leaf(6, dtype=torch.float32)
    for bias in (b, None):
        for residual in (g, None):
            torch.library.opcheck(OPS.pointwise_native.default, (x, w, bias, residual))
    packed = OPS.pointwise_native_packed(w.detach(), dtype == torch.bfloat16)
    with torch.no_grad():
        torch.library.opcheck(OPS.pointwise_native.default, (x, w, b, g, packed))
        torch.library.opcheck(OPS.pointwise_native_packed.default, (w.detach(), dtype == torch.bfloat16))
    torch.library.opcheck(OPS.pointwise_native_transposed.default, (g, w))
    for want_sums in (False, True):
        torch.library.opcheck(OPS.pointwise_native_product.default, (x, g, want_sums))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": torch.ones(5, 4)}, r"x must be \[N, C, H, W\]"),
        ({"x": torch.ones(2, 5, 4, 4).double()}, "x must be float32 or bfloat16"),
        ({"x": torch.ones(2, 4, 4, 4)}, "as many channels as w has columns, 5"),
        ({"w": torch.ones(6, 5, 3, 3)}, r"w must be \[D, C, 1, 1\]"),
        ({"w": torch.ones(6, 5, 1, 1).bfloat16()}, "w must be float32"),
        ({"bias": torch.ones(5)}, r"the bias must be float32 \[D\]"),
        ({"residual": torch.ones(2, 6, 4, 3)}, r"the residual must be \[N, D, H, W\]"),
        ({"residual": torch.ones(2, 6, 4, 4).bfloat16()}, "x and the residual must be of one dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_one_clear_line(arguments: dict[str, Tensor], said: str) -> None:
    given = {"x": torch.ones(2, 5, 4, 4), "w": torch.ones(6, 5, 1, 1), "bias": None, "residual": None, **arguments}
    with pytest.raises(RuntimeError, match=said):
        OPS.pointwise_native(*given.values())


def test_gradients_of_unlike_images_are_refused() -> None:
    with pytest.raises(RuntimeError, match="as many images, and of one size"):
        OPS.pointwise_native_product(torch.ones(2, 5, 4, 4), torch.ones(2, 6, 4, 3), False)
    with pytest.raises(RuntimeError, match="x and g must be of one dtype"):
        OPS.pointwise_native_product(torch.ones(2, 5, 4, 4), torch.ones(2, 6, 4, 4).bfloat16(), False)
    with pytest.raises(RuntimeError, match="g must have as many channels as w has rows, 6"):
        OPS.pointwise_native_transposed(torch.ones(2, 5, 4, 4), torch.ones(6, 5, 1, 1))
    with pytest.raises(RuntimeError, match="g must be float32 or bfloat16"):
        OPS.pointwise_native_transposed(torch.ones(2, 6, 4, 4).double(), torch.ones(6, 5, 1, 1))
