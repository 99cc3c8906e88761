"""A compiled step is the step up to rounding, or is refused, or replayed with a line that says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.measure import Contestant, checked_or_raises
from raccgan import train
from raccgan.errors import InputError
from raccgan.models import compiling
from raccgan.models.trace import TracedStep
from tests.cli.test_commands import refused
from tests.conftest import TINY_OPTIONS
from tests.kernels.compare import assert_each_close
from tests.models.test_trace import Make, calls_of, squares, steps
from tests.training.test_loop import weights


def test_a_compiled_step_of_one_convolution_is_the_step_up_to_rounding() -> None:
    """The short run's own compilation; the next test has whole networks."""
    torch._dynamo.reset()
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    wanted = torch.autograd.grad(squares(model)(x)[0], list(model.parameters()))
    said: list[str] = []
    TracedStep(squares(model), list(model.parameters()), [model], compiled=True, warn=said.append)(x)
    assert said == [], "it was replayed, not compiled"
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert_each_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_a_compiled_step_is_the_step_up_to_rounding(tiny: Make) -> None:
    """With odd widths, and two threads, for which torch.compile makes other code than for one."""
    settings = {"base_width": 5, "attention_encoder": "all", "attention_discriminator": "all"}
    torch._dynamo.reset()
    torch.set_num_threads(2)
    try:
        (_, plain), (_, compiled) = (tiny(folder=name, **settings) for name in ("plain", "compiled"))
        compiled.trace(compiled=True)
        wanted, got = steps(plain), steps(compiled)
    finally:
        torch.set_num_threads(1)
    for a, b in zip(got, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert got != wanted, "not one bit differs: was anything compiled?"
    for name, network in compiled.networks.items():
        same = dict(plain.networks.items())[name]
        for (key, value), other in zip(network.named_buffers(), same.buffers(), strict=True):
            assert_each_close(value, other, rtol=1e-2, atol=1e-3, what=f"{name}.{key}")


def test_a_loss_that_is_not_finite_is_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiled", lambda graph, what, **options: graph)
    model = nn.Linear(3, 2)
    terms = TracedStep(squares(model), list(model.parameters()), [model], compiled=True)(torch.full((5, 3), torch.nan))
    assert terms["loss"].isnan()


def miscompile(monkeypatch: pytest.MonkeyPatch, term: float, gradient: float) -> None:
    """Have what torch.compile makes return other terms and gradients, by these factors."""

    def wrong(graph: Callable[..., Any], what: str, **options: Any) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            terms, gradients = graph(*inputs)
            return {name: value * term for name, value in terms.items()}, [g * gradient for g in gradients]

        return run

    monkeypatch.setattr(compiling, "compiled", wrong)


@pytest.mark.parametrize(("term", "gradient"), [(2.0, 1.0), (float("nan"), 1.0), (1.0, 0.5), (1.0, float("nan"))])
def test_what_is_compiled_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch, term: float, gradient: float) -> None:
    miscompile(monkeypatch, term, gradient)
    model = nn.Linear(3, 2)
    traced = TracedStep(squares(model), list(model.parameters()), [model], compiled=True)
    with pytest.raises(InputError, match=r"torch\.compile computes something else than the training step: (loss|grad)"):
        traced(10 * torch.randn(5, 3))


@pytest.mark.parametrize(
    ("term", "fails"), [(2.5, False), (0.4, False), (4.0, True), (0.2, True), (float("inf"), True)]
)
def test_in_bfloat16_only_what_no_rounding_explains_is_refused(
    monkeypatch: pytest.MonkeyPatch, term: float, fails: bool
) -> None:
    miscompile(monkeypatch, term, 1.0)
    model = nn.Linear(3, 2)
    traced = TracedStep(squares(model), list(model.parameters()), [model], compiled=True, rounded=True)
    with pytest.raises(InputError) if fails else nullcontext():
        traced(50 * torch.ones(5, 3))


@pytest.mark.long
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_step_says_so_and_is_replayed(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    (_, plain), (_, training) = (tiny(folder=name) for name in ("plain", "compiled"))
    plain.trace()
    training.compiled = True
    for one in (plain, training):
        ran = calls_of(one)
        one.run("gan")
    assert ran.count("generator") < 2 * training.steps["gan"], "every step went through autograd"
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "does not compile" in line)
    assert re.search(
        r"the training step does not compile here: .*No working C\+\+ compiler.*; it goes on without", line
    )
    wanted = weights(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(training).items())


def test_a_compiler_that_fails_is_named_by_the_first_paragraph(failing_compiler: None) -> None:
    """As where PyTorch writes C++ that does not compile: with a ``warn`` the step goes on, without it raises."""
    model = nn.Linear(3, 2)
    said: list[str] = []
    step = TracedStep(squares(model), list(model.parameters()), [model], compiled=True, warn=said.append)
    x = torch.randn(5, 3)
    wanted = torch.autograd.grad(squares(model)(x)[0], list(model.parameters()))
    step(x)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True) if p.grad is not None)
    (line,) = said
    assert line.startswith("the training step does not compile here: ")
    assert "C++ compile error" in line
    assert "declared twice" not in line, "a compiler's whole output is no line"
    with pytest.raises(compiling.CompileError, match=r"C\+\+ compile error"):
        TracedStep(squares(model), list(model.parameters()), [model], compiled=True)(x)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_benchmark_row_says_that_a_step_does_not_compile(compiled: bool) -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    step = TracedStep(squares(model), list(model.parameters()), [model], compiled=compiled)
    contestant = Contestant("ours", "channels_last", False, True, lambda: list(step(x).values()), lambda: step(x))
    found = checked_or_raises(contestant, compiling.CompileError)
    assert ("does not compile here" in found.raises) == compiled
    assert compiled or torch.equal(found.check()[0], squares(model)(x)[0])


@pytest.fixture
def failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A C++ compiler that answers questions about itself, and compiles nothing that PyTorch generates."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*|*-dumpversion*|*-print*) exec g++ "$@";; esac\n'
        "echo 'kernel.cpp:1: error: tmp0 is declared twice' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        yield


def test_the_command_says_what_it_cannot_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    line = refused(capsys, train, "--compile", "--kernels", "reference", "--out", out, *TINY_OPTIONS)
    assert "--compile works not with --kernels reference" in line
    assert not out.exists()
