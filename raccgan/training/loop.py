"""The two phases of training: the generator with its discriminator, then the encoder behind both."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raccgan.config import Config
from raccgan.data.dataset import ImageDataset, StepBatches
from raccgan.distributed import collectives, ranks
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Calibration, Checkpoint, History
from raccgan.models.networks import Networks, build, update_average
from raccgan.models.randomness import stream
from raccgan.models.trace import Objective, Recording, Terms
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say
from raccgan.training.losses import critic_loss, encoder_loss, generator_loss
from raccgan.training.run import Run

PHASES = ("gan", "encoder")

WORTH_RECORDING = 200
"""Steps of a phase from which on it is faster with a recording, which takes as long as ten to a hundred of them."""

Log = Callable[[str, int, dict[str, float]], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the checkpoint written; the message says how to go on."""


class Training:
    """Networks, optimisers and how far each phase has come; runs a phase and leaves checkpoints.

    A step's random draws and its batch are functions of (seed, phase, step) alone, so a resumed run computes what
    the uninterrupted one would have. With several ranks (:mod:`raccgan.distributed.ranks`) each computes its slice of
    the batch, all have the same weights after every step, and rank 0 keeps the generator's average and the checkpoints.
    """

    def __init__(
        self,
        config: Config,
        networks: Networks,
        data: ImageDataset,
        *,
        classes: list[str],
        channels: int,
        path: Path,
        resumed: Checkpoint | None = None,
        log: Log = lambda phase, step, figures: None,
        compiled: bool = False,
    ) -> None:
        self.config, self.networks, self.data, self.path, self.log = config, networks, data, path, log
        self.classes, self.channels, self.compiled = classes, channels, compiled
        self.device = next(networks.generator.parameters()).device
        adam: dict[str, Any] = {"betas": (0.0, 0.999), "eps": 1e-6}
        # fused: one call for all weights. On a CPU it took a quarter of the time of the loop over them that is the
        # default there, 1.5 of a digits step's 25 ms.
        adam_with = partial(torch.optim.Adam, fused=True)
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "generator": adam_with(networks.generator.parameters(), lr=config.generator_lr, **adam),
            "discriminator": adam_with(networks.discriminator.parameters(), lr=config.discriminator_lr, **adam),
            "encoder": adam_with([{"params": list(learning.parameters())} for learning in self._reconstructing]),
        }
        self.steps = dict.fromkeys(PHASES, 0)
        self.history: History = {}
        self.calibration: Calibration | None = None
        """The threshold and the scores that it comes from, for the next checkpoint; it is of these weights alone."""
        self.seconds = 0.0
        self._objectives: dict[str, Objective] = {
            "generator": self._generator_loss,
            "discriminator": self._discriminator_loss,
            "encoder": self._encoder_loss,
        }
        self._recordings: dict[str, Recording] | None = None
        self._saved_at = "none was written yet"
        if resumed is not None:
            self._restore(resumed)

    @classmethod
    def of(
        cls,
        run: Run,
        data: ImageDataset,
        path: Path,
        resumed: Checkpoint | None,
        log: Log = lambda phase, step, figures: None,
        *,
        compiled: bool = False,
    ) -> Training:
        """The training of a run on ``data``, from new networks or from a checkpoint, which is written to ``path``."""
        if resumed is not None:
            networks = checkpoints.networks_of(resumed, run.config, run.device)
        else:
            networks = build(run.config, channels=run.channels, classes=len(run.classes), device=run.device)
        return cls(
            run.config, networks, data, classes=run.classes, channels=run.channels, path=path, resumed=resumed, log=log,
            compiled=compiled,
        )  # fmt: skip

    @property
    def goals(self) -> dict[str, int]:
        """Steps of each phase when it is done."""
        return {"gan": self.config.gan_steps, "encoder": self.config.encoder_steps}

    def run(self, phase: str) -> None:
        """Run one phase from where it stands to its goal.

        Raises:
            InputError: losses or weights that are not finite, with the step and the last good checkpoint.
            Interrupted: Ctrl-C or SIGTERM, on any rank, after the step was finished and saved.
        """
        step_of = {"gan": self.gan_step, "encoder": self.encoder_step}[phase]
        start, goal = self.steps[phase], self.goals[phase]
        self.freeze(phase)
        collectives.copy_from_first(network for _, network in self.networks.items())
        every = max(1, goal // 400)  # points of the loss curves
        if start < goal:
            self.networks.density.forget()
            self._record_if_worth_it(phase)
        begun, before = time.monotonic(), self.seconds
        counter = Progress(_TITLES[phase], goal, start, shown=ranks.first())
        with _finish_step_on_interrupt() as interrupted, counter as progress:
            for step, (x, y) in zip(range(start, goal), self._batches(phase), strict=False):
                losses = step_of(step, x, y)
                means = collectives.averaged(torch.stack(list(losses.values())))
                stop = collectives.anywhere(interrupted())
                values = dict(zip(losses, means.tolist(), strict=True))
                if not all(map(math.isfinite, values.values())):
                    raise self._not_finite(phase, step, f"losses are {_readable(values)}")
                self.steps[phase] = step + 1
                self.calibration = None  # the weights that it was of are no more
                self.seconds = before + time.monotonic() - begun
                if (step + 1) % every == 0:
                    for name, value in values.items():
                        self.history.setdefault(name, []).append((step + 1, value))
                    self.log(phase, step + 1, values)
                progress.update(1, values)
                if stop:
                    self.save(phase)
                    raise Interrupted(f"stopped after {phase} step {step + 1}; --resume {self.path.parent} continues")
                if (step + 1) % self.config.checkpoint_every == 0 or step + 1 == goal:
                    self.save(phase)

    def save(self, phase: str) -> None:
        """Write the checkpoint, unless a weight is not finite: then the last good one stays."""
        for name, network in self.networks.items():
            if not all(bool(p.isfinite().all()) for p in network.parameters()):
                raise self._not_finite(phase, self.steps[phase] - 1, f"a weight of the {name} is not finite")
        checkpoint = Checkpoint(
            config=self.config.to_dict(),
            classes=self.classes,
            channels=self.channels,
            networks={name: network.state_dict() for name, network in self.networks.items()},
            optimisers={name: checkpoints.optimiser_state(optimiser) for name, optimiser in self.optimisers.items()},
            steps=self.steps,
            history=self.history,
            seconds=self.seconds,
        )
        if self.calibration is not None:
            checkpoint = checkpoint.calibrated(self.calibration)
        ranks.on_first(lambda: checkpoints.save(self.path, checkpoint))
        self._saved_at = f"{self.path} of {phase} step {self.steps[phase]}"

    def record(self, *, compiled: bool = False) -> None:
        """Have the next step record its losses and gradients, and those after it replay them, compiled if asked for.

        See :mod:`raccgan.models.trace`; where that cannot be, :func:`cannot_record` says why.
        """
        networks = [network for _, network in self.networks.items()]
        rounded = self.config.precision != "float32"
        self._recordings = {
            name: Recording(objective, self._weights(name), networks, compiled=compiled, rounded=rounded)
            for name, objective in self._objectives.items()
        }

    def _record_if_worth_it(self, phase: str) -> None:
        """Record the phase's steps, if that can be done and is faster; on a GPU it was not measured.

        All steps of the phase count, done or not, so that a resumed run rounds as an uninterrupted one does.
        """
        self._recordings = None
        if self.compiled:
            say(f"{_TITLES[phase]}: compiling the step, which takes one to two minutes")
            self.record(compiled=True)
        elif self.device.type == "cpu" and cannot_record(self.config) is None and self.goals[phase] >= WORTH_RECORDING:
            self.record()

    def gan_step(self, step: int, x: Tensor, y: Tensor) -> Terms:
        """``critic_steps`` discriminator steps on slices of the batch, then one generator step."""
        draw = stream(self.config.seed, "gan", step)
        n = self.config.batch_size // ranks.world()
        for real, label in zip(x.split(n), y.split(n), strict=True):
            z, mix = self._normal(draw), self._uniform(draw)
            terms = self._descend("discriminator", real, label, z, mix)
        terms = terms | self._descend("generator", y[-n:], self._normal(draw))
        # A short memory at first: the average would otherwise hold on to the first, random weights.
        if ranks.first():
            update_average(
                self.networks.average, self.networks.generator, min(self.config.ema, (1 + step) / (10 + step))
            )
        return terms

    def encoder_step(self, step: int, x: Tensor, y: Tensor) -> Terms:
        """One step on izi_f; the learning rates fall to zero on a cosine."""
        rate = self.config.encoder_lr * 0.5 * (1 + math.cos(math.pi * step / self.config.encoder_steps))
        shares = (1.0, self.config.generator_tuning)
        for group, share in zip(self.optimisers["encoder"].param_groups, shares, strict=False):
            group["lr"] = rate * share
        return self._descend("encoder", x, y)

    def _descend(self, name: str, *inputs: Tensor) -> Terms:
        """One step of an optimiser."""
        self.optimisers[name].zero_grad(set_to_none=True)
        terms = self.differentiate(name, *inputs)
        collectives.average_gradients(self._weights(name))
        self.optimisers[name].step()
        return terms

    def differentiate(self, name: str, *inputs: Tensor) -> Terms:
        """Leave the gradients of a network's loss in its weights, which have none yet; what the loss consists of."""
        if self._recordings is not None:
            return self._recordings[name](*inputs)
        loss, terms = self._objectives[name](*inputs)
        loss.backward()
        return terms

    def _discriminator_loss(self, real: Tensor, y: Tensor, z: Tensor, mix: Tensor) -> tuple[Tensor, Terms]:
        g, d = self.networks.generator, self.networks.discriminator.requires_grad_(True)
        with torch.no_grad(), self._precision():
            fake = g(z, y).to(real.dtype)
        with self._precision():
            wasserstein, penalty = critic_loss(d, real, fake, y, mix)
        loss = self.config.penalty * penalty - wasserstein
        return loss, {"wasserstein": wasserstein.detach(), "penalty": penalty.detach()}

    def _generator_loss(self, y: Tensor, z: Tensor) -> tuple[Tensor, Terms]:
        g, d = self.networks.generator, self.networks.discriminator.requires_grad_(False)
        with self._precision():
            loss = generator_loss(d, g(z, y), y)
        return loss, {"generator": loss.detach()}

    def _encoder_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Terms]:
        with self._precision():
            terms = encoder_loss(self.networks.encoder, self.networks.average, self.networks.discriminator, x, y)
        loss = terms.image + self.config.kappa * terms.feature
        return loss, {"image": terms.image.detach(), "feature": terms.feature.detach()}

    def _weights(self, name: str) -> list[nn.Parameter]:
        return [weight for group in self.optimisers[name].param_groups for weight in group["params"]]

    @property
    def _reconstructing(self) -> list[nn.Module]:
        """What the encoder's phase trains: E, and with ``generator_tuning`` the G that it is trained against.

        f-AnoGAN freezes G, whose reconstructions are then as blurred as its samples; tuned, it still starts from what
        the adversary taught it, and draws a screw's thread (docs/results.md).
        """
        tuned = [self.networks.average] if self.config.generator_tuning > 0 else []
        return [self.networks.encoder, *tuned]

    def freeze(self, phase: str) -> None:
        """Which networks learn, and which are in eval mode, in this phase."""
        learning = {"gan": {"generator", "discriminator"}, "encoder": {"encoder"}}[phase]
        for name, network in self.networks.items():
            network.train(name in learning).requires_grad_(name in learning)
        if phase == "encoder":
            for network in self._reconstructing:
                network.requires_grad_(True)  # G's moving average stays in eval mode, as it scores

    def _batches(self, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images and classes of every step still to do, on the device."""
        size = self.config.batch_size * (self.config.critic_steps if phase == "gan" else 1)
        batches = StepBatches(len(self.data), size, seed=stream(self.config.seed, phase + "/data").initial_seed())
        for step in range(self.steps[phase], self.goals[phase]):
            own = ranks.own(batches.batch(step), self.config.batch_size)
            images, labels = self.data.images(own), self.data.labels[own]
            yield images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)

    def _normal(self, draw: torch.Generator) -> Tensor:
        z = torch.randn(self.config.batch_size, self.config.latent_size, generator=draw)
        return collectives.own_rows(z).to(self.device)

    def _uniform(self, draw: torch.Generator) -> Tensor:
        return collectives.own_rows(torch.rand(self.config.batch_size, 1, 1, 1, generator=draw)).to(self.device)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _restore(self, resumed: Checkpoint) -> None:
        resumed.restore(self.networks)
        phase_of = {"generator": "gan", "discriminator": "gan", "encoder": "encoder"}
        begun = {name for name, phase in phase_of.items() if resumed.steps.get(phase, 0)}
        if "encoder" in begun:
            before, now = checkpoints.config_of(resumed).generator_tuning, self.config.generator_tuning
            if (before > 0) != (now > 0):
                raise InputError(
                    f"the encoder's training began with generator_tuning {before}, not {now}: resume with that, or "
                    "train anew in another folder"
                )
        for name in begun:
            resumed.restore_optimiser(name, self.optimisers[name])
        self.steps |= resumed.steps
        self.history = {name: list(points) for name, points in resumed.history.items()}
        if resumed.threshold is not None:
            self.calibration = Calibration(resumed.threshold, resumed.held_out, resumed.held_out_policy)
        self.seconds = resumed.seconds
        self._saved_at = f"{self.path} as it was resumed"

    def _not_finite(self, phase: str, step: int, what: str) -> InputError:
        return InputError(
            f"{phase} step {step + 1}: {what}; the last good checkpoint is {self._saved_at}; "
            "a lower learning rate or a higher penalty usually mends it"
        )


def cannot_record(config: Config) -> str | None:
    """Why the steps of a configuration cannot be recorded, in one line."""
    if ranks.world() > 1:
        return "in one process only: ranks exchange moments in the middle of a step"
    if config.kernels == "reference":
        return "not with --kernels reference, whose gradient penalty is a loop over channels, each with a record"
    return None


_TITLES = {"gan": "generator and discriminator", "encoder": "encoder"}


def _readable(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


@contextmanager
def _finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag that is read between steps; the second interrupts at once."""
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: whoever started us handles Ctrl-C
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)
