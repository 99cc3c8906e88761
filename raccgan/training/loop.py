"""The training loop: generator and discriminator, then the encoder, then the pathology head; and its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from raccgan.data.augmentation import placed, placements
from raccgan.data.dataset import ImageDataset, StepBatches
from raccgan.data.sources.registry import place_of
from raccgan.errors import InputError
from raccgan.models import checkpoint as checkpoints
from raccgan.models.checkpoint import Calibration, Checkpoint, History
from raccgan.models.devices import exact
from raccgan.models.networks import build
from raccgan.models.qualifying import qualify
from raccgan.models.randomness import stream
from raccgan.outputs.interruption import finish_step_on_interrupt
from raccgan.outputs.progress import Progress
from raccgan.outputs.terminal import say
from raccgan.training.calls import calls
from raccgan.training.run import Run
from raccgan.training.steps import Steps, cannot_trace

PHASES = ("gan", "encoder", "pathology")

WORTH_TRACING = 200  # steps of a phase from which on a trace pays: it takes as long as ten to a hundred steps

_TITLES = {"gan": "generator and discriminator", "encoder": "encoder", "pathology": "pathology head"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the checkpoint written; the message says how to go on."""


class Training(Steps):
    """Steps on a data set, how many of each phase are done, and their checkpoints in the file ``path``.

    The batch of a step is a function of (seed, phase, step), as its random draws are, so a resumed run computes what
    the uninterrupted one would have. With several ranks, rank 0 writes the checkpoints.

    Args:
        resumed: the checkpoint to go on from. An InputError if it does not fit the run's configuration, or if
            ``generator_tuning`` became zero, or positive, after the encoder's training began.
        compiled: send the steps through torch.compile; one that does not compile is replayed, and a line says why.
    """

    def __init__(
        self, run: Run, data: ImageDataset, path: Path, resumed: Checkpoint | None = None, *, compiled: bool = False
    ) -> None:
        qualify(
            run.config.kernels,
            run.device,
            lambda: calls(run.config, len(run.classes), run.channels, run.device, run.job.world),
            shown=run.job.first,
        )
        if resumed is not None:
            networks = checkpoints.networks_of(resumed, run.config, run.device)
        else:
            networks = build(run.config, channels=run.channels, classes=len(run.classes), device=run.device)
        super().__init__(run.config, networks, run.job)
        self.data, self.path, self.compiled = data, path, compiled
        self.classes, self.channels = run.classes, run.channels
        self.dataset_at = place_of(run.config.dataset)
        self.steps = dict.fromkeys(PHASES, 0)
        self.goals = {phase: getattr(run.config, f"{phase}_steps") for phase in PHASES}
        self.history: History = {}
        self.calibration: Calibration | None = None  # for the next checkpoint; a step of training clears it
        self.seconds = 0.0
        self._saved_at = "none was written yet"
        if resumed is not None:
            self._resume(resumed)

    def run(self, phase: str) -> None:
        """Run one phase from where it stands to its goal.

        An InputError names the step and the last good checkpoint if losses or weights are not finite. After Ctrl-C or
        SIGTERM on any rank, Interrupted is raised once the step is finished and saved.
        """
        step_of = {"gan": self.gan_step, "encoder": self.encoder_step, "pathology": self.pathology_step}[phase]
        start, goal = self.steps[phase], self.goals[phase]
        self.freeze(phase)
        self.job.copy_from_first(network for _, network in self.networks.items())
        every = max(1, goal // 400)  # points of the loss curves
        if start < goal:
            self.networks.density.forget()
            self.trace_if_worth_it(phase)
        begun, before = time.monotonic(), self.seconds
        shown = Progress(_TITLES[phase], goal, start, shown=self.job.first)
        with finish_step_on_interrupt() as interrupted, shown as progress, exact(self.device):
            for step, (x, y) in zip(range(start, goal), self.batches(phase), strict=False):
                losses = step_of(step, x, y)
                means = self.job.averaged(torch.stack(list(losses.values())))
                stop = self.job.anywhere(interrupted())
                values = dict(zip(losses, means.tolist(), strict=True))
                if not all(map(math.isfinite, values.values())):
                    readable = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                    raise self._not_finite(phase, step, f"losses are {readable}")
                self.steps[phase] = step + 1
                self.calibration = None  # the weights have changed since
                self.seconds = before + time.monotonic() - begun
                if (step + 1) % every == 0:
                    for name, value in values.items():
                        self.history.setdefault(name, []).append((step + 1, value))
                progress.update(1, values)
                if stop:
                    self.save(phase)
                    raise Interrupted(f"stopped after {phase} step {step + 1}; --resume {self.path.parent} continues")
                if (step + 1) % self.config.checkpoint_every == 0 or step + 1 == goal:
                    self.save(phase)

    def batches(self, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images [n, C, H, W] and classes [n] of every step still to do, on the device."""
        size = self.config.batch_size * {"gan": self.config.critic_steps, "encoder": 1, "pathology": 3}[phase]
        seed = stream(self.config.seed, phase + "/data").initial_seed()
        batches, kind = StepBatches(len(self.data), size, seed=seed), self.config.augmentation
        for step in range(self.steps[phase], self.goals[phase]):
            own = self.job.own(batches.batch(step), self.config.batch_size)
            images, labels = self.data.images(own), self.data.labels[own]
            if kind != "none" and phase != "pathology":  # which moves and mirrors its images itself
                drawn = placements(kind, size, stream(self.config.seed, f"{phase}/augmentation", step))
                images = placed(images, drawn[self.job.own(range(size), self.config.batch_size)])
            yield images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)

    def trace_if_worth_it(self, phase: str) -> None:
        """Trace the phase's steps if that is possible and faster; it was not measured on a GPU."""
        self.traced = {}
        # All steps count, done or not, so that a resumed run rounds as an uninterrupted one does.
        pays = self.goals[phase] >= WORTH_TRACING and self.device.type == "cpu"
        if self.compiled:
            say(f"{_TITLES[phase]}: compiling the step, which takes one to two minutes")
            self.trace(compiled=True, warn=cache(say))  # D's step and G's do not compile for one reason
        elif pays and not cannot_trace(self.config, self.job):
            self.trace()

    def save(self, phase: str) -> None:
        """Write the checkpoint, on rank 0.

        An InputError if a weight is not finite: the last good checkpoint stays; or if the file cannot be written.
        """
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
            dataset_at=self.dataset_at,
        )
        if self.calibration is not None:
            checkpoint = checkpoint.calibrated(self.calibration)
        self.job.on_first(lambda: checkpoints.save(self.path, checkpoint))
        self._saved_at = f"{self.path} of {phase} step {self.steps[phase]}"

    def _resume(self, resumed: Checkpoint) -> None:
        phase_of = {"generator": "gan", "discriminator": "gan", "encoder": "encoder", "pathology": "pathology"}
        begun = {name for name, phase in phase_of.items() if resumed.steps[phase]}
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
            self.calibration = Calibration(
                resumed.threshold, resumed.held_out, resumed.held_out_policy, resumed.pixel_threshold
            )
        self.seconds = resumed.seconds
        self._saved_at = f"{self.path} as it was resumed"

    def _not_finite(self, phase: str, step: int, what: str) -> InputError:
        return InputError(
            f"{phase} step {step + 1}: {what}; the last good checkpoint is {self._saved_at}; "
            "a lower learning rate or a higher penalty usually mends it"
        )
