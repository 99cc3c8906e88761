"""Every Triton kernel and configuration that ships, compiled ahead of time for GPUs that are not here.

    python -m tests.kernels.ahead [FAMILY ...]

prints registers, shared memory, spills and matrix instructions of each, and fails where one spills or does not fit.
The families plug in by a function each in ``shipped.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from raccgan.kernels import dispatch, triton_runtime
from tests.kernels.shipped import Compilation, compilations

SIZES = {"any": 0, "multiples of 16": 16, "all 1": 1}
"""What Triton finds out about the integers of a launch, and compiles apart: a 1 becomes a constant."""

ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}
"""Compute capability, and the shared memory that a program may have there, in bytes."""


# Bytes that a kernel may spill. Triton 3.9 spills two words of one kernel, at 56 registers of 255: for no want of them.
SPILLED = 8


@dataclass(frozen=True)
class Compiled:
    """What one compilation came to on one architecture."""

    family: str
    name: str
    architecture: int
    registers: int  # a thread
    spilled: int  # bytes, stores and loads
    shared: int  # bytes
    matrix: str  # the matrix instruction in use, or nothing

    @property
    def fault(self) -> str | None:
        if self.spilled > SPILLED:
            return f"spills {self.spilled} bytes"
        limit = ARCHITECTURES[self.architecture]
        return f"{self.shared} bytes of shared memory, {limit} are there" if self.shared > limit else None

    def __str__(self) -> str:
        numbers = f"{self.registers:>4} {self.shared / 1024:>7.1f}K {self.spilled:>6} {self.matrix or '-':<6}"
        return f"{self.family:<20} sm_{self.architecture} {numbers} {self.name}" + (
            f"  {self.fault}" if self.fault else ""
        )


def families() -> list[str]:
    """Those that have Triton kernels."""
    return [name for name, implementations in dispatch.ops().items() if "triton" in implementations]


def compile_all(family: str, every: int = 1) -> Iterator[Compiled]:
    """Everything for sizes that are multiples of 16, as the models' are; each kernel once for others too.

    With ``every`` only that share of the configurations, and each kernel once.
    """
    seen = set()
    for number, compilation in enumerate(compilations(family)):
        first = compilation.kernel.__name__ not in seen
        if not first and number % every:
            continue
        for architecture in ARCHITECTURES:
            yield compile_one(family, compilation, architecture, "multiples of 16")
        if first:
            seen.add(compilation.kernel.__name__)
            for sizes in ("any", "all 1"):
                yield compile_one(family, compilation, max(ARCHITECTURES), sizes)


def compile_one(family: str, compilation: Compilation, architecture: int, sizes: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = compilation.kernel, dict(compilation.constants)
    integers = [name for name, kind in compilation.signature.items() if kind == "i32"]
    typed = dict(compilation.signature)
    if SIZES[sizes] == 1:
        constants |= dict.fromkeys(integers, 1)
        typed = {name: kind for name, kind in typed.items() if name not in integers}
    # In the kernel's own order; a constant that the kernel has no parameter for would be a mistake here.
    signature = {name: typed.get(name, "constexpr") for name in kernel.arg_names}
    if (constants.keys() | typed.keys()) != signature.keys():
        raise ValueError(f"{kernel.__name__}: {sorted(signature)} are not {sorted({**constants, **signature})}")
    # PyTorch's tensors start at multiples of 16 bytes.
    kinds = ("*", "i32") if SIZES[sizes] == 16 else ("*",)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith(kinds)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": compilation.num_warps, "num_stages": compilation.num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(ptx)
    matrix = next((name for name in ("wgmma", "mma") if re.search(rf"\b{name}[._]", ptx)), "")
    shared, title = int(compiled.metadata.shared), f"{_title(compilation)}; sizes {sizes}"
    return Compiled(family, title, architecture, registers, spilled, shared, matrix)


def _resources(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the assembler says them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (sm_(\d+)\w*)", ptx, re.MULTILINE)
    assert target is not None
    assembler = get_ptxas(int(target[2])).path  # releases bring two, an older one for older GPUs
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [assembler, "-v", f"-arch={target[1]}", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills is not None, said
    assert registers is not None, said
    return int(registers[1]), int(spills[1]) + int(spills[2])


def _title(compilation: Compilation) -> str:
    types = "".join(dict.fromkeys(re.findall(r"\*(\w+)", " ".join(compilation.signature.values()))))
    shown = " ".join(f"{name}={value}" for name, value in compilation.constants.items() if value is not None)
    absent = [name for name, value in compilation.constants.items() if value is None]
    without = f" without {','.join(absent)}" if absent else ""
    return f"{compilation.kernel.__name__} {types} {shown} warps={compilation.num_warps}{without}"


def main(arguments: list[str]) -> int:
    if triton_runtime.triton is None:
        print("Triton is missing: nothing can be compiled")
        return 2
    print(f"Triton {triton_runtime.triton.__version__}, PyTorch {torch.__version__}")
    print(f"{'family':<20} {'target':<5} {'regs':>5} {'shared':>8} {'spills':>6} {'matrix':<6} kernel")
    faults = 0
    every = next((int(a.partition("=")[2]) for a in arguments if a.startswith("--every=")), 1)
    for family in [a for a in arguments if not a.startswith("--")] or families():
        for compiled in compile_all(family, every):
            print(compiled, flush=True)
            faults += compiled.fault is not None
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
