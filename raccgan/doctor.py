"""``python -m raccgan.doctor``: says which backend serves which op on this machine, and why the others do not.

With ``--qualify`` it tries them first: values, gradients and second derivatives beside float64, then times.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raccgan import __version__
from raccgan.cli import options
from raccgan.config import PRESETS, Config, make_config
from raccgan.errors import InputError
from raccgan.outputs.files import write_csv
from raccgan.outputs.terminal import say

if TYPE_CHECKING:
    import torch

    from raccgan.kernels.qualification.record import Recorded
    from raccgan.kernels.qualification.table import Rows

EXAMPLES = """  python -m raccgan.doctor
  python -m raccgan.doctor --qualify --preset mvtec
      try every kernel that training and scoring with that preset call, and keep what was found
  python -m raccgan.doctor --qualify --report gpu.csv
      the same for all presets, and a file of all times and reasons to send to the authors
"""

COLUMNS = (
    *("op", "case", "dtype", "layout", "pass", "implementation", "median_ms", "best_peer", "versus_best_peer"),
    *("max_rel_error", "taken", "reason", "device", "driver", "PyTorch", "Triton", "kernels"),
)


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    if not given.qualify and (given.report or given.preset):
        raise InputError("--report and --preset belong to --qualify: add it")
    device = options.pick_device(given.device)

    import torch

    from raccgan.kernels import library, triton_runtime
    from raccgan.kernels.qualification import run

    if given.qualify:
        _qualify(given, device)
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
        here = torch.device(kind)
        print(f"\n--kernels fused on {kind}" + (", where nothing was tried" if not (rows := run.known(here)) else ""))
        for line in _choices(here):
            print(line)
        for line in _found(rows):
            print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        "doctor",
        "Print what runs where: versions, the compiled library, and for each op and device the backend that --kernels "
        "fused takes, with the reason for each one that it does not take.",
        EXAMPLES,
    )
    parser.add_argument("--device", default="auto", help="what to try: cpu, cuda, cuda:1 ... (default: a GPU, if any)")
    parser.add_argument(
        "--qualify",
        action="store_true",
        help="try every backend in a process of its own: values and derivatives beside float64, then times; from then "
        "on --kernels fused takes the fastest that was right, on a CPU too",
    )
    parser.add_argument(
        "--preset", action="append", metavar="NAME", help="whose calls to try, may be repeated (default: all presets')"
    )
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X", help="of trying, at most (default: 10)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a CSV table of all that is known of the device")
    return parser


def _qualify(given: argparse.Namespace, device: torch.device) -> None:
    from raccgan.kernels.qualification.run import Limits
    from raccgan.models.qualifying import try_all

    if unknown := sorted({*(given.preset or ())} - PRESETS.keys()):
        raise InputError(f"no preset called {unknown[0]!r}; there are {', '.join(PRESETS)}")
    calls = [call for name in given.preset or PRESETS for call in _calls(make_config(name, {}), device)]
    rows = try_all(calls, device, limits=Limits(all=60 * given.minutes))
    if not rows:
        raise InputError("nothing was tried: unset RACCGAN_QUALIFY, or give more --minutes")
    if given.report is not None:
        _report(given.report, rows, device)
        say(f"{given.report}: {len(rows)} classes of calls; sent to the authors, it becomes a table of bench/results")


def _calls(config: Config, device: torch.device) -> Iterator[Recorded]:
    """What training and scoring call, for two classes of images: their number changes no op's shape."""
    from raccgan.models.networks import build
    from raccgan.scoring.scorer import ScoreModule, for_inference
    from raccgan.training.calls import calls

    channels = config.channels or (1 if config.image_size < 64 else 3)
    yield from calls(config, 2, channels, device)
    networks = build(config, channels=channels, classes=2, device=device)
    module = ScoreModule(for_inference(networks), [0, 1], config).to(device)
    yield from module.calls(max(1, config.score_batch // 2), config.image_size)


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


def _found(rows: Rows) -> Iterator[str]:
    """What was tried, class by class."""
    if rows:
        yield "\nwhere it was tried (milliseconds of all calls of a class together)"
    for kind, row in sorted(rows.items()):
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(row.milliseconds.items(), key=lambda item: item[1]))
        yield f"  {kind}: {row.order[0] if row.order else 'PyTorch'}" + (f" ({times} ms)" if times else "")
        for name, reason in row.refused.items():
            yield f"  {'':<20} not {name}: {reason}"


def _report(path: Path, rows: Rows, device: torch.device) -> None:
    from raccgan.kernels.qualification import cache, table
    from raccgan.kernels.qualification.run import PYTORCH

    circumstances = cache.circumstances(table.indexed(device))
    lines = []
    for kind, row in sorted(rows.items()):
        case = f"{'x'.join(map(str, kind.shape))}{f' k{kind.kernel_size}' if kind.kernel_size else ''}"
        peers = {name: ms for name, ms in row.milliseconds.items() if name in PYTORCH}
        best = min(peers, key=lambda name: peers[name], default=None)
        for name in dict.fromkeys((*row.milliseconds, *row.refused)):
            ms, error = row.milliseconds.get(name), row.errors.get(name)
            lines.append(
                [
                    kind.op, case, kind.dtype, "channels_last", "calls of a step and a score", name,
                    None if ms is None else f"{ms:.4g}", best,
                    None if ms is None or best is None else f"{peers[best] / ms:.3g}",
                    None if error is None else f"{error:.1e}",
                    "yes" if row.order[:1] == (name,) else "no", row.refused.get(name),
                    *(circumstances[column] for column in COLUMNS[-5:]),
                ]
            )  # fmt: skip
    write_csv(path, COLUMNS, lines)


if __name__ == "__main__":
    sys.exit(options.call(main, sys.argv[1:]))
