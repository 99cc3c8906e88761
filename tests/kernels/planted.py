"""Backends with a planted fault each, for tests/kernels/test_qualification.py: a child imports this module."""

from __future__ import annotations

import ctypes
import time
from itertools import count
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import dispatch
from raccgan.kernels.moments.reference import moments


def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = moments(x)
    return mean, var * 1.01


def not_a_number(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = moments(x)
    return mean, torch.where(torch.arange(len(var)) == 1, torch.nan, var)


class _HalfCurved(torch.autograd.Function):
    """The moments' gradient, whose own gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / 2


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return moments(x)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        centered = x - x.mean(dim=(0, 2, 3), keepdim=True)
        pixels = x.numel() // x.shape[1]
        gradient = (of_mean[:, None, None] + 2 * of_var[:, None, None] * centered) / pixels
        return _HalfCurved.apply(gradient)  # type: ignore[no-any-return]


def wrong_second(x: Tensor) -> tuple[Tensor, Tensor]:
    return _Moments.apply(x)  # type: ignore[no-any-return]


_calls = count()


def changing(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = moments(x)
    return mean, var * (1 + 1e-6 * (next(_calls) % 3))


def crash(x: Tensor) -> tuple[Tensor, Tensor]:
    ctypes.string_at(0)
    return moments(x)


def endless(x: Tensor) -> tuple[Tensor, Tensor]:
    while True:
        time.sleep(0.01)


def slow(x: Tensor) -> tuple[Tensor, Tensor]:
    time.sleep(0.02)
    return moments(x)


def raising(x: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available\nfor this device")


FAULTS = {f.__name__: f for f in (wrong, not_a_number, wrong_second, changing, crash, endless, slow, raising)}


def _supports(call: dispatch.Call) -> str | None:
    return "odd channels alone" if call.shape[1] % 2 == 0 else None


backends: Any = dispatch.ops()["moments"]
backends.pop("native", None)
backends.pop("triton", None)
backends |= {name: dispatch.Backend(dispatch.always, run) for name, run in FAULTS.items()}
backends["refusing"] = dispatch.Backend(_supports, moments)
