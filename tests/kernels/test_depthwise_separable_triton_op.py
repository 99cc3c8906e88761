"""The triton backend of the depthwise-separable convolution, in one kernel and in two, beyond the shared grid.

On a GPU where there is one, on the PTX machine (tests/ptx) otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.depthwise_separable import depthwise_separable
from raccgan.kernels.depthwise_separable.triton import fused as fusing
from raccgan.kernels.depthwise_separable.triton import op
from raccgan.kernels.depthwise_separable.triton.launch import PLAIN, Affine, Convolution, Stride
from tests.kernels.compare import allowed_beside, assert_all_close, assert_close, assert_finite
from tests.kernels.grid import FAMILIES, Inputs
from tests.kernels.test_depthwise_separable_triton import DEVICE, REASON, STRIDES, UP, normal, ones
from tests.kernels.test_grid import first_order, poisoned, second_order, through_penalty

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def inputs_of(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return FAMILIES["depthwise_separable"].inputs(case, dtype, DEVICE.type)


def triton(inputs: Inputs) -> Tensor:
    """The backend's result; the inputs need not be such as the public op lets in."""
    y: Tensor = op.depthwise_separable(*FAMILIES["depthwise_separable"].arguments(*inputs.values()))
    return y


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("large", [1e6, 2.0**55])
def test_a_blank_image_is_its_shift_however_far_from_zero(
    large: float, one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm is zero, so the numbers that are added to it must not have been added to large ones before."""
    monkeypatch.setattr(op, "fuses", lambda *_: one_kernel)

    def orders(kernels: str, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = inputs_of("encoder", dtype)
        inputs["x"] = torch.full_like(inputs["x"], large)
        inputs["relu"] = False
        family = FAMILIES["depthwise_separable"]
        (y,) = family.run(kernels, inputs)
        first, second = first_order(family, kernels, inputs), through_penalty(family, kernels, inputs)
        return {"y": y, **first, **{f"second of {name}": g for name, g in second.items()}}

    got, wanted = orders("triton", torch.float32), orders("reference", torch.float64)
    for name in wanted:
        assert_finite(got[name], name)
        if wanted[name].abs().max() > 1e-3:
            assert_close(got[name], wanted[name], 1e-5, what=name)


@pytest.mark.parametrize("order", [first_order, second_order, through_penalty])
@pytest.mark.parametrize("case", ["generator", "encoder", "affine, pooled", "skip, no bias", "odd, pooled", "one"])
def test_one_kernel_gives_what_two_do(case: str, order: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "fuses", lambda *_: True)
    family = FAMILIES["depthwise_separable"]
    inputs = inputs_of(case)
    with poisoned():
        (y,) = family.run("triton", inputs)
        got = {"y": y, **order(family, "triton", inputs)}
    exact, plain = inputs_of(case, torch.float64), inputs_of(case)
    wanted = {"y": family.run("reference", exact)[0], **order(family, "reference", exact)}
    beside = {"y": family.run("reference", plain)[0], **order(family, "reference", plain)}
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name in wanted:
        allowed = allowed_beside(beside[name], wanted[name])
        assert_close(got[name], wanted[name], allowed, absolute=1e-5, what=name)


def fused(x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor, residual: Tensor, stride: Stride) -> Tensor:
    height, width = residual.shape[2:]
    return fusing.fused(x, Convolution(w, stride), pointwise, bias, residual, Affine(relu=True), (height, width))


def composed(x: Tensor, w: Tensor, pointwise: Tensor, bias: Tensor, residual: Tensor, stride: Stride) -> Tensor:
    padding = (w.shape[-1] - 1) // 2
    if stride.up == 2:
        y = torch.nn.functional.conv_transpose2d(
            x.relu(), w.flip(2, 3), stride=2, padding=w.shape[-1] - 2 - padding, groups=x.shape[1]
        )
    else:
        y = torch.nn.functional.conv2d(x.relu(), w, stride=stride.down, padding=padding, groups=x.shape[1])
    y = torch.nn.functional.conv2d(y[:, :, : residual.shape[2], : residual.shape[3]], pointwise[:, :, None, None], bias)
    return y + residual


@pytest.mark.parametrize("dtype", runtime.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("stride", "k", "d", "height", "width"), [("plain", 3, 5, 5, 7), ("up", 4, 17, 10, 14), ("pooled", 4, 3, 2, 3)]
)
def test_one_kernel_and_its_gradients_in_every_dtype(
    stride: str, k: int, d: int, height: int, width: int, dtype: torch.dtype
) -> None:
    tensors = [
        normal(1, 2, 20, 5, 7),
        normal(2, 20, 1, k, k) / k,
        normal(3, d, 20) / 4,
        normal(4, d),
        normal(5, 2, d, height, width),
    ]
    tensors = [t.to(dtype if i in (0, 2, 4) else torch.float32).double() for i, t in enumerate(tensors)]

    def orders(run: Callable[..., Any], half: torch.dtype, full: torch.dtype) -> list[Tensor]:
        inputs = [t.to(half if i in (0, 2, 4) else full).requires_grad_() for i, t in enumerate(tensors)]
        y = run(*inputs, STRIDES[stride])
        first = torch.autograd.grad((y.double() * normal(7, *y.shape)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].double().square().sum(), inputs, materialize_grads=True)
        return [y, *first, *second]

    with poisoned():
        got = orders(fused, dtype, torch.float32)
    allowed = 2e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    assert_all_close(got, orders(composed, torch.float64, torch.float64), allowed)


def test_a_residual_of_another_dtype_or_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "fuses", lambda *_: True)
    inputs = inputs_of("affine, pooled")
    wanted = triton(inputs)
    wide = triton({**inputs, "residual": inputs["residual"].double()})
    assert wide.dtype == torch.float64
    assert_close(wide, wanted, 1e-6)
    with pytest.raises(RuntimeError, match="expand"):
        triton({**inputs, "residual": inputs["residual"][..., :-1]})
    with pytest.raises(RuntimeError, match="expand"):
        triton({**inputs, "pointwise_bias": ones(2), "depthwise_bias": None})


@pytest.mark.parametrize("one_kernel", [False, True])
def test_exported_and_compiled(one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "fuses", lambda *_: one_kernel)
    family = FAMILIES["depthwise_separable"]
    inputs = inputs_of("discriminator, second")
    order = list(inputs)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            given = {**inputs, "x": x, "depthwise_weight": w}
            return triton({name: given[name] for name in order})

    arguments = (inputs["x"], inputs["depthwise_weight"])
    (wanted,) = family.run("triton", inputs)
    torch._dynamo.reset()
    exported = torch.export.export(Layer(), arguments).module()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(exported(*arguments), wanted)
    assert torch.equal(compiled(*arguments), wanted)


@pytest.mark.parametrize("flag", ["ieee", "tf32"])
def test_compiled_without_gradients_under_either_flag(flag: str) -> None:
    """Compiled, float32 is two kernels whatever the flag says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    inputs = inputs_of("plain")
    torch._dynamo.reset()
    try:
        matmul.fp32_precision = flag
        with torch.no_grad():
            got, wanted = torch.compile(triton, fullgraph=True, backend="aot_eager")(inputs), triton(inputs)
        assert_close(got, wanted, 1e-5 if flag == "ieee" else 2e-3)
    finally:
        matmul.fp32_precision = before


def test_autocast() -> None:
    inputs = inputs_of("encoder")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        x, weights, prologue, resize, residual = FAMILIES["depthwise_separable"].arguments(*inputs.values())
        got = triton(inputs)
        beside = depthwise_separable(x, weights, prologue, resize, residual=residual, kernels="pytorch")
    assert got.dtype == beside.dtype == torch.bfloat16
    assert_close(got, beside, 0.03)


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel where its operand is computed about once and nothing else needs it; PyTorch's product elsewhere."""

    def fuses(dtype: torch.dtype, k: int, d: int, stride: Stride, learns: bool = False) -> bool:
        weight = torch.empty(d, 1, 1, 1, dtype=dtype, requires_grad=learns)
        return fusing.fuses(torch.empty(1, 64, 1, 1, dtype=dtype), weight, k, stride)

    half = torch.bfloat16
    for k, d, stride, one_kernel in (
        (7, 256, UP, True), (3, 256, PLAIN, True), (3, 384, PLAIN, True), (7, 384, UP, True),
        (7, 384, PLAIN, False), (3, 768, PLAIN, False),
    ):  # fmt: skip
        assert fuses(half, k, d, stride) == one_kernel
    assert not fuses(half, 3, 64, PLAIN, learns=True)
    assert not fuses(torch.float32, 3, 64, PLAIN)
    with torch.no_grad():
        assert fuses(half, 3, 64, PLAIN, learns=True)
        monkeypatch.setattr(fusing, "precision", lambda: "tf32")
        assert fuses(torch.float32, 3, 64, PLAIN)


def test_tf32_where_the_flags_allow_it() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for said, wanted in (("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = said
            assert fusing.precision() == wanted
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (2, 3, 0, 3), (1, 3, 1, 1)])
def test_nothing_in_is_nothing_out(shape: tuple[int, ...]) -> None:
    inputs = inputs_of("discriminator")
    inputs["x"] = torch.zeros(shape, device=DEVICE, requires_grad=True)
    triton(inputs).sum().backward()
    assert inputs["x"].grad.shape == shape
