"""Training: reproducible, resumable to the same numbers, stopped by Ctrl-C and by NaN without loss."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.networks import update_average
from raccgan.training.loop import Interrupted, Training
from raccgan.training.run import Run
from tests.kernels.compare import assert_each_close

Make = Callable[..., tuple[Run, Training]]


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, network in training.networks.items()
        for key, value in network.state_dict().items()
    }


def trained(make: Make, **settings: Any) -> Training:
    _, training = make(**settings)
    training.run("gan")
    training.run("encoder")
    return training


def test_a_seed_reproduces_bit_for_bit_and_another_does_not(tiny: Make) -> None:
    first, again, other = (trained(tiny, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values(), strict=True))
    assert first.history == again.history
    assert first.history != other.history


def test_the_global_random_state_does_not_matter(tiny: Make) -> None:
    first = trained(tiny)
    torch.manual_seed(123)
    assert trained(tiny).history == first.history


@pytest.mark.parametrize("stop", [("gan", 3), ("gan", 5), ("encoder", 2)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tiny: Make, stop: tuple[str, int]) -> None:
    """Stopped by Ctrl-C in the middle of a phase, loaded from disk into fresh networks, continued to the end."""
    settings = {"critic_steps": 2, "generator_tuning": 0.5}
    whole = trained(tiny, **settings)
    _, cut = tiny(folder="cut", **settings)
    phase, step = stop
    if phase == "encoder":
        cut.run("gan")
    interrupt_at(cut, phase, step)
    with pytest.raises(Interrupted, match=rf"stopped after {phase} step {step}; --resume .*cut continues"):
        cut.run(phase)
    _, resumed = tiny(resumed=checkpoints.load(cut.path), folder="cut", **settings)
    assert resumed.steps[phase] == step
    resumed.run("gan")
    resumed.run("encoder")
    assert resumed.history == whole.history
    wanted = weights(whole)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(resumed).items())


def interrupt_at(training: Training, phase: str, step: int) -> None:
    """Send ourselves Ctrl-C while step number ``step`` of a phase is being computed."""
    name = f"{phase}_step"
    compute = getattr(training, name)

    def with_interrupt(number: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if number + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(number, x, y)

    setattr(training, name, with_interrupt)


def test_ctrl_c_leaves_the_handler_that_was_there(tiny: Make) -> None:
    before = signal.getsignal(signal.SIGINT)
    trained(tiny)
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tiny: Make) -> None:
    _, training = tiny(gan_steps=9)
    compute = training.gan_step

    def diverge(step: int, x: torch.Tensor, y: torch.Tensor) -> Any:
        if step == 4:
            x = torch.full_like(x, torch.nan)
        return compute(step, x, y)

    training.gan_step = diverge  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"gan step 5: losses are .*nan.* last good checkpoint is .* of gan step 3"):
        training.run("gan")
    kept = checkpoints.load(training.path)
    assert kept.steps["gan"] == 3
    assert all(value.isfinite().all() for value in kept.networks["generator"].values())


def test_weights_that_are_not_finite_are_never_saved(tiny: Make) -> None:
    _, training = tiny(gan_steps=3)
    training.run("gan")
    with torch.no_grad():
        training.networks.discriminator.linear.bias.fill_(torch.inf)
    with pytest.raises(InputError, match="a weight of the discriminator is not finite"):
        training.save("gan")
    assert checkpoints.load(training.path).steps["gan"] == 3


def test_both_paths_train_to_the_same_losses(tiny: Make) -> None:
    """Reference and fused, same seed, 15 + 15 steps: losses agree within a relative 1e-3."""
    settings = {"gan_steps": 15, "encoder_steps": 15, "attention_discriminator": "all", "attention_encoder": "all"}
    reference, fused = (trained(tiny, kernels=name, **settings).history for name in ("reference", "fused"))
    assert reference != fused, "not one bit differs: is one path used for both?"
    for name, points in reference.items():
        for (step, wanted), (_, got) in zip(points, fused[name], strict=True):
            assert got == pytest.approx(wanted, rel=1e-3, abs=1e-4), (name, step)


def test_bfloat16_training_stays_near_float32(tiny: Make) -> None:
    exact, rounded = (trained(tiny, precision=name).history for name in ("float32", "bfloat16"))
    assert exact != rounded
    assert rounded["image"][-1][1] == pytest.approx(exact["image"][-1][1], rel=0.05)


def test_the_average_moves_weights_and_moments_and_copies_the_rest(tiny: Make) -> None:
    _, training = tiny()
    model, average = training.networks.generator, training.networks.average
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    update_average(average, model, 0.75)
    for name, value in average.state_dict().items():
        moved = 1.0 if name.endswith(("._u", "._v", ".num_batches_tracked")) else 0.25
        assert_each_close(value, (before[name] + moved).to(value.dtype), rtol=1.3e-6, atol=1e-5)


def test_only_the_networks_of_a_phase_learn(tiny: Make) -> None:
    _, training = tiny()
    training.run("gan")
    before = weights(training)
    training.run("encoder")
    for name, value in weights(training).items():
        assert torch.equal(value, before[name]) != name.startswith("encoder."), name


@pytest.mark.parametrize("tuning", [0.0, 0.5])
def test_the_generator_that_scores_learns_beside_the_encoder_where_it_is_tuned(tiny: Make, tuning: float) -> None:
    _, training = tiny(generator_tuning=tuning, encoder_steps=30)
    training.run("gan")
    before = weights(training)
    training.run("encoder")
    after = weights(training)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.partition(".")[0] for name in moved}
    assert parts == ({"encoder", "average"} if tuning else {"encoder"})
    assert not any("running" in name for name in moved if name.startswith("average"))  # as it scores, so it is tuned
    rates = [group["lr"] for group in training.optimisers["encoder"].param_groups]
    assert rates == ([rates[0], rates[0] * tuning] if tuning else rates[:1])


def test_whether_the_generator_is_tuned_may_change_until_the_encoder_is_trained(tiny: Make) -> None:
    _, training = tiny(folder="one")
    training.run("gan")
    _, tuned = tiny(resumed=checkpoints.load(training.path), folder="one", generator_tuning=0.5)
    tuned.run("encoder")
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(tuned).values(), weights(trained(tiny, generator_tuning=0.5)).values(), strict=True)
    )
    with pytest.raises(InputError, match=r"began with generator_tuning 0\.5, not 0\.0: resume with that"):
        tiny(resumed=checkpoints.load(tuned.path), folder="one")
    _, more = tiny(resumed=checkpoints.load(tuned.path), folder="one", generator_tuning=0.1)
    assert len(more.optimisers["encoder"].param_groups) == 2


def test_tuned_reconstructions_are_closer(tiny: Make) -> None:
    frozen, tuned = (trained(tiny, generator_tuning=tuning, encoder_steps=60) for tuning in (0.0, 1.0))
    assert tuned.history["image"][-1][1] < frozen.history["image"][-1][1]


def test_a_calibration_is_kept_until_a_weight_changes(tiny: Make) -> None:
    training = trained(tiny)
    scores = {"score": torch.tensor([1.0, 2.0]), "peak": torch.tensor([3.0, 4.0])}
    training.calibration = checkpoints.Calibration(1.5, scores, "minimum")
    training.save("encoder")
    _, resumed = tiny(resumed=checkpoints.load(training.path))
    resumed.run("encoder")  # has nothing left to do
    resumed.save("encoder")
    kept = checkpoints.load(training.path)
    assert (kept.threshold, kept.held_out_policy) == (1.5, "minimum")
    assert {name: value.tolist() for name, value in kept.held_out.items()} == {"score": [1, 2], "peak": [3, 4]}
    _, longer = tiny(resumed=kept, encoder_steps=7)
    longer.run("encoder")
    changed = checkpoints.load(training.path)
    assert (changed.threshold, changed.held_out) == (None, {})
