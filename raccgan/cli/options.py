"""Options that are made from the settings, and one clear line for every error, for all commands; without torch."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from raccgan.cli.memory import keep_freed
from raccgan.config import Config
from raccgan.distributed import ranks
from raccgan.errors import InputError
from raccgan.outputs.terminal import one_line, say

_METAVARS = {str: "NAME", int: "N", float: "X"}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line, examples left as they are written, and commands as the user types them."""

    def __init__(self, command: str, description: str, examples: str, arguments: str = "") -> None:
        """``arguments`` stand before the options in the line on usage, such as ``RUN IMAGE ...``. RUN is added here."""
        prog = as_typed(f"python -m raccgan.{command}")
        super().__init__(
            prog=prog,
            usage=" ".join(filter(None, (prog, arguments, "[option ...]"))),
            description=description,
            epilog=as_typed(f"examples:\n{examples}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if arguments.startswith("RUN"):
            self.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or its checkpoint")

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"error: {message}; {self.prog} --help shows all options") + "\n")


def as_typed(text: str) -> str:
    """``text`` with ``python -m raccgan.train`` and the like in the form in which the user called this process."""
    program = Path(sys.argv[0])
    if program.name == "raccgan":
        return text.replace("python -m raccgan.", "raccgan ")
    if program.parts[-2:] == ("raccgan", "__main__.py"):
        return text.replace("python -m raccgan.", "python -m raccgan ")
    return text


def add_settings(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """An option a setting of :class:`Config`, in groups, or those of ``only`` in none; absent where it is not given."""
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(Config):
        if only is not None and f.name not in only:
            continue
        heading = f.metadata["group"]
        if only is None and heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        choices = f.metadata["choices"]
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        shown = f"{text} (default: {f.default})" if f.default not in ("", None) else text
        groups.get(heading, parser).add_argument(
            f"--{f.name.replace('_', '-')}",
            dest=f.name,
            type=type(f.default),
            default=argparse.SUPPRESS,
            metavar=_METAVARS[type(f.default)],
            help=shown.replace("%", "%%"),
        )


def add_places(
    parser: argparse.ArgumentParser, *, data_root: bool = True, device: bool = True, out: str | None = ""
) -> None:
    """Options for the folders of data and results (None: no results), and for the device."""
    group = parser.add_argument_group("places")
    if data_root:
        group.add_argument(
            "--data-root",
            type=Path,
            default=Path(os.environ.get("RACCGAN_DATA") or "data"),
            metavar="FOLDER",
            help="where data sets lie (default: the environment variable RACCGAN_DATA, else ./data)",
        )
    if device:
        group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    if out is None:
        return
    group.add_argument(
        "--out",
        type=Path,
        default=Path(out) if out else None,
        metavar="FOLDER",
        help=f"where the results go (default: {out or 'a folder below runs, or that of the run'})",
    )


def add_label_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label-policy",
        default="minimum",
        metavar="POLICY",
        help="minimum: score under the normal class that fits best; or the name of the one normal class that the "
        "images are known to belong to, if normal (default: minimum)",
    )


def add_threshold(parser: argparse.ArgumentParser) -> None:
    """Three ways to the threshold, of which one may be given; absent ones are None."""
    group = parser.add_argument_group("decision (an image is anomalous where its score is above the threshold)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--threshold", type=float, metavar="X", help="this threshold")
    one.add_argument(
        "--quantile", type=float, metavar="X", help="this quantile of the held-out normal images' scores, such as 0.99"
    )
    one.add_argument(
        "--sensitivity",
        type=float,
        metavar="X",
        help="the lowest threshold that at most this share of the held-out normal images exceeds: 0.01 accepts one "
        "false alarm in a hundred normal images, 0.1 finds more and accepts ten",
    )


def settings_of(arguments: argparse.Namespace, but: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that were given on the command line, ``but`` left out."""
    names = {f.name for f in dataclasses.fields(Config)} - set(but)
    return {name: value for name, value in vars(arguments).items() if name in names}


def pick_device(name: str) -> Any:
    """The torch device of that name; ``auto`` is a GPU where torch can use one. Each rank has its own GPU."""
    from raccgan.models import devices

    settle_libraries()
    place = ranks.place_in()
    return devices.pick_device(name, place.local_rank if place.world > 1 else None, place.local_world)


def settle_libraries() -> None:
    """What a command's own process asks of PyTorch and Matplotlib before it works.

    PyTorch counts the processors of the machine, of which a container may have a small share: no more threads than the
    quota grants, unless the environment says how many. Where there is no home, Matplotlib says in three lines that its
    cache is a temporary one: nobody can mend that.
    """
    import logging

    import torch

    from raccgan.data.cpus import quota_cpus

    if "OMP_NUM_THREADS" not in os.environ and quota_cpus() < torch.get_num_threads():
        torch.set_num_threads(quota_cpus())
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


@functools.cache
def note_missing_library(kernels: str) -> None:
    """Say on standard error what ``fused`` lacks of the compiled library, and why; on rank 0 alone."""
    if kernels != "fused" or not ranks.job().first:
        return
    import torch

    from raccgan.kernels import library

    if reason := library.why_not():
        say(f"note: --kernels fused runs on PyTorch alone, which is slower: {reason}")
    elif (build := library.build()) and not build["cuda"] and torch.cuda.is_available():
        say(f"note: the CUDA C++ kernels were left out when raccgan was built: {build['why_no_cuda']}")


def call(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a command; what a person can mend is one line on standard error, and status 2. A rank's process ends here."""
    keep_freed()
    try:
        try:
            status = command(arguments)
        except BaseException as error:
            ranks.leave(error)
            raise
        ranks.leave()
        print(end="", flush=True)  # what cannot be written is said here and not at the end of Python
    except InputError as error:
        status = _error(error)
    except KeyboardInterrupt as stop:
        print("\n" + one_line(str(stop) or "interrupted"), file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # Whoever read our output has gone, as `| head` does; Python would complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        status = _error(f"{where}{error.strerror}")
    except MemoryError:
        status = _error("the machine's memory is full; lower --batch-size or --score-batch")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        status = _error("the GPU's memory is full; lower --batch-size or --score-batch")
    ranks.end(status)
    return status


def _error(reason: object) -> int:
    say(as_typed(f"error: {reason}"))
    return 2
