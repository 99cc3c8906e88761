"""``python -m raccgan.doctor``: which implementation serves which op here, and why not the others."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raccgan import __version__
from raccgan.cli import options

if TYPE_CHECKING:
    import torch

    from raccgan.kernels.backend import Call
    from raccgan.kernels.measured import Row

EXAMPLES = """\
  python -m raccgan.doctor
"""


def main(arguments: Sequence[str]) -> int:
    options.Parser(
        "Print what runs where: versions, the compiled library, and for each op and device the implementation that "
        "--kernels fused takes, with the reason for each one that it passes over and the measurements it goes by.",
        EXAMPLES,
        prog="python -m raccgan.doctor",
    ).parse_args(arguments)
    for line in _report():
        print(line)
    return 0


def _report() -> Iterator[str]:
    import torch

    from raccgan.kernels import library, triton_runtime

    yield f"raccgan {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    yield f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {torch.cuda.get_device_capability(i)}"
    else:
        yield "GPU: none that this PyTorch can use" + ("" if torch.version.cuda else " (it was built without CUDA)")
    build = library.build()
    if build is None:
        yield f"compiled library: none; {library.why_not()}"
    else:
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no CUDA part"
        yield f"compiled library: CPU {', '.join(build['cpu_targets'])}, using {build['cpu_capability']}; {cuda}"
    yield f"Triton: {triton_runtime.state()}"
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    for device in devices:
        yield ""
        yield from _choices(device)


def _choices(device: torch.device) -> Iterator[str]:
    """For every op, what ``fused`` takes on ``device``, and what it passes over; dtypes served alike share a line."""
    import torch

    from raccgan.kernels import backend
    from raccgan.kernels.depthwise_separable.native_pointwise import LEFT_TO_PYTORCH

    yield f"--kernels fused on {device.type}"
    for family, implementations in backend.families().items():
        served: dict[str, tuple[list[str], dict[str, str]]] = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            call = backend.Call(device, dtype, ())
            try:
                choice = backend.choose(family, implementations, "fused", call)
            except backend.KernelError as error:
                yield f"  nothing: {error}"
                return
            refused = {name: reason for name, one in implementations.items() if (reason := one.can_run(call))}
            dtypes, _ = served.setdefault(choice.name, ([], {**refused, **choice.passed_over}))
            dtypes.append(str(dtype).removeprefix("torch."))
        for name, (dtypes, passed_over) in served.items():
            yield f"  {family:<20} {name:<10} {', '.join(dtypes)}"
            if (family, name, device.type) == ("depthwise_separable", "native", "cpu"):
                for dtype, reason in LEFT_TO_PYTORCH.items():
                    kind = str(dtype).removeprefix("torch.")
                    yield f"  {'':<20} matrix products in {kind} are PyTorch's: {reason}"
            for other, reason in passed_over.items():
                yield f"  {'':<20} not {other}: {reason}"
    yield ""
    yield from _measurements(device)


def _measurements(device: torch.device) -> Iterator[str]:
    """The table by which ``fused`` chooses on ``device``: for each op and class of calls who, and by which times."""
    from raccgan.kernels import backend, measured

    table = measured.table_for(device)
    if table is None:
        otherwise = "no kernel of ours" if device.type == "cuda" else "the first in order of preference that can run"
        yield f"measured on {device.type}: nothing, so --kernels fused takes {otherwise}"
        return
    name = measured.name_of(device)
    here = "" if table.name == name else f", as nothing was on this {name or device.type}"
    yield f"measured on {table.name}{here}: {table.date}, {table.versions}, by {table.command}"
    yield "which --kernels fused goes by, taking for each call the row nearest to it (milliseconds, fastest first):"
    families = backend.families()
    for row in table.rows:
        op, pass_, kind, dtype, channels, side = row.of
        if op in families:
            chosen = backend.choose(op, families[op], "fused", _example(device, row)).name
            times = ", ".join(f"{name} {time:.4g}" for name, time in row.milliseconds.items())
            what = f"{pass_:<8} {kind:<8} {dtype:<8} {f'{channels} @{side}':<9}"
            yield f"  {op:<20} {what} {chosen:<10} {times}"
    for op in families:
        if not any(row.of.op == op for row in table.rows):
            yield f"  {op:<20} not measured"


def _example(device: torch.device, row: Row) -> Call:
    """A call that belongs to the row."""
    import torch

    from raccgan.kernels import backend

    of = row.of
    shape = (1, of.channels, of.side, of.side)
    return backend.Call(device, getattr(torch, of.dtype), shape, of.kind, of.pass_)


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
