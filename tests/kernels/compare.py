"""How results are compared: every comparison of numbers in ``tests`` and ``bench`` goes through here.

NaN compares false with everything and inf equals inf, so a comparison without a check of its own can pass on results
that are not numbers. Each function here first demands the same shape and that both sides are finite. A test of results
that may not be finite says so, and asserts beside the comparison which of them are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def assert_finite(value: Any, what: str = "result") -> None:
    """Every number of a tensor, an array or a list is finite."""
    t = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    if t.is_floating_point() or t.is_complex():
        wrong = int((~t.isfinite()).sum())
        assert wrong == 0, f"{what}: {wrong} of {t.numel()} numbers are not finite"


def largest_difference(got: Tensor, wanted: Tensor, what: str = "result") -> float:
    """max |got - wanted|, in float64; 0 for empty tensors.

    Raises:
        AssertionError: the shapes differ, or a number on either side is not finite.
    """
    assert got.shape == wanted.shape, f"{what}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
    assert_finite(wanted, f"what {what} is compared with")
    assert_finite(got, what)
    return (got.double() - wanted.double()).abs().max().item() if got.numel() else 0.0


def relative_error(got: Tensor, wanted: Tensor, what: str = "result") -> float:
    """max |got - wanted| / max |wanted|; 0 for empty tensors.

    Raises:
        AssertionError: the shapes differ, or a number on either side is not finite.
    """
    difference = largest_difference(got, wanted, what)
    return difference / max(wanted.detach().double().abs().max().item(), 1e-6) if got.numel() else 0.0


def allowed_beside(beside: Tensor, wanted: Tensor, factor: float = 3, least: float | None = None) -> float:
    """The relative error that is allowed where plain PyTorch in the same dtype gave ``beside``.

    ``factor`` times PyTorch's own error against the float64 result ``wanted``, and ``least``, by default a few units in
    the last place, for results that PyTorch gets exactly.
    """
    least = 8 * torch.finfo(beside.dtype).eps if least is None else least
    return factor * relative_error(beside, wanted, "plain PyTorch's result") + least


def assert_close(
    got: Tensor,
    wanted: Tensor,
    allowed: float,
    *,
    absolute: float = 0.0,
    dtype: torch.dtype | None = None,
    what: str = "result",
) -> None:
    """The largest difference is at most ``allowed`` of the largest number wanted, or at most ``absolute``.

    Args:
        got: the result under test.
        wanted: the right one, usually by the reference in float64.
        dtype: what ``got`` must have, where that is part of the promise.
    """
    assert math.isfinite(allowed), f"{what}: an error of {allowed} is allowed, which is no bound"
    assert dtype is None or got.dtype == dtype, f"{what}: {got.dtype}, wanted {dtype}"
    error = relative_error(got, wanted, what)
    if not error <= allowed:
        difference = largest_difference(got, wanted, what)
        assert difference <= absolute, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def assert_all_close(got: Iterable[Tensor], wanted: Iterable[Tensor], allowed: float, *, absolute: float = 0.0) -> None:
    """:func:`assert_close` of each of several results, which are as many."""
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert_close(g, w, allowed, absolute=absolute, what=f"result {i}")


def assert_each_close(got: Any, wanted: Any, *, rtol: float = 1e-7, atol: float = 0.0, what: str = "result") -> None:
    """Every number of a tensor, an array or a list is within ``atol + rtol * |wanted|`` of its own wanted one.

    ``wanted`` may be broadcast, and dtypes may differ: the comparison is in float64.
    """
    got, wanted = (torch.tensor(v) if isinstance(v, np.ndarray) else torch.as_tensor(v) for v in (got, wanted))
    got, wanted = got.detach().double(), wanted.detach().double()
    assert_finite(wanted, f"what {what} is compared with")
    assert_finite(got, what)
    if wanted.shape != got.shape:
        assert wanted.dim() <= got.dim(), f"{what}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
        wanted = wanted.expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, msg=lambda said: f"{what}: {said}")


def largest(errors: Iterable[float]) -> float:
    """The largest error, 0 of none; unlike ``max``, it does not lose a NaN."""
    errors = list(errors)
    wrong = [error for error in errors if not math.isfinite(error)]
    assert not wrong, f"errors that are not finite: {wrong}"
    return max(errors, default=0.0)
