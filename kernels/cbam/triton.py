"""CBAM in Triton: three sweeps over x forward, three backward, of which the last writes.

The kernels are the forward pass (:mod:`.triton_forward`) and its gradients (:mod:`.triton_backward`). Gradients of
these gradients are the reference's: CBAM stands in a critic, where they are needed, by option only. Not run on a GPU
yet: the tests interpret the kernels and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import dispatch, tuning
from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.autograd import wanted
from raccgan.kernels.cbam import triton_backward as back
from raccgan.kernels.cbam import triton_forward as forward
from raccgan.kernels.cbam.second_order import TENSORS, gradients_of_gradients
from raccgan.kernels.triton_runtime import Compilation, Config


def supports(call: dispatch.Call) -> str | None:
    """Why the Triton kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return runtime.why_not(call)


def cbam(
    x: Tensor,
    average: Tensor | None,
    maximum: Tensor | None,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    spatial_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm: str,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and the three returned tensors as in :func:`raccgan.kernels.cbam.cbam`.

    Args:
        x: float32, bfloat16 or float16; read in place where it is NCHW or channels_last, copied otherwise.
        average, maximum: where both are given, x is not read for them.
        the others: of any floating dtype; used as float32.

    Returns:
        y in x's dtype and memory format, with or without autocast. The same bits in every run, like all gradients.

    Gradients: every order, for every tensor; from the second order on by the reference in float32.
    """
    y, own_mean, own_var, _ = torch.ops.raccgan.cbam_triton(
        x, average, maximum, reduce_weight, reduce_bias, expand_weight, expand_bias, spatial_weight,
        norm_weight, norm_bias, mean, var, norm == "batch", eps,
    )  # fmt: skip
    return y, own_mean if mean is None else mean, own_var if var is None else var


# ---- how a call is cut into programs --------------------------------------------------------------------------------

# 16 elements a thread at most: with 32 the backward sweeps take 242 registers of 255.
_ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
_SCORES = Config({"PIXELS": 256}, 4)
_ITEMS = Config({"ITEMS": 256}, 4)
_FILES = tuple(str(file) for file in (__file__, forward.__file__, back.__file__))


def _tile(config: Config, c: int, p: int, last: bool) -> Config:
    """Pixels and channels of a piece. A small image is cut into eight at least, for more programs than samples."""
    elements, eighth = config.tile["ELEMENTS"], runtime.power_of_two(runtime.cdiv(p, 8))
    if last:
        most = elements // 32  # so many pixels at least share the sums that a piece leaves of each channel
        whole = (size for size in (128, 64, 32) if c % size == 0 and size <= most)  # no lane without a channel
        channels = next(whole, min(most, runtime.power_of_two(c)))
        pixels = min(elements // channels, max(4, eighth))
    else:
        pixels = min(256, max(32, eighth))
        channels = min(elements // pixels, runtime.power_of_two(c))
    return config._replace(tile={"PIXELS": pixels, "CHANNELS": channels})


def _mlp_tile(c: int, r: int) -> Config:
    reduced = runtime.power_of_two(r)
    return Config({"REDUCED": reduced, "CHANNELS": min(runtime.power_of_two(c), max(16, 4096 // reduced))}, 4)


def _taps_tile(k: int) -> Config:
    taps = runtime.power_of_two(2 * k * k)
    return Config({"TAPS": taps, "STEP": max(1, 2048 // taps), "STEPS": 16}, 8)


class _Plan:
    """The sizes of a call, and its programs. Nothing but their number depends on the batch."""

    def __init__(self, x: Tensor, reduced: int, k: int, batch: bool, fixed: bool, config: Config) -> None:
        self.n, self.c, self.h, self.w = x.shape
        self.r, self.k, self.p = reduced, k, self.h * self.w
        self.last, self.fixed = not x.is_contiguous(), fixed
        self.grouped = not (batch or fixed)  # each sample has moments of its own
        self.groups = self.n if self.grouped else 1
        self.tile = _tile(config, self.c, self.p, self.last)
        self.mlp, self.taps = _mlp_tile(self.c, reduced), _taps_tile(k)
        self.pieces = runtime.cdiv(self.p, self.tile.tile["PIXELS"])
        self.tiles = runtime.cdiv(self.p, _SCORES.tile["PIXELS"])
        self.tap_tiles = runtime.cdiv(self.p, self.taps.tile["STEP"] * self.taps.tile["STEPS"])

    @property
    def group_size(self) -> int:
        """Samples that share moments."""
        return 1 if self.grouped else self.n

    def sweep(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch a sweep over x: a program a piece."""
        runtime.launch(
            kernel, self.n * self.pieces, *arguments, config=self.tile, C=self.c, LAST=self.last, **constants
        )


class _Saved(NamedTuple):
    """What the backward pass needs of the forward pass: views of one tensor."""

    gate: Tensor  # [N, C]
    pooled: Tensor  # [N, 2, C]
    hidden: Tensor  # [N, 2, R]
    planes: Tensor  # [N, 2, P]
    scores: Tensor  # [N, P]
    moments: Tensor  # [2, groups], empty where they were given; last, as it would leave the others unaligned


def _saved_sizes(x: Tensor, reduced: int, moments: int) -> list[int]:
    """Floats of each of :class:`_Saved`."""
    n, c, h, w = x.shape
    return [n * c, 2 * n * c, 2 * n * reduced, 2 * n * h * w, n * h * w, 2 * moments]


def _saved_in(saved: Tensor, x: Tensor, reduced: int, moments: int) -> _Saved:
    return _Saved(*saved.split(_saved_sizes(x, reduced, moments)))


def _in_order(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x dense, NCHW or channels_last: as it is where it is that, and as ``like`` where that is given."""
    last = x.is_contiguous(memory_format=torch.channels_last) if like is None else not like.is_contiguous()
    if last and not (like is None and x.is_contiguous()):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


# ---- the forward op -------------------------------------------------------------------------------------------------

_INPUTS = (
    "Tensor x, Tensor? average, Tensor? maximum, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight,"
    " Tensor expand_bias, Tensor spatial_weight, Tensor norm_weight, Tensor norm_bias, Tensor? mean, Tensor? var,"
    " bool batch, float eps"
)


@torch.library.custom_op(
    "raccgan::cbam_triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)"
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_shapes(*inputs)
    tensors, (batch, eps) = _contiguous(inputs[:TENSORS]), inputs[TENSORS:]
    config = _config(tensors[0], lambda config: _launch_forward(tensors, batch, eps, config, *outputs))
    _launch_forward(tensors, batch, eps, config, *outputs)
    return outputs


def _launch_forward(
    tensors: list[Any], batch: bool, eps: float, config: Config, y: Tensor, own_mean: Tensor, own_var: Tensor,
    saved: Tensor,
) -> None:  # fmt: skip
    """Fill the outputs, the last four."""
    x, average, maximum, w1, b1, w2, b2, spatial_weight, slope, bias, mean, var = tensors
    plan = _Plan(x, w1.shape[0], spatial_weight.shape[-1], batch, mean is not None, config)
    kept = _saved_in(saved, x, plan.r, 0 if plan.fixed else plan.groups)
    sums = None
    if average is None or maximum is None:
        sums = saved.new_empty(plan.n * plan.pieces * 2 * plan.c)
        plan.sweep(forward.pool, x, sums, plan.p, plan.pieces)
    runtime.launch(
        forward.gate_channels, plan.n, sums, average, maximum, w1, b1, w2, b2, kept.gate, kept.pooled, kept.hidden,
        plan.pieces, float(plan.p), config=plan.mlp, C=plan.c, R=plan.r,
    )  # fmt: skip
    plan.sweep(forward.planes_of, x, kept.gate, kept.planes, plan.p, plan.pieces)
    partial = None if plan.fixed else saved.new_empty(plan.n * plan.tiles * 2)
    runtime.launch(
        forward.score, plan.n * plan.tiles, kept.planes, spatial_weight, kept.scores, partial,
        plan.p, plan.w, plan.tiles, config=_SCORES, K=plan.k,
    )  # fmt: skip
    if partial is not None:
        runtime.launch(
            forward.join_moments, plan.groups, partial, own_mean, own_var, kept.moments, plan.p, plan.tiles,
            plan.group_size * plan.tiles, float(plan.group_size * plan.p), config=_ITEMS, **_SCORES.tile,
        )  # fmt: skip
        mean, var = own_mean, own_var
    plan.sweep(
        forward.apply, x, kept.gate, kept.scores, mean, var, slope, bias, y, plan.p, plan.pieces, eps,
        GROUPED=plan.grouped,
    )  # fmt: skip


@_forward.register_fake
def _forward_shapes(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the moments (empty where they were given), and all that the backward op needs, in one float32 tensor."""
    x, reduce_weight, mean, batch = inputs[0], inputs[3], inputs[10], inputs[12]
    groups = 0 if mean is not None else 1 if batch else x.shape[0]

    def floats(count: int) -> Tensor:
        return x.new_empty(count, dtype=torch.float32)

    saved = floats(sum(_saved_sizes(x, reduce_weight.shape[0], groups)))
    return torch.empty_like(_in_order(x)), floats(groups), floats(groups), saved


def _contiguous(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    x, *others = tensors
    assert x is not None
    return [_in_order(x), *(None if t is None else t.contiguous() for t in others)]


def _config(x: Tensor, run: Callable[[Config], object] | None = None) -> Config:
    """How the sweeps are cut; measured with the forward pass, and the same backward."""
    _, c, h, w = x.shape
    last = not x.is_contiguous()
    shape = (c, h, w, x.dtype, "channels_last" if last else "NCHW")
    return tuning.choose("cbam", _FILES, shape, _candidates(c, h * w, last), x.device, run)


@cache
def _candidates(c: int, p: int, last: bool) -> list[Config]:
    def work(config: Config) -> tuple[int, int]:
        pixels = _tile(config, c, p, last).tile["PIXELS"]
        return runtime.cdiv(p, pixels), pixels * c

    return tuning.ranked(_ELEMENTS, work)


# ---- the backward op: the gradients of the first 12 arguments of the forward op, empty where they are not wanted ----

_X, _POOLED, _MLP, _SPATIAL, _NORM = 1, 0b110, 0b1111000, 1 << 7, 0b11 << 8
_MOMENTS = 0b11 << 10


@torch.library.custom_op(
    "raccgan::cbam_triton_backward",
    mutates_args=(),
    schema=f"(Tensor g_y, Tensor? g_mean, Tensor? g_var, {_INPUTS}, Tensor saved, int wanted) -> ("
    + ", ".join(["Tensor"] * TENSORS)
    + ")",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    g_y, g_mean, g_var, *inputs, batch, eps, saved, mask = arguments
    found = _backward_shapes(*arguments)
    tensors = _contiguous(tuple(inputs))
    x, mean, w1, spatial_weight = tensors[0], tensors[10], tensors[3], tensors[7]
    plan = _Plan(x, w1.shape[0], spatial_weight.shape[-1], batch, mean is not None, _config(x))
    kept = _saved_in(saved, x, plan.r, 0 if plan.fixed else plan.groups)
    if not plan.fixed:
        tensors[10], tensors[11] = kept.moments.chunk(2)
    g_moments = [g if g is None else g.float().contiguous() for g in (g_mean, g_var)]
    with torch.autocast(x.device.type, enabled=False):
        gradients = _Gradients(plan, kept, _in_order(g_y, x), tensors, eps)
        gradients.through_the_norm(g_moments)
        made = gradients.of_the_norm(mask & (_NORM | _MOMENTS))
        if mask & _SPATIAL:
            made[7] = gradients.of_the_spatial_weight().view_as(spatial_weight)
        if mask & (_X | _POOLED | _MLP):
            made |= gradients.of_the_channels(mask, found[0])
    for i, gradient in made.items():
        if mask >> i & 1:
            found[i].copy_(gradient)  # not returned itself: they are views of one another
    return found


@_backward.register_fake
def _backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, mask = arguments[3 : 3 + TENSORS], arguments[-1]

    def empty(i: int, t: Tensor | None) -> Tensor:
        if t is None or not mask >> i & 1:
            return arguments[0].new_empty(0, dtype=torch.float32)
        return torch.empty_like(_in_order(t)) if i == 0 else torch.empty(t.shape, dtype=t.dtype, device=t.device)

    return tuple(empty(i, t) for i, t in enumerate(tensors))


class _Gradients:
    """The launches of the backward pass, in their order; what later ones need stays here."""

    def __init__(self, plan: _Plan, kept: _Saved, g_y: Tensor, tensors: list[Any], eps: float) -> None:
        self.plan, self.kept, self.g_y, self.tensors, self.eps = plan, kept, g_y, tensors, eps
        self.norm = (kept.scores, tensors[10], tensors[11], tensors[8], tensors[9])
        n, p = plan.n, plan.p
        self.flow, self.ties = self._floats(n * p), self._floats(n * p)
        self.through = self._floats(n * plan.pieces * plan.c)
        self.coefficients, self.g_norm = self._floats(plan.groups * 3), self._floats(plan.groups, 4)

    def _floats(self, *shape: int) -> Tensor:
        return self.kept.gate.new_empty(shape)

    def through_the_norm(self, g_moments: list[Tensor | None]) -> None:
        plan, kept = self.plan, self.kept
        partial = self._floats(plan.n * plan.pieces * 2)
        plan.sweep(
            back.flow_of, self.tensors[0], self.g_y, kept.gate, kept.planes, *self.norm, self.flow, self.ties,
            self.through, partial, plan.p, plan.pieces, self.eps, GROUPED=plan.grouped,
        )  # fmt: skip
        runtime.launch(
            back.join_norm, plan.groups, partial, self.tensors[11], self.tensors[8], *g_moments, self.coefficients,
            self.g_norm, plan.group_size * plan.pieces, float(plan.group_size * plan.p), self.eps,
            config=_ITEMS, FIXED=plan.fixed,
        )  # fmt: skip

    def of_the_norm(self, mask: int) -> dict[int, Tensor]:
        """Of the norm's weight and bias, and of moments that were given."""
        if not mask:
            return {}
        return dict(enumerate(self.g_norm.sum(dim=0).view(4, 1), start=8))

    def of_the_spatial_weight(self) -> Tensor:
        plan = self.plan
        partial = self._floats(plan.n * plan.tap_tiles, 2 * plan.k * plan.k)
        runtime.launch(
            back.spatial_back, len(partial), self.flow, self.kept.scores, self.kept.planes, self.tensors[10],
            self.coefficients, partial, plan.p, plan.w, plan.tap_tiles,
            config=plan.taps, GROUPED=plan.grouped, K=plan.k,
        )  # fmt: skip
        return partial.sum(dim=0)

    def of_the_channels(self, mask: int, g_x: Tensor) -> dict[int, Tensor]:
        """Of the MLP's tensors, and of average and maximum; x's is written into ``g_x`` where it is wanted."""
        plan, kept = self.plan, self.kept
        x, average, maximum, w1, _, w2, _, spatial_weight = self.tensors[:8]
        n, c, r = plan.n, plan.c, plan.r
        g_planes, sums = self._floats(n * 2 * plan.p), self._floats(n * plan.pieces * 2 * c)
        runtime.launch(
            back.score_back, n * plan.tiles, self.flow, kept.scores, self.tensors[10], self.coefficients,
            spatial_weight, self.ties, g_planes, plan.p, plan.w, plan.tiles,
            config=_SCORES, GROUPED=plan.grouped, C=c, K=plan.k,
        )  # fmt: skip
        plan.sweep(back.gather, x, kept.gate, kept.planes, g_planes, kept.pooled, sums, plan.p, plan.pieces)
        g_logits, g_hidden = self._floats(n, c), self._floats(n, 2, r)
        g_pooled, tied = self._floats(n, 2, c), self._floats(n, c)
        runtime.launch(
            back.gate_back, n, self.through, sums, kept.gate, kept.hidden, w1, w2, g_logits, g_hidden, g_pooled, tied,
            plan.pieces, config=plan.mlp, C=c, R=r,
        )  # fmt: skip
        if mask & _X:
            plan.sweep(
                back.apply_back, x, self.g_y, kept.gate, kept.planes, *self.norm, g_planes, kept.pooled, g_pooled,
                tied, g_x, plan.p, plan.pieces, float(plan.p), self.eps,
                GROUPED=plan.grouped, AVERAGE=average is None, MAXIMUM=maximum is None,
            )  # fmt: skip
        made = {1: g_pooled[:, 0], 2: g_pooled[:, 1]}
        if mask & _MLP:
            made[3] = g_hidden.view(2 * n, r).t() @ kept.pooled.view(2 * n, c)
            made[4] = g_hidden.sum(dim=(0, 1))
            made[5] = g_logits.t() @ kept.hidden.view(n, 2, r).sum(dim=1)
            made[6] = 2 * g_logits.sum(dim=0)
        return made


# ---- gradients ------------------------------------------------------------------------------------------------------


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    batch: bool
    eps: float
    mask: int


def _save_forward(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    saved = output[-1]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(*inputs[:TENSORS], saved)
    ctx.set_materialize_grads(False)
    ctx.batch, ctx.eps = inputs[TENSORS:]


def _forward_backward(
    ctx: _Context, g_y: Tensor | None, g_mean: Tensor | None, g_var: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors
    x = tensors[0]
    assert x is not None
    if tensors[10] is not None:
        g_mean = g_var = None  # of the empty tensors in the place of moments that were given
    asked = [i for i in range(TENSORS) if wanted(ctx, i, tensors)]
    if g_y is None:
        g_y = torch.zeros_like(x)
    gradients = torch.ops.raccgan.cbam_triton_backward(
        g_y, g_mean, g_var, *tensors, ctx.batch, ctx.eps, saved, sum(1 << i for i in asked)
    )
    return *(gradients[i] if i in asked else None for i in range(TENSORS)), None, None


def _save_backward(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: 3 + TENSORS])
    ctx.set_materialize_grads(False)
    ctx.batch, ctx.eps, _, ctx.mask = inputs[3 + TENSORS :]


def _backward_backward(ctx: _Context, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = [wanted(ctx, i, ctx.saved_tensors) for i in range(3 + TENSORS)]
    found = gradients_of_gradients(ctx.saved_tensors, cotangents, ctx.mask, needed, batch=ctx.batch, eps=ctx.eps)
    return *found, None, None, None, None


_forward.register_autograd(_forward_backward, setup_context=_save_forward)
_backward.register_autograd(_backward_backward, setup_context=_save_backward)


# ---- ahead of time --------------------------------------------------------------------------------------------------

_SWEEPS = (forward.pool, forward.planes_of, forward.apply, back.flow_of, back.gather, back.apply_back)
_OTHERS: dict[str, dict[Any, tuple[str, ...]]] = {  # and what may be absent
    "mlp": {forward.gate_channels: ("sums",), back.gate_back: ()},
    "scores": {forward.score: ("partial",), back.score_back: ()},
    "items": {forward.join_moments: (), back.join_norm: ("g_mean", "g_var")},
}


def compilations() -> Iterator[Compilation]:
    """Sweeps in every configuration, dtype and layout; the rest for few and many channels, each norm once."""
    floats = (
        "sums", "average", "maximum", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "gate", "pooled",
        "hidden", "planes", "spatial_weight", "scores", "partial", "mean", "var", "kept", "norm_weight", "norm_bias",
        "flow", "ties", "through", "g_mean", "g_var", "coefficients", "g_norm", "g_planes", "g_logits", "g_hidden",
        "g_pooled", "tied",
    )  # fmt: skip
    types = {
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(("P", "W", "pieces", "tiles", "items"), "i32"),
        **dict.fromkeys(("pixels", "count", "eps"), "fp32"),
    }
    own = {"average": None, "maximum": None, "AVERAGE": True, "MAXIMUM": True}
    for config, dtype, (c, p, last) in product(_ELEMENTS, runtime.DTYPES, ((96, 2**14, False), (128, 2**14, True))):
        typed = {**types, **dict.fromkeys(("x", "g_y", "y", "g_x"), runtime.pointer(dtype))}
        for kernel in _SWEEPS:
            constants = {**own, "C": c, "LAST": last, "GROUPED": dtype == torch.float32}
            yield Compilation.of(kernel, _tile(config, c, p, last), typed, constants)
    for c, r, k, grouped in ((96, 6, 7, True), (1536, 96, 3, False)):
        tiles = {"mlp": _mlp_tile(c, r), "scores": _SCORES, "items": _ITEMS}
        sizes = {"C": c, "R": r, "K": k, "GROUPED": grouped, "FIXED": not grouped, **_SCORES.tile}
        for name, kernels in _OTHERS.items():
            for kernel, absent in kernels.items():
                constants = sizes | (own if grouped else dict.fromkeys(absent))
                constants = {n: value for n, value in constants.items() if n not in tiles[name].tile}
                yield Compilation.of(kernel, tiles[name], types, constants)
        yield Compilation.of(back.spatial_back, _taps_tile(k), types, sizes)
