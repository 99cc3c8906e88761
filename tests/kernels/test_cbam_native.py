"""The compiled CBAM, beyond what the shared grid holds it to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raccgan.kernels import dispatch, library
from raccgan.kernels.cbam import NORMS, native, reference
from tests.kernels.capability import FEW_CAPABILITIES, said_under
from tests.kernels.compare import assert_close, largest_difference, relative_error
from tests.kernels.grid import FAMILIES, Inputs, OwnOps, cbam_arguments, leaves, tensors
from tests.kernels.variations import LAYOUTS, laid_out, threads

CHANNELS = (1, 3, 8, 16, 17, 40, 1000)
KERNEL_SIZES = (1, 3, 5, 7, 9)
# Batch, height and width: one pixel, smaller than the kernel, a vector and its neighbours, several pieces and bands.
SIZES = ((1, 1, 1), (2, 3, 2), (2, 4, 4), (3, 5, 17), (2, 16, 16), (1, 13, 31), (2, 7, 131), (1, 61, 33))
# Of the largest magnitude, for outputs and gradients; a gradient of one number is a sum with cancellation.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
# Of second gradients. The largest error found in float32 is 3.2e-4, of spatial_weight with k = 1 and 1000 channels.
SECOND_TOLERANCE = {torch.float32: 4e-4, torch.bfloat16: 5e-2}

pytestmark = pytest.mark.skipif(library.path() is None, reason=str(library.why_not()))


def run_native(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return native.cbam(*cbam_arguments(*inputs))


def run_reference(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.cbam(*cbam_arguments(*inputs))


def made(shape: tuple[int, int, int, int], norm: str = "instance", k: int = 7, **options: Any) -> Inputs:
    """Inputs in float64 that every dtype here can hold exactly, so that all agree on which values are the largest."""
    reduced = max(1, shape[1] // 4)
    draw = torch.Generator().manual_seed(1)
    inputs = FAMILIES["cbam"].make(draw, shape=shape, norm=norm, reduced=reduced, k=k, **options)
    return {name: v.bfloat16().double() if isinstance(v, Tensor) else v for name, v in inputs.items()}


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def cotangent(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16().double()


def outputs_and_gradients(run: Any, inputs: Inputs, g: Tensor) -> dict[str, Tensor]:
    """y, its moments, and the gradients of every tensor from g at y and from fixed numbers at the moments."""
    at = leaves(inputs)
    y, mean, var = run(*at.values())
    weighed = (y.double() * g).sum() + 0.3 * mean.double().sum() + 0.7 * var.double().sum()
    gradients = torch.autograd.grad(weighed, list(tensors(at).values()))
    found = dict(zip(tensors(at), gradients, strict=True))
    return {"y": y.detach(), "moments": torch.stack([mean, var]).detach(), **found}


def largest_errors(dtype: torch.dtype, inputs: Inputs) -> dict[str, float]:
    """Of each output and gradient, against float64; relative, but absolute for sums of one number."""
    g = cotangent(inputs["x"])
    got = outputs_and_gradients(run_native, as_dtype(inputs, dtype), g)
    wanted = outputs_and_gradients(run_reference, inputs, g)
    errors = {}
    for name, w in wanted.items():
        alone = w.numel() == 1 and name != "y"
        error = relative_error(got[name], w, name)
        errors[name] = min(error, largest_difference(got[name], w)) if alone else error
    return errors


def check_every_shape(dtype: torch.dtype) -> None:
    for i, c in enumerate(CHANNELS):
        for j, (n, h, w) in enumerate(SIZES):
            norm, k = NORMS[(i + j) % 3], KERNEL_SIZES[(2 * i + j) % len(KERNEL_SIZES)]
            if n * h * w == 1 and norm != "fixed":
                norm = "fixed"  # one score has no variance: what comes through its norm is rounding
            errors = largest_errors(dtype, made((n, c, h, w), norm, k))
            wrong = {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]}
            assert not wrong, f"{dtype} {(n, c, h, w)} {norm} {k}: {wrong}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("capability", FEW_CAPABILITIES)
def test_every_capability_is_right_at_every_shape(capability: str, dtype: torch.dtype) -> None:
    said_under(
        capability,
        f"import torch, tests.kernels.test_cbam_native as t\ntorch.set_num_threads(1)\nt.check_every_shape({dtype})",
    )


def of_a_penalty(run: Any, inputs: Inputs, g: Tensor | None = None) -> dict[str, Tensor]:
    """As a critic's CBAM is differentiated twice: from y alone to x, and the square of that gradient."""
    at = leaves(inputs)
    g = (cotangent(inputs["x"]).to(inputs["x"].dtype) if g is None else g).requires_grad_()
    (first,) = torch.autograd.grad(run(*at.values())[0], [at["x"]], g, create_graph=True)
    square = first.to(torch.promote_types(first.dtype, torch.float32)).square().sum()
    found = torch.autograd.grad(square, [g, *tensors(at).values()])
    return dict(zip(["g", *tensors(at)], found, strict=True))


def largest_penalty_errors(dtype: torch.dtype, inputs: Inputs) -> dict[str, float]:
    """Of each second gradient, against float64; relative, but absolute for a sum of one number."""
    with OwnOps() as own:
        got = of_a_penalty(run_native, as_dtype(inputs, dtype))
    assert "raccgan::cbam_native_double_backward" in own.names
    errors = {}
    for name, w in of_a_penalty(run_reference, inputs).items():
        error = relative_error(got[name], w, name)
        errors[name] = min(error, largest_difference(got[name], w)) if w.numel() == 1 else error
    return errors


def check_penalty_at_every_shape(dtype: torch.dtype) -> None:
    for i, c in enumerate(CHANNELS):
        for j, (n, h, w) in enumerate(SIZES):
            if h * w == 1:  # one score has no variance: what comes through its norm is rounding
                continue
            k = KERNEL_SIZES[(2 * i + j) % len(KERNEL_SIZES)]
            errors = largest_penalty_errors(dtype, made((n, c, h, w), k=k))
            wrong = {name: error for name, error in errors.items() if not error < SECOND_TOLERANCE[dtype]}
            assert not wrong, f"{dtype} {(n, c, h, w)} {k}: {wrong}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("capability", FEW_CAPABILITIES)
def test_every_capability_is_right_under_a_penalty(capability: str, dtype: torch.dtype) -> None:
    said_under(
        capability,
        "import torch, tests.kernels.test_cbam_native as t\ntorch.set_num_threads(1)\n"
        f"t.check_penalty_at_every_shape({dtype})",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_threads_change_no_bit_of_a_penalty(layout: str) -> None:
    inputs = as_dtype(made((5, 40, 37, 31)), torch.float32)
    x, g = (laid_out(t.float(), layout) for t in (inputs["x"], cotangent(inputs["x"])))
    wanted = of_a_penalty(run_native, {**inputs, "x": x.contiguous()}, g.contiguous())
    for count in (1, 2, 3):
        with threads(count):
            got = of_a_penalty(run_native, {**inputs, "x": x}, g.detach())
        assert all(torch.equal(got[name], value) for name, value in wanted.items()), f"{count} threads"


@pytest.mark.parametrize("case", ["batch", "moments", "weights", "third"])
def test_what_the_penaltys_kernel_does_not_compute_the_reference_does(case: str) -> None:
    """A norm that couples samples, gradients of the moments or of a weight's gradient, and a third order."""
    inputs = made((3, 5, 4, 6), "batch" if case == "batch" else "instance")

    def gradients(run: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        at = leaves(as_dtype(inputs, dtype))
        y, mean, _ = run(*at.values())
        value = y.square().sum() + (mean.square().sum() if case == "moments" else 0)
        of = [at["x"], at["expand_weight"]] if case == "weights" else [at["x"]]
        for _ in range(2 if case == "third" else 1):
            value = sum(d.square().sum() for d in torch.autograd.grad(value, of, create_graph=True))
        return torch.autograd.grad(value, list(tensors(at).values()), create_graph=case == "third")

    with OwnOps() as own:
        got = gradients(run_native, torch.float32)
    assert "raccgan::cbam_native_double_backward" not in own.names
    for one, wanted in zip(got, gradients(run_reference, torch.float64), strict=True):
        assert_close(one, wanted, 1e-3)


def all_results(inputs: Inputs, layout: str = "contiguous") -> list[Tensor]:
    at = leaves({**inputs, "x": laid_out(inputs["x"], layout)})
    y, mean, var = run_native(*at.values())
    assert y.is_contiguous(memory_format=torch.channels_last)
    g = laid_out(cotangent(inputs["x"]).to(y.dtype), layout)
    if layout == "contiguous":
        g = g.contiguous()
    gradients = torch.autograd.grad([y, mean.sum()], list(tensors(at).values()), [g, torch.tensor(0.5)])
    return [y.detach(), mean.detach(), var.detach(), *gradients]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 3, 17, 40])
def test_layouts_change_no_bit(c: int, layout: str, dtype: torch.dtype) -> None:
    inputs = as_dtype(made((3, c, 9, 37), "batch"), dtype)
    inputs["x"] = laid_out(inputs["x"], layout).contiguous()
    given = laid_out(cotangent(inputs["x"]), layout)
    got = all_results(inputs, layout)
    at = leaves(inputs)
    y, mean, var = run_native(*at.values())
    wanted = torch.autograd.grad(
        [y, mean.sum()], list(tensors(at).values()), [given.to(dtype).contiguous(), torch.tensor(0.5)]
    )
    assert all(torch.equal(a, b) for a, b in zip(got, [y, mean, var, *wanted], strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5, 3, 70, 65), (33, 40, 8, 8), (1, 96, 64, 64), (3, 200, 32, 33)])
def test_threads_change_no_bit(shape: tuple[int, int, int, int], norm: str) -> None:
    inputs = as_dtype(made(shape, norm), torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(all_results(inputs))
    assert all(torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True))


def tied(c: int) -> Inputs:
    """Equal channels of equal weights, and few values: many pixels reach the max, and in each many channels."""
    inputs = made((2, c, 9, 21), "instance")
    inputs["x"] = inputs["x"][:, :1].relu().round().expand(-1, c, -1, -1).contiguous()
    for name in ("reduce_weight", "expand_weight", "expand_bias"):
        first = inputs[name][:, :1] if name == "reduce_weight" else inputs[name][:1]
        inputs[name] = first.expand_as(inputs[name]).contiguous()
    # Weights that are all alike add up, and a gate at 1 has a gradient that float32 cannot tell from 0.
    inputs["reduce_weight"] /= 4 * c
    return inputs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("c", [5, 16, 33])
def test_ties_in_both_maxima_share_the_gradient(c: int, dtype: torch.dtype) -> None:
    errors = largest_errors(dtype, tied(c))
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("c", [5, 16, 33])
def test_ties_share_under_a_penalty(c: int, dtype: torch.dtype) -> None:
    errors = largest_penalty_errors(dtype, tied(c))
    assert all(error < SECOND_TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("norm", NORMS)
def test_no_samples(norm: str) -> None:
    inputs = as_dtype(made((0, 4, 3, 3), norm), torch.float32)
    y, mean, _, *gradients = all_results(inputs)
    assert y.shape == (0, 4, 3, 3)
    assert mean.shape == run_reference(*inputs.values())[1].shape
    shapes = [t.shape for t in tensors(inputs).values()]
    assert [g.shape for g in gradients] == shapes
    assert not any(g.nan_to_num().any() for g in gradients[1:5]), "of the MLP"


def test_no_samples_under_a_penalty() -> None:
    inputs = as_dtype(made((0, 4, 3, 3)), torch.float32)
    found = of_a_penalty(run_native, inputs)
    assert {name: t.shape for name, t in found.items() if name != "g"} == {
        n: t.shape for n, t in tensors(inputs).items()
    }
    assert not any(t.any() for t in found.values())


def test_what_the_op_refuses() -> None:
    good = as_dtype(made((2, 4, 3, 3), "fixed"), torch.float32)
    x = good["x"]
    for changed, message in [
        ({"x": x.double()}, "x must be float32 or bfloat16"),
        ({"x": x[0]}, r"x must be \[N, C, H, W\]"),
        ({"x": x[:, :, :0]}, "x must have a channel and a pixel at least"),
        ({"reduce_weight": torch.zeros(1, 5)}, "reduce_weight has the wrong shape"),
        ({"expand_bias": torch.zeros(5)}, "expand_bias has the wrong shape"),
        ({"spatial_weight": torch.zeros(1, 2, 4, 4)}, r"spatial_weight must be \[1, 2, k, k\] with odd k"),
        ({"spatial_weight": torch.zeros(1, 3, 5, 5)}, "spatial_weight has the wrong shape"),
        ({"norm_bias": torch.zeros(2)}, "norm_bias has the wrong shape"),
        ({"var": None}, "give both mean and var, or neither"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.raccgan.cbam_native(
                *(v for n, v in (good | changed).items() if n not in ("norm", "eps")), False, 1e-5
            )
    y, _, _, saved = torch.ops.raccgan.cbam_native(
        *(v for n, v in good.items() if n not in ("norm", "mean", "var", "eps")), None, None, False, 1e-5
    )
    weights = [v for n, v in good.items() if n not in ("x", "norm", "mean", "var", "eps")]
    for grad_grad_x, grad_y, message in [
        (x.bfloat16(), y, "grad_grad_x must be as x is"),
        (x, y[:1], "grad_y must be as x is"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.raccgan.cbam_native_double_backward(grad_grad_x, grad_y, x, *weights, 1e-5, saved)
    assert "float64" in str(native.supports(dispatch.Call(x.device, torch.float64, tuple(x.shape))))
    assert "meta" in str(native.supports(dispatch.Call(torch.device("meta"), x.dtype, tuple(x.shape))))


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
def test_autocast(of_x: torch.dtype) -> None:
    """Under autocast y has x's dtype, as the reference has it, and every gradient the dtype of its tensor."""
    inputs = as_dtype(made((2, 8, 6, 6), "batch"), torch.float32)
    inputs["x"] = inputs["x"].to(of_x)
    at = leaves(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, beside = run_native(*at.values())[0], run_reference(*at.values())[0]
    assert beside.dtype == of_x
    assert_close(y, beside, 0.03, dtype=of_x)
    gradients = torch.autograd.grad(y.float().square().sum(), list(tensors(at).values()))
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors(at).values()]


def test_third_order_and_shared_inputs() -> None:
    """Weights that came from x: the second backward has to keep their paths apart."""

    def third(run: Any, dtype: torch.dtype) -> Tensor:
        inputs = as_dtype(made((2, 6, 4, 5), "instance"), dtype)
        x = inputs["x"].requires_grad_()
        inputs |= {"x": x * 1.5, "expand_bias": x.mean(dim=(0, 2, 3))}
        value = run(*inputs.values())[0].square().sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(value, x, create_graph=True)
            value = g.square().sum()
        return torch.autograd.grad(value, x)[0]

    assert_close(third(run_native, torch.float32), third(run_reference, torch.float64), 1e-4)
