"""``raccgan COMMAND``: the commands under one name, and what they say where the compiled library is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raccgan import __version__
from raccgan.__main__ import COMMANDS, main
from raccgan.cli import options
from raccgan.distributed import ranks
from raccgan.distributed.collectives import Collectives
from raccgan.errors import InputError
from raccgan.kernels import library
from tests.conftest import TINY_OPTIONS


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from raccgan.__main__ import main; status = main(['--help'])\n"
        "assert 'torch' not in sys.modules, 'help imports torch'\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name, what in COMMANDS.items():
        assert f"  {name:<11} {what}\n" in done.stdout
        assert import_module(f"raccgan.{name}")
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_it_as_it_was_typed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {"/some/bin/raccgan": "raccgan ", "/some/raccgan/__main__.py": "python -m raccgan "}
    for program, form in typed.items():
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0
        assert said.startswith(f"usage: {form}{command} ")
        assert f"\n  {form}{command}" in said.split("examples:")[1]
        assert "python -m raccgan." not in said


def test_an_error_names_commands_as_they_were_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def untrained(arguments: object) -> int:
        raise InputError("not trained: python -m raccgan.train --resume RUN")

    for program, form in {"/some/bin/raccgan": "raccgan train", "/some/train.py": "python -m raccgan.train"}.items():
        monkeypatch.setattr(sys, "argv", [program])
        assert options.call(untrained, []) == 2
        assert capsys.readouterr().err == f"error: not trained: {form} --resume RUN\n"


def test_words_that_are_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    line = "error: no command called 'trian'; did you mean 'train'? raccgan --help lists all commands\n"
    assert capsys.readouterr().err == line
    assert main(["\x1b[2J"]) == 2
    assert "the commands are train, detect, evaluate" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert main([]) == 2
    assert "usage: raccgan COMMAND" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"raccgan {__version__}\n"


def test_a_command_gets_its_arguments_and_its_status_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    assert f"error: no checkpoint at {tmp_path / 'nothing'}" in capsys.readouterr().err


SCRIPT = """\
import sys
from raccgan import calibrate, detect, evaluate, generate, train
from raccgan.cli import options
from raccgan.export import __main__ as export

out, image, *tiny = sys.argv[1:]
run = f"{out}/run"
for module, *arguments in (
    (train, "--out", run, *tiny),
    (evaluate, run, "--out", f"{out}/evaluated"),
    (detect, run, image, "--out", f"{out}/detected"),
    (generate, run, "--count", "2", "--out", f"{out}/generated"),
    (calibrate, run, image),
    (export, run, "--format", "torch", "--out", f"{out}/exported"),
):
    options.note_missing_library.cache_clear()  # as in a process of its own
    print(f"== {module.__name__}", file=sys.stderr)
    status = options.call(module.main, arguments)
    assert status == 0, (module, status)
"""


@pytest.mark.long
def test_every_command_says_once_that_the_library_is_missing(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "image.png")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "image.png"), *TINY_OPTIONS]
    missing = os.environ | {"RACCGAN_LIBRARY": "/nonexistent.so"}
    done = subprocess.run(command, env=missing, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    _, *parts = done.stderr.split("== ")
    assert len(parts) == 6
    note = "note: --kernels fused runs on PyTorch alone, which is slower: the compiled library does not load: "
    for part in parts:
        lines = [line for line in part.splitlines() if line.startswith("note: --kernels fused")]
        assert len(lines) == 1, part
        assert lines[0].startswith(note)
        assert "/nonexistent.so" in lines[0]


def test_other_kernels_other_ranks_and_a_library_that_is_there_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = options.note_missing_library.__wrapped__
    monkeypatch.setattr(library, "why_not", lambda: "it is gone")
    note("reference")
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "_job", Collectives(rank=1, world=2))
        note("fused")
    assert capsys.readouterr().err == ""
    note("fused")
    assert capsys.readouterr().err == "note: --kernels fused runs on PyTorch alone, which is slower: it is gone\n"
    monkeypatch.setattr(library, "why_not", lambda: None)
    note("fused")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(library, "build", lambda: {"cuda": "", "why_no_cuda": "nvcc failed"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    note("fused")
    expected = "note: the CUDA C++ kernels were left out when raccgan was built: nvcc failed\n"
    assert capsys.readouterr().err == expected


def test_a_checkout_that_hides_the_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, installed = tmp_path / "checkout" / "raccgan", tmp_path / "site-packages" / "raccgan"
    for package in (checkout, installed):
        package.mkdir(parents=True)
    monkeypatch.delenv("RACCGAN_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_PACKAGE", checkout)
    monkeypatch.setattr(sys, "path", [str(checkout.parent), str(installed.parent)])
    why_not = library.why_not.__wrapped__
    assert why_not() == (
        'the compiled library is not built: run "pip install -e ." with PyTorch and a C++ compiler there'
    )
    (installed / "_native.abi3.so").touch()
    assert f"is not built in {checkout}, which hides the installed {installed}: " in why_not()
