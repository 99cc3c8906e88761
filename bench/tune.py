"""``python -m bench.tune``: the Triton kernels' configurations, measured at the layers of the two published models.

    python -m bench.tune                              # on a GPU: kernels/tuned.json, which comes with the package
    python -m bench.tune --minutes 5                  # as far as it comes; what was found is kept
    python -m bench.tune --file ~/.cache/raccgan/triton.json cbam

Every op is run once in each pass, in bfloat16 and in float32, with RACCGAN_TUNE=1: :mod:`raccgan.kernels.tuning` says
what that does. The batch has no part in a configuration, so each layer is measured with one.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from bench import layers
from bench.layers import Arguments
from bench.measure import Case
from bench.peers import THROUGH, in_precision, op_case, sample_of
from raccgan.errors import InputError
from raccgan.kernels import backend, tuning
from raccgan.outputs.progress import Progress
from tests.kernels.grid import FAMILIES

DTYPES = (torch.bfloat16, torch.float32)
LARGEST = 16  # batch; a larger one takes no other configuration, and longer


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--file", type=Path, default=tuning.SHIPPED, help="the table (default: %(default)s)")
    given = parser.parse_args(argv)
    if unknown := set(given.ops) - FAMILIES.keys():
        parser.error(f"no op is called {sorted(unknown)[0]}; choose from {', '.join(FAMILIES)}")
    try:
        require_a_gpu()
    except (InputError, backend.KernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ |= {"RACCGAN_TUNE": "1", "RACCGAN_TUNING": str(given.file)}
    end = time.monotonic() + 60 * given.minutes
    cases = [one for one in all_cases() if not given.ops or one[0].op in given.ops]
    with Progress("cases", len(cases), unit="case") as progress:
        for done, (case, arguments) in enumerate(cases):
            if time.monotonic() > end:
                print(f"{given.minutes:g} minutes are over: {done} of {len(cases)} cases are tuned")
                break
            run_once(case, arguments)
            progress.update()
    print(f"kept in {given.file}")
    return 0


def require_a_gpu() -> None:
    """Raises:
    InputError, KernelError: nothing can be measured here, and why.
    """
    if not torch.cuda.is_available():
        raise InputError("there is no GPU here to measure on; tuned.json is made where there is one")
    backend.require("triton", torch.device("cuda"))


def all_cases(device: str = "cuda") -> Iterator[tuple[Case, Arguments]]:
    """What a scorer waits for first; a layer once, whatever the batch."""
    for pass_ in THROUGH:
        for dtype in DTYPES:
            for op, family in FAMILIES.items():
                if "triton" in family.implementations:
                    for name, arguments in layers_of(op, pass_):
                        yield op_case(op, name, arguments, dtype, pass_, device), arguments


def layers_of(op: str, pass_: str) -> Collection[tuple[str, Arguments]]:
    try:
        cases = layers.cases(op, pass_)
    except KeyError:  # the op has no such pass
        return ()
    found: dict[str, tuple[str, Arguments]] = {}
    for name, arguments in cases.items():
        batch, *shape = arguments["shape"]
        if batch <= LARGEST:
            found[str({**arguments, "shape": shape})] = name, arguments
    return found.values()


def run_once(case: Case, arguments: Arguments) -> None:
    run = FAMILIES[case.op].implementations["triton"].run
    THROUGH[case.pass_](in_precision(case, run), sample_of(case, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
