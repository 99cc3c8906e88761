"""``raccgan COMMAND ...`` and ``python -m raccgan COMMAND ...`` run a command. This module imports no torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from raccgan import __version__
from raccgan.cli import options
from raccgan.outputs.terminal import say

COMMANDS = {  # each is the module ``raccgan.COMMAND``, and ``python -m raccgan.COMMAND`` runs it too
    "train": "train a model on normal images, and test it",
    "detect": "score images with a trained run: a table of scores and decisions, and a page to look at",
    "evaluate": "test a trained run on the test images of its data set again",
    "calibrate": "give a trained run another threshold",
    "generate": "make images with a trained generator, and compare them with real ones",
    "export": "write a trained run as one ONNX or torch.export graph",
    "experiment": "train and test a table of runs: every normal class, every seed",
    "check": "say what training would understand of a folder of images, and stop",
    "doctor": "say which kernels run on this machine, and why not the others",
}
_WITHIN_A_FOLDER = ("export", "experiment")  # whose ``main`` is in ``raccgan.COMMAND.__main__``

HELP = f"""\
usage: raccgan COMMAND [option ...]

Find anomalous images with a GAN that was trained on normal ones alone.

commands:
{"".join(f"  {name:<11} {what}{chr(10)}" for name, what in COMMANDS.items())}
examples:
  raccgan train
      real handwritten digits, 0 to 4 normal; a few minutes on a CPU, nothing to download
  raccgan train --dataset scans --normal healthy --out runs/scans
      your own folder: one sub-folder a class, such as healthy/ and abnormal/
  raccgan detect runs/scans new-scans --out results --report
      results/scores.csv and results/report.html, the worst images first
  raccgan detect --help
      the options of a command, with examples

`python -m raccgan.train` is the same as `raccgan train`, and under torchrun `-m raccgan.train` is the form to use.
"""


def module_of(command: str) -> ModuleType:
    """The module whose ``main`` runs a command."""
    return import_module(f"raccgan.{command}.__main__" if command in _WITHIN_A_FOLDER else f"raccgan.{command}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (default: those of the process) name; its exit status, 2 for none such."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command, *rest = given or [""]
    if command in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(f"raccgan {__version__}")
        return 0
    if not command:
        print(HELP, end="", file=sys.stderr)
        return 2
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(COMMANDS)};"
        say(f"error: no command called {command!r}; {meant} raccgan --help lists all commands")
        return 2
    return options.call(module_of(command).main, rest)


if __name__ == "__main__":
    sys.exit(main())
