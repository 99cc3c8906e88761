"""``python -m raccgan.doctor``: says which backend serves which op on this machine, and why the others do not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from raccgan import __version__
from raccgan.cli import options

if TYPE_CHECKING:
    import torch


def main(arguments: Sequence[str]) -> int:
    options.Parser(
        "doctor",
        "Print what runs where: versions, the compiled library, and for each op and device the backend that --kernels "
        "fused takes, with the reason for each one that it does not take.",
        "  python -m raccgan.doctor\n",
    ).parse_args(arguments)

    import torch

    from raccgan.kernels import library, triton_runtime

    print(f"raccgan {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}")
    print(f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(i)
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {capability}")
    else:
        print("GPU: none that this PyTorch can use" + ("" if torch.version.cuda else " (it was built without CUDA)"))
    build = library.build()
    if build is None:
        print(f"compiled library: none; {library.why_not()}")
    else:
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}"
        if not build["cuda"]:
            cuda = f"no CUDA part ({build['why_no_cuda']})"
        print(f"compiled library: CPU {', '.join(build['cpu_targets'])}, using {build['cpu_capability']}; {cuda}")
    print(f"Triton: {triton_runtime.state()}")
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"\n--kernels fused on {kind}")
        for line in _choices(torch.device(kind)):
            print(line)
    return 0


def _choices(device: torch.device) -> Iterator[str]:
    """For every op, the backend that ``fused`` takes on ``device``, and why not the others; a line for like dtypes."""
    import torch

    from raccgan.kernels import dispatch
    from raccgan.kernels.depthwise_separable import LIBRARY

    for op, backends in dispatch.ops().items():
        served: dict[str, tuple[list[str], dict[str, str]]] = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            call = dispatch.Call(device, dtype)
            choice = dispatch.choose(op, backends, "fused", call)
            refused = {name: reason for name, one in backends.items() if (reason := one.supports(call))}
            dtypes, _ = served.setdefault(choice.name, ([], {**refused, **choice.refused}))
            dtypes.append(str(dtype).removeprefix("torch."))
        for name, (dtypes, reasons) in served.items():
            yield f"  {op:<20} {name:<10} {', '.join(dtypes)}"
            if (op, name, device.type) == ("depthwise_separable", "native", "cpu"):
                for dtype, reason in LIBRARY.items():
                    kind = str(dtype).removeprefix("torch.")
                    yield f"  {'':<20} matrix products in {kind} are PyTorch's: {reason}"
            for other, reason in reasons.items():
                yield f"  {'':<20} not {other}: {reason}"


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
