"""Who takes part in an op's case, on which inputs, in which pass.

Ours are all backends that the op has and that serve the call. The peers are what a user would otherwise
pick: the op's reference, which is eager PyTorch, and ``torch.compile`` of it. Everyone runs in both memory layouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.layers import Arguments
from bench.machine import cache_bytes
from bench.measure import Case, Contestant, Outputs
from bench.roofline import PASSES, WORK
from raccgan.kernels import dispatch
from raccgan.kernels.depthwise_separable import Prologue, apply_prologue
from tests.kernels.grid import FAMILIES, Family, Inputs, leaves, tensors

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

# What of ours runs PyTorch's own operations, differently arranged: its gain is no kernel's.
NO_KERNEL = " (no kernel)"

# Outputs that a gradient comes back through: CBAM's moments only feed running averages.
_DIFFERENTIATED = {"anomaly_score": 3, "cbam": 1, "depthwise_separable": 1, "moments": 2}
# In a gradient penalty, what leads back to the image.
_INPUTS = ("x", "x_hat", "f", "f_hat")
# In half precision networks run in autocast: what they hand on is of its dtype, their weights stay float32.
_HANDED_ON = (*_INPUTS, "residual")
_WITH_WEIGHTS = ("cbam", "depthwise_separable")
_HALVES = (torch.bfloat16, torch.float16)

Run = Callable[..., Any]


class Sample(NamedTuple):
    """Inputs of one call, and the gradients that come back to its outputs."""

    inputs: Inputs
    cotangents: tuple[Tensor, ...]


def forward(run: Run, sample: Sample) -> Outputs:
    with torch.no_grad():
        return _outputs(run, sample)


def backward(run: Run, sample: Sample) -> Outputs:
    """Outputs, then the gradients of every tensor."""
    outputs = _differentiated(_outputs(run, sample), len(sample.cotangents))
    return torch.autograd.grad(outputs, _leaves(sample), sample.cotangents, allow_unused=True)


def penalty(run: Run, sample: Sample) -> Outputs:
    """Outputs, gradients of the inputs, then the gradients of their squared norm: what WGAN-GP asks of each layer."""
    outputs = _differentiated(_outputs(run, sample), len(sample.cotangents))
    inputs = [sample.inputs[name] for name in _INPUTS if isinstance(sample.inputs.get(name), Tensor)]
    first = torch.autograd.grad(outputs, inputs, sample.cotangents, create_graph=True)
    value = torch.stack([g.float().square().sum() if g.dtype != torch.float64 else g.square().sum() for g in first])
    return torch.autograd.grad(value.sum(), [*_leaves(sample), *sample.cotangents], allow_unused=True)


THROUGH: dict[str, Callable[[Run, Sample], Outputs]] = {
    "forward": forward,
    "backward": backward,
    "penalty": penalty,
}
assert THROUGH.keys() == PASSES.keys()


def op_case(op: str, name: str, arguments: Arguments, dtype: torch.dtype, pass_: str, device: str) -> Case:
    work = WORK[op](dtype, **arguments)
    return Case(op, name, dtype, pass_, device, work.stages(PASSES[pass_]))


def sample_of(case: Case, arguments: Arguments) -> Sample:
    """Inputs as a network has them, and gradients for the outputs; of no particular values."""
    family = FAMILIES[case.op]
    made = Sample(family.make(torch.Generator().manual_seed(1), **arguments), ())
    placed = _placed(made, case.dtype, case.device, torch.channels_last)
    with torch.no_grad():
        outputs = _outputs(in_precision(case, family.taking_inputs("reference")), placed)
    through = _differentiated(outputs, _DIFFERENTIATED[case.op])
    return Sample(placed.inputs, _grown(tuple(map(torch.randn_like, through))))


def enter(case: Case, arguments: Arguments) -> tuple[list[Contestant], Outputs]:
    """The contestants of a case, and the outputs that float64 gives for the same, rounded, inputs."""
    family, through = FAMILIES[case.op], THROUGH[case.pass_]
    made = _draw(family, arguments, case.dtype, case.device)
    exact = _placed(made, torch.float64, case.device, torch.contiguous_format)
    reference = family.taking_inputs("reference")
    wanted = through(reference, exact)
    refused = _refuses_second_order(reference, exact) if case.pass_ == "penalty" else ""
    adapted = partial(in_precision, case)
    compiled = {name: adapted(run) for name, run in _compilers(reference, case).items()}
    contestants = []
    for layout, memory_format in LAYOUTS.items():
        placed = _placed(made, case.dtype, case.device, memory_format)
        pool = rotated(placed, cache_bytes(case.device))
        call = family.call(placed.inputs)
        fused = dispatch.choose(case.op, family.implementations, "fused", call).name
        served = [name for name, one in family.implementations.items() if one.supports(call) is None]
        if case.device == "cpu" and "triton" in served:  # interpreted, for tests
            served.remove("triton")
        runs = {name: adapted(family.taking_inputs(name)) for name in served} | compiled
        for name, run in runs.items():
            contestants.append(
                Contestant(
                    label(name, partial(through, run, placed)),
                    layout,
                    peer=name == "reference" or name in compiled,
                    fused=name == fused,
                    check=partial(through, run, placed),
                    call=partial(_next, through, run, pool),
                    raises=refused if name in compiled else "",
                )
            )
    return contestants, wanted


def in_precision(case: Case, run: Run) -> Run:
    """The op as it runs in a network whose precision is the case's."""
    if case.dtype not in _HALVES or case.op not in _WITH_WEIGHTS:
        return run

    def in_autocast(*arguments: Any) -> Any:
        with torch.autocast(case.device, dtype=case.dtype):
            return run(*arguments)

    return in_autocast


def _next(through: Callable[[Run, Sample], Outputs], run: Run, pool: Iterator[Sample]) -> Outputs:
    return through(run, next(pool))


def label(name: str, call: Callable[[], object]) -> str:
    """The implementation's name, and whether a call of it ran any kernel of ours: found by watching, not by name."""
    if name == "reference" or name.startswith("torch.compile"):
        return name
    with _Watch() as watch:
        call()
    return name if "raccgan" in watch.namespaces else name + NO_KERNEL


class _Watch(TorchDispatchMode):
    """Where the operations come from that PyTorch dispatches: ``aten`` its own, ``raccgan`` ours."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def places(size: int, cache: int) -> int:
    """How many inputs of so many bytes fill the cache four times, two at least."""
    return max(2, min(256, -(-4 * cache // size)))


def rotated(sample: Sample, cache: int) -> Iterator[Sample]:
    """The sample and copies of it for ever, so many that one comes back only after the cache was filled four times."""
    size = sum(t.nbytes for t in (*tensors(sample.inputs).values(), *sample.cotangents))
    others = range(places(size, cache) - 1)
    copies = [Sample(leaves(_copied(sample.inputs)), _grown(sample.cotangents)) for _ in others]
    return itertools.cycle([sample, *copies])


def _draw(family: Family, arguments: Arguments, dtype: torch.dtype, device: str) -> Sample:
    """Inputs in float64 that ``dtype`` can hold exactly."""
    draw = torch.Generator().manual_seed(1)
    inputs = family.make(draw, **arguments)
    if inputs.get("relu"):
        inputs["x"] = _off_the_kinks(inputs)
    inputs = {name: v.to(dtype).double() if isinstance(v, Tensor) else v for name, v in inputs.items()}
    there = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    with torch.no_grad():
        outputs = _outputs(family.taking_inputs("reference"), Sample(there, ()))
    through = _differentiated(outputs, _DIFFERENTIATED[family.name])
    # The scores' outputs are float32 whatever came in, and so are the gradients that come back to them.
    kept = dtype if family.name != "anomaly_score" else torch.promote_types(dtype, torch.float32)
    cotangents = (torch.randn(o.shape, generator=draw, dtype=torch.float64) for o in through)
    return Sample(inputs, tuple(g.to(kept).double() for g in cotangents))


def _off_the_kinks(inputs: Inputs) -> Tensor:
    """x, moved where a ReLU would meet about 0: there rounding decides whether a gradient is there or not."""
    x: Tensor = inputs["x"]
    if inputs["pre_relu"]:
        x = torch.where(x.abs() < 0.02, x + 0.04, x)
    scale = inputs["scale"]
    met = apply_prologue(x, Prologue(*(inputs[n] for n in ("pre_relu", "norm", "eps", "scale", "shift"))))
    slope = torch.ones(x.shape[:2], dtype=x.dtype) if scale is None else scale
    return torch.where(met.abs() < 0.02, x + 0.04 / slope[:, :, None, None], x)


def _placed(sample: Sample, dtype: torch.dtype, device: str, memory_format: torch.memory_format) -> Sample:
    """Leaves in the layout, of ``dtype`` or, where that is half of float32, weights of float32; gradients of the scores
    stay float32 (see _draw)."""
    weights = torch.float32 if dtype in _HALVES else dtype
    wide = torch.promote_types(dtype, torch.float32) if "x_hat" in sample.inputs else dtype

    def placed(t: Any, kind: torch.dtype) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.to(device, kind).clone(memory_format=memory_format if t.dim() == 4 else torch.contiguous_format)

    inputs = {name: placed(value, dtype if name in _HANDED_ON else weights) for name, value in sample.inputs.items()}
    return Sample(leaves(inputs), _grown(tuple(placed(g, wide) for g in sample.cotangents)))


def _copied(inputs: Inputs) -> Inputs:
    return {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def _grown(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies that ask for a gradient: in a critic, what comes back depends on the later layers' weights."""
    return tuple(g.detach().clone().requires_grad_() for g in cotangents)


def _leaves(sample: Sample) -> list[Tensor]:
    return list(tensors(sample.inputs).values())


def _outputs(run: Run, sample: Sample) -> tuple[Tensor, ...]:
    result = run(*sample.inputs.values())
    return result if isinstance(result, tuple) else (result,)


def _differentiated(outputs: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """The first ``count`` outputs that are there: a map that was not wanted is empty."""
    return [o for o in outputs if o.numel() > 0][:count]


def _compilers(reference: Run, case: Case) -> dict[str, Run]:
    torch._dynamo.reset()  # a fresh case recompiles; torch gives up on a function after eight shapes
    compiled = {"torch.compile": torch.compile(reference, dynamic=False)}
    if case.device == "cuda":
        compiled["torch.compile max-autotune"] = torch.compile(reference, dynamic=False, mode="max-autotune")
    return compiled


def _refuses_second_order(reference: Run, sample: Sample) -> str:
    """What torch.compile says to a gradient of a gradient; empty on the day that it does not refuse.

    The refusal is AOTAutograd's, before any code is generated: the backend that generates none tells it sooner.
    """
    try:
        penalty(torch.compile(reference, dynamic=False, backend="aot_eager"), sample)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
