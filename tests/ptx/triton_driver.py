"""Triton's kernels on CPU tensors: compiled by Triton for compute capability 8.0, and their PTX run by the machine.

``install()`` makes it Triton's driver. ``take_over_raccgan()`` also makes raccgan take its Triton kernels for CPU
tensors.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

from tests.ptx import build, machine

os.environ.setdefault("TRITON_CACHE_DIR", str(build.FOLDER / "triton"))  # cubins there are PTX: see install

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia

CAPABILITY = int(os.environ.get("PTX_CAPABILITY", "80"))
_SCALARS = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64, "fp32": ctypes.c_float, "f32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


class _Function:
    def __init__(self, module: machine.Module, name: str, shared: int) -> None:
        self.module, self.name, self.shared = module, name, shared


class _Utils:
    """What Triton asks of a device."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        module = machine.Module(binary.decode())
        if shared > 48 * 1024:
            module.allow_shared(name, shared)
        return module, _Function(module, name, shared), 0, 0, 1024  # no registers known, no spills


class _Launcher:
    """Called as ``(grid x, y, z, stream, function, metadata, launch metadata, two hooks, *arguments)``."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.threads = 32 * metadata.num_warps
        if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("clusters and scratch memory are not there")

    def __call__(self, x: int, y: int, z: int, stream: int, function: _Function, *rest: Any) -> None:
        values = [_value(kind, a) for kind, a in zip(self.types, rest[4:], strict=True) if kind != "constexpr"]
        scratch = [ctypes.c_void_p(), ctypes.c_void_p()]
        function.module.launch(function.name, (x, y, z), (self.threads,), *values, *scratch, shared=function.shared)


def _value(kind: str, argument: Any) -> Any:
    if kind.startswith("*"):
        return ctypes.c_void_p(argument if argument is None or isinstance(argument, int) else argument.data_ptr())
    return _SCALARS[kind](argument)


class Driver(DriverBase):
    """Triton's driver for the machine: one device, of :data:`CAPABILITY`."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("times here say nothing of a GPU's")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(CAPABILITY, 10)


def install() -> None:
    """Make the machine Triton's driver. A compilation ends with PTX: ptxas is left out."""
    nvidia.CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    triton.runtime.driver.set_active(Driver())


def take_over_raccgan() -> None:
    """All else is as on a GPU."""
    from raccgan.kernels import dispatch, triton_runtime
    from raccgan.kernels.depthwise_separable import op

    install()
    supports = triton_runtime.supports

    def but_a_gpu(*arguments: Any) -> str | None:
        reason = supports(*arguments)
        return None if reason is not None and reason.startswith("Triton needs a GPU") else reason

    triton_runtime.supports = but_a_gpu
    for backends in (*dispatch.ops().values(), op.POINTWISE):
        backends["triton"] = dispatch.Backend(but_a_gpu, backends["triton"].run)
