"""Chooses the device of a command, and checks that the kernels asked for can serve it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raccgan.errors import InputError
from raccgan.kernels import dispatch


def pick_device(name: str, local_rank: int | None = None, local_world: int = 1) -> torch.device:
    """The torch device of a name: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto`` is a GPU where torch can use one.

    Rank ``local_rank`` of the ``local_world`` ranks of this machine has the GPU of that number; it is None in a process
    of its own. An InputError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"no device called {name!r}; there are cpu, cuda, cuda:1 ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "no driver or no GPU was found" if torch.version.cuda else "this PyTorch was built without CUDA"
        raise InputError(f"--device {name}: {built}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are only {torch.cuda.device_count()} GPUs")
    if name.startswith("cuda:") and local_world > 1 and device.index != local_rank:
        raise InputError(f"--device {name}: with several ranks on a machine each takes its own; say --device cuda")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: raccgan runs on cpu and cuda")
    return device


def require_kernels(kernels: str, device: torch.device) -> None:
    """Raise an InputError, with the way out, if the kernels asked for cannot serve every op on the device."""
    try:
        dispatch.require(kernels, device)
    except dispatch.KernelError as error:
        raise InputError(str(error)) from None


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside, float32 on a GPU is float32, which PyTorch's convolutions are not by themselves: they round to TF32, with
    10 bits of fraction. And cuDNN takes algorithms that give the same bits each time.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    conv: Any = cudnn.conv  # type: ignore[attr-defined]  # PyTorch declares none
    before = conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark
    try:
        conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark = "ieee", "ieee", True, False
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def settle(device: torch.device, *, compiled: bool = False) -> None:
    """Make a forked child fit to compute; called before anything is.

    PyTorch's threads do not survive a fork, and work for several would wait for them for ever. So a forked child
    computes in one thread. Processes that are started anew (the method spawn) are left as they are.

    Raises:
        InputError: a forked child cannot use a GPU, nor steps that torch.compile made for several threads.
    """
    global _forked
    if not _forked:
        return
    if device.type == "cuda" or compiled:
        what = "a GPU" if device.type == "cuda" else "torch.compile"
        raise InputError(
            f"{what} does not work in a forked process: start processes by the method spawn, such as "
            "multiprocessing.get_context('spawn'), and load the detector in each"
        )
    torch.set_num_threads(1)
    _forked = False
