"""Asks a GPU, before a CUDA kernel is offered, whether it could run the compiled ones. Nothing is launched."""

from __future__ import annotations

import ctypes
import functools
import os
import re

import torch

from raccgan.kernels import library, torch_internals

STREAM = "aoti_torch_get_current_cuda_stream"  # as csrc/bindings/on_device.h looks it up


@torch_internals.constant
def refusal(device: torch.device) -> str | None:
    """Why the compiled CUDA kernels cannot run on a GPU, in one line; None where they can, or no GPU can be asked."""
    return _asked(device)[0]


def note(device: torch.device) -> str | None:
    """What a user should know before the first kernel runs, in one line; None for nothing."""
    return _asked(device)[1] if device.type == "cuda" else None


@functools.cache
def _asked(device: torch.device) -> tuple[str | None, str | None]:
    build = library.build()
    if build is None or not build["cuda"] or not torch.cuda.is_available():
        return None, None
    if not _has_stream():
        return f"PyTorch {torch.__version__} has no {STREAM}, by which the CUDA kernels find its stream", None
    capability = torch.cuda.get_device_capability(device)
    return judge(capability, build["cuda_architectures"], build["cuda"], _driver())


def judge(capability: tuple[int, int], architectures: str, toolkit: str, driver: int) -> tuple[str | None, str | None]:
    """Why a GPU cannot run kernels that were compiled so, and otherwise what is worth saying; None each for nothing.

    Args:
        capability: the GPU's compute capability.
        architectures: of the machine code, such as "80, 90"; PTX of the oldest is there too.
        toolkit: the release of CUDA that compiled it, such as "13.0".
        driver: the newest CUDA that the driver serves, as 13000 for 13.0; 0 where it does not say.
    """
    built = [(int(digits[:-1]), int(digits[-1])) for digits in re.findall(r"\d+", architectures)]
    shown = ", ".join(f"{major}.{minor}" for major, minor in built)
    if not built or capability < built[0]:
        return f"the CUDA kernels are compiled for {shown} and later, not for {capability[0]}.{capability[1]}", None
    major, minor = (int(part) for part in toolkit.split(".")[:2])
    code = any(one[0] == capability[0] and one[1] <= capability[1] for one in built)
    # Machine code runs on every driver of the toolkit's major release; PTX only on one that knows the toolkit's own.
    needed = 1000 * major + (0 if code else 10 * minor)
    if 0 < driver < needed:
        serves = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the driver serves CUDA {serves}, and the kernels were compiled by CUDA {toolkit}: update the driver, or "
            "build with an older toolkit"
        ), None
    if code:
        return None, None
    here = f"{capability[0]}.{capability[1]}"
    return None, (
        f"the CUDA kernels hold no machine code for compute capability {here}, and the driver compiles them at their "
        f"first use, which takes about a minute: TORCH_CUDA_ARCH_LIST={here} pip install -e . does it once"
    )


def _driver() -> int:
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _has_stream() -> bool:
    try:
        getattr(ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD), STREAM)
    except (OSError, AttributeError):
        return False
    return True
