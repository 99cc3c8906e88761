"""The whole scorer: images in, scores under one known class out; what a user of a trained model waits for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import engines
from bench.layers import MODELS, Model
from bench.measure import Case, Compare, Contestant
from bench.networks import CLASSES, by_name, doubled, networks
from bench.peers import label
from bench.roofline import scoring
from raccgan.kernels.anomaly_score import anomaly_score
from raccgan.models.blocks import NormOverBatch
from raccgan.models.inference import frozen
from raccgan.models.networks import Networks
from raccgan.models.randomness import stream
from raccgan.models.trace import Replayed
from raccgan.scoring.scorer import compiler_options
from tests.kernels.test_cuda_on_gpu import recorded

# How far from float64 a score may be: in float32 as far as the product allows between batches. In bfloat16, of eight
# bits, everyone is about 1e-2 off.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
CASES = [(32, 1), (32, 16), (128, 1), (128, 16), (128, 64)]  # image size, batch
LARGE = (128, 64)


def _marks(case: tuple[int, int], dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.large] if case == LARGE else [pytest.mark.published]
    if (case[0], dtype) != (32, torch.float32) and (case, dtype) != (LARGE, torch.bfloat16):
        marks.append(pytest.mark.full)
    return marks


PARAMETERS = [
    pytest.param(*case, dtype, id=f"{case[0]}px b{case[1]}-{dtype}", marks=_marks(case, dtype))
    for case in CASES
    for dtype in TOLERANCE
]

Score = Callable[[Tensor, Tensor], Tensor]


class Scoring(nn.Module):
    """What ``raccgan.scoring.scorer.ScoreModule`` computes for one known class and a reconstruction score.

    In bfloat16 the networks run in autocast, as in training, and the score itself in the images' dtype.
    """

    def __init__(self, networks: Networks, kappa: float, kernels: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder, self.generator, self.discriminator = networks.encoder, networks.average, networks.discriminator
        self.kappa, self.kernels, self.dtype = kappa, kernels, dtype
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores [N] of images x [N, C, H, W] as members of the classes y [N]."""
        with self._precision(x):
            f = self.discriminator.features(x)
            x_hat = self.generator(self.encoder(x, y), y)
            f_hat = self.discriminator.features(x_hat)
        x_hat, f, f_hat = (t.to(x.dtype) for t in (x_hat, f, f_hat))
        return anomaly_score(x, x_hat, f, f_hat, kappa=self.kappa, want_map=False, kernels=self.kernels).score

    def _precision(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Trained:
    """A model as if it had been trained: one set of weights, to be scored with by everyone."""

    model: Model
    device: str
    state: dict[str, dict[str, Tensor]]  # of each network

    @classmethod
    def of(cls, model: Model, device: str) -> Trained:
        """New weights, and running moments of a batch: with those that new networks have, every pixel of x' is 1 or
        -1, and no difference between two implementations would reach the score."""
        made = networks(model.config, model.image_channels, device, "reference", "channels_last")
        for module in made.average.modules():
            if isinstance(module, NormOverBatch):
                module.momentum = 1.0
        x, y = _images(model, 16, device)
        with torch.no_grad():
            made.average.train()(made.encoder(x, y), y)
        return cls(model, device, {name: network.state_dict() for name, network in made.items()})

    def networks(self, kernels: str, layout: str) -> Networks:
        made = networks(self.model.config, self.model.image_channels, self.device, kernels, layout)
        for name, network in made.items():
            network.load_state_dict(self.state[name])
        return made

    def scoring(self, kernels: str, layout: str, dtype: torch.dtype) -> Scoring:
        made = self.networks(kernels, layout)
        if kernels != "reference":  # as Scorer has them; compilers and exporters fold what is constant by themselves
            made = Networks(
                frozen(made.generator, dtype),
                frozen(made.discriminator, dtype),
                frozen(made.encoder, dtype),
                frozen(made.average, dtype),
                made.pathology,
                made.density,
                made.evidence,
            )
        return Scoring(made, self.model.config.kappa, kernels, dtype)


@pytest.mark.parametrize(("size", "batch", "dtype"), PARAMETERS)
def test_scorer(measured: Compare, device: str, size: int, batch: int, dtype: torch.dtype) -> None:
    model = MODELS[size]
    x, y = _images(model, batch, device)
    trained = Trained.of(model, device)
    exact = Scoring(doubled(trained.networks("reference", "NCHW")), model.config.kappa, "reference", torch.float64)
    case = Case(
        "scorer", f"{size}px b{batch}", dtype, "score", device,
        scoring(model.config, model.image_channels, batch, dtype), tolerance=TOLERANCE[dtype], images=batch,
    )  # fmt: skip
    measured(case, _contestants(trained, dtype, x, y), [_inferred(exact, x.double(), y)])


def _contestants(trained: Trained, dtype: torch.dtype, x: Tensor, y: Tensor) -> list[Contestant]:
    """Eager PyTorch in both layouts, a compiler and two engines on the same reference; ours, recorded and compiled."""
    reference, fused = (trained.scoring(kernels, "channels_last", dtype) for kernels in ("reference", "fused"))
    copies = itertools.cycle([x.clone() for _ in range(4)])

    def contestant(name: str, layout: str, run: Score, *, peer: bool = True, fused: bool = False) -> Contestant:
        return Contestant(
            name, layout, peer, fused,
            check=lambda: [_inferred(run, x, y)],
            call=lambda: _inferred(run, next(copies), y),
        )  # fmt: skip

    torch._dynamo.reset()
    # A break in the graph of ours would be a fault, and fails the case.
    options = compiler_options(torch.device(trained.device))
    compiled = torch.compile(fused, dynamic=False, fullgraph=True, options=options)
    ours = label("fused", partial(_inferred, fused, x, y))
    contestants = [
        contestant("reference", "NCHW", trained.scoring("reference", "NCHW", dtype)),
        contestant("reference", "channels_last", reference),
        contestant("torch.compile", "channels_last", torch.compile(reference, dynamic=False, options=options)),
        contestant(ours, "channels_last", fused, peer=False, fused=trained.device != "cpu"),
        contestant(f"{ours}, compiled", "channels_last", compiled, peer=False),
    ]
    if trained.device == "cuda":
        tuned = torch.compile(reference, dynamic=False, mode="max-autotune")
        contestants.append(contestant("torch.compile max-autotune", "channels_last", tuned))
        named = {kernels: trained.scoring(kernels, "channels_last", dtype) for kernels in by_name(trained.device)}
        for name, run in ({ours: fused} | named).items():
            replayed = _made_at_first_call(partial(_replayed, partial(_inferred, run), x, y))
            contestants.append(contestant(f"{name} + CUDA graph", "channels_last", replayed, peer=False))
    if trained.device == "cpu":
        # As Scorer goes on after some hundred calls.
        recorded = contestant(f"{ours}, recorded", "channels_last", Replayed(fused, after=1), peer=False, fused=True)
        contestants.append(recorded)
        contestants += [contestant(name, "NCHW", run) for name, run in _engines(trained, dtype, x, y).items()]
    return contestants


def _engines(trained: Trained, dtype: torch.dtype, x: Tensor, y: Tensor) -> dict[str, Score]:
    """Those that take an exported model; OpenVINO takes it in float32, and rounds to bfloat16 by itself."""
    threads = torch.get_num_threads()

    @cache
    def exported(kind: torch.dtype) -> bytes:
        return engines.onnx(trained.scoring("reference", "channels_last", kind), x, y)

    return {
        "ONNX Runtime": _made_at_first_call(lambda: engines.onnx_runtime(exported(dtype), threads)),
        "OpenVINO": _made_at_first_call(lambda: engines.openvino(exported(torch.float32), threads, dtype)),
    }


def _made_at_first_call(make: Callable[[], Score]) -> Score:
    """So that what is missing or refused is found by the check, and becomes a row that says why."""
    made = cache(make)
    return lambda x, y: made()(x, y)


def _replayed(run: Score, x: Tensor, y: Tensor) -> Score:
    """A CUDA graph of the call, replayed on what is copied into its images; its score is overwritten by the next."""
    images, classes = x.clone(), y.clone()
    graph, (score,) = recorded(lambda: [run(images, classes)])

    def replay(x: Tensor, y: Tensor) -> Tensor:
        images.copy_(x)
        classes.copy_(y)
        graph.replay()
        return score

    return replay


def _inferred(run: Score, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(x, y)


def _images(model: Model, batch: int, device: str) -> tuple[Tensor, Tensor]:
    draw = stream(0, "bench/images")
    x = torch.rand(batch, model.image_channels, model.size, model.size, generator=draw) * 2 - 1
    return x.to(device), torch.randint(CLASSES, (batch,), generator=draw).to(device)
