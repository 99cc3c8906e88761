"""A replayed step is the step: the same bits, also behind a gradient penalty."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raccgan.kernels import dispatch
from raccgan.models import checkpoint as checkpoints
from raccgan.models import trace
from raccgan.models.networks import build
from raccgan.models.trace import Replayed, Terms, TracedStep
from raccgan.training import loop
from raccgan.training.loop import Interrupted, Training
from raccgan.training.run import Run
from raccgan.training.steps import Steps
from tests.conftest import tiny_config
from tests.kernels.compare import assert_each_close
from tests.training.test_loop import interrupt_at, weights

Make = Callable[..., tuple[Run, Training]]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    # Of one channel, every memory format is the other one too; smaller images are not moved.
    "colour": {"channels": 3, "image_size": 32, "base_width": 2, "multipliers": "1,1,1,1"},
    "attention": {"attention_discriminator": "all", "attention_encoder": "all"},
    "dense": {"convolution": "dense", "critic_steps": 2},
    "wide": {"image_size": 32, "base_width": 5, "multipliers": "3,2,1,1", "generator_tuning": 0.5},
}

LONG = ("dense", "wide")


def steps(training: Training, count: int = 3) -> list[dict[str, float]]:
    """What so many steps of each phase report; of the last, more, so that some move their images and some do not."""
    reported = []
    phases = {"gan": training.gan_step, "encoder": training.encoder_step, "pathology": training.pathology_step}
    for phase, step in phases.items():
        training.freeze(phase)
        count *= 2 if phase == "pathology" else 1
        for number, (x, y) in zip(range(count), training.batches(phase), strict=False):
            reported.append({name: float(value) for name, value in step(number, x, y).items()})
    return reported


@pytest.mark.parametrize(
    "settings",
    [pytest.param(SETTINGS[name], id=name, marks=pytest.mark.long if name in LONG else ()) for name in SETTINGS],
)
@pytest.mark.parametrize("kernels", ["fused", pytest.param("reference", marks=pytest.mark.long)])
def test_a_traced_step_has_the_bits_of_a_step(tiny: Make, settings: dict[str, Any], kernels: str) -> None:
    """Losses, weights, running moments and singular vectors."""
    (_, plain), (_, traced) = (tiny(folder=name, kernels=kernels, **settings) for name in ("plain", "traced"))
    start = weights(plain)
    traced.trace()
    assert steps(traced) == steps(plain)
    wanted = weights(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(traced).items())
    moved = {name.split(".")[0] for name, value in wanted.items() if not torch.equal(value, start[name])}
    assert moved == {"generator", "discriminator", "encoder", "average", "pathology"}


def calls_of(training: Training) -> list[str]:
    """The networks as their Python runs: a step that is replayed runs none of it."""
    ran: list[str] = []
    for name, network in training.networks.items():
        network.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def test_a_phase_of_many_steps_is_traced_and_resumes_to_the_same_bits(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where fewer steps than that are left, or in bfloat16, in which a trace rounds in its own way."""
    monkeypatch.setattr(loop, "WORTH_TRACING", 6)
    _, whole = tiny(precision="bfloat16")
    ran = calls_of(whole)
    whole.run("gan")
    whole.run("encoder")
    # D's objective: G, D of both halves, D of the penalty; G's: G, D; E's: E, G's average, and D's features alone.
    assert ran == ["generator", *["discriminator"] * 2, "generator", "discriminator", "encoder", "average"]
    _, cut = tiny(folder="cut", precision="bfloat16")
    interrupt_at(cut, "gan", 4)
    with pytest.raises(Interrupted):
        cut.run("gan")
    _, resumed = tiny(resumed=checkpoints.load(cut.path), folder="cut", precision="bfloat16")
    resumed.run("gan")
    resumed.run("encoder")
    wanted = weights(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(resumed).items())
    for settings in ({"gan_steps": 5}, {"kernels": "reference"}):
        _, other = tiny(folder=f"other-{len(settings)}", **settings)
        ran = calls_of(other)
        other.run("gan")
        assert ran.count("generator") == 2 * other.steps["gan"], "every step goes through autograd"


def test_in_bfloat16_a_traced_step_is_the_step_up_to_rounding(tiny: Make) -> None:
    (_, plain), (_, traced) = (tiny(folder=name, precision="bfloat16") for name in ("plain", "traced"))
    traced.trace()
    wanted, got = steps(plain), steps(traced)
    assert got[0] == wanted[0], "nothing is rounded otherwise before the first gradients"
    for a, b in zip(got, wanted, strict=True):
        assert a == pytest.approx(b, rel=0.05, abs=0.01)


def squares(model: nn.Module) -> trace.Objective:
    def objective(x: Tensor) -> tuple[Tensor, Terms]:
        loss = model(x).square().mean()
        return loss, {"loss": loss.detach()}

    return objective


def test_other_shapes_and_memory_formats_are_refused() -> None:
    model = nn.Linear(3, 2)
    traced = TracedStep(squares(model), list(model.parameters()), [model])
    traced(torch.randn(5, 3))
    for other in (torch.randn(4, 3), torch.randn(3, 5).t()):
        with pytest.raises(ValueError, match=r"traced for tensors of these shapes and strides: .*5, 3.*; got"):
            traced(other)


@pytest.mark.parametrize("read", [float, bool], ids=["a number", "a branch"])
def test_what_depends_on_a_value_is_refused(read: Callable[[Tensor], Any]) -> None:
    """It would be replayed with the first call's value."""
    model = nn.Linear(3, 2)

    def objective(x: Tensor) -> tuple[Tensor, Terms]:
        loss = model(x).square().mean()
        return loss * 2 if read(loss.detach()) > 1 else loss, {"loss": loss.detach()}

    with pytest.raises(ValueError, match="what decides by a tensor's value cannot be traced"):
        TracedStep(objective, list(model.parameters()), [model])(torch.randn(5, 3))


def test_a_grey_image_has_one_memory_format() -> None:
    model = nn.Conv2d(1, 2, 3)
    traced = TracedStep(squares(model), list(model.parameters()), [model])
    x = torch.randn(2, 1, 5, 5)
    other = x.clone(memory_format=torch.channels_last)
    assert x.stride() != other.stride()
    assert_each_close(traced(x)["loss"], traced(other)["loss"], rtol=1.3e-6, atol=1e-5)


def test_gradients_have_memory_of_their_own() -> None:
    """Also two that are equal, and one that is an input: backward copies them, and clipping scales them in place."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def objective(x: Tensor) -> tuple[Tensor, Terms]:
        loss = ((first + second) * x).sum()
        return loss, {"loss": loss.detach()}

    x = torch.arange(3.0)
    TracedStep(objective, [first, second], [])(x)
    for weight in (first, second):
        assert weight.grad is not None
        weight.grad.mul_(2)
        assert torch.equal(weight.grad, torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(x, torch.arange(3.0))


def test_a_function_that_is_called_often_is_replayed_for_each_shape() -> None:
    model, ran = nn.Linear(3, 2), []

    def function(x: Tensor) -> dict[str, Tensor]:
        ran.append(len(x))
        return {"y": model(x)}

    replayed = Replayed(function, after=3)
    with torch.inference_mode():
        for rows in (5, 4, 5, 5, 5, 5, 4):
            x = torch.randn(rows, 3)
            assert torch.equal(replayed(x)["y"], model(x))
    assert ran == [5, 4, 5, 5, 4], "the third call of five rows traces, and no later one runs the function"


def test_threads_may_replay_and_trace_at_once() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    replayed = Replayed(lambda x: model(x), after=2)

    def compute(rows: int) -> bool:
        x = torch.randn(rows, 3)
        with torch.inference_mode():
            return torch.equal(replayed(x), model(x))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(compute, [1 + i % 7 for i in range(200)]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("compiled", [False, True], ids=["replayed", "compiled"])
@pytest.mark.parametrize("kernels", ["fused", "native", "triton"])
def test_on_a_gpu_a_traced_step_is_the_step_up_to_rounding(kernels: str, compiled: bool) -> None:
    """In one process and by the first step: atomic sums there have another order in each run."""
    try:
        dispatch.require(kernels, torch.device("cuda"))
    except dispatch.KernelError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    config = tiny_config(kernels=kernels)

    def first(trace: bool) -> dict[str, Tensor]:
        one = Steps(config, build(config, channels=1, classes=2, device=torch.device("cuda")))
        one.freeze("gan")
        if trace:
            one.trace(compiled=compiled)
        x, y = torch.linspace(-1, 1, 8 * 64).view(8, 1, 8, 8), torch.arange(8) % 2
        return one.gan_step(0, x.cuda(), y.cuda())

    wanted, got = first(trace=False), first(trace=True)
    for name, value in wanted.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-2, abs=1e-3), name
