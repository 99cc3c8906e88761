"""The anomaly score in Triton: one read of each tensor forward, and one for its gradient.

    residual[n] = mean over c,h,w of d^2    map[n, p] = mean over c of d^2    with d = x - x_hat
    dL/dx       = 2 d (g_residual / CHW + g_map / C) = -dL/dx_hat,    f and f_hat likewise

A program takes a piece of one sample: some pixels of the images with all their channels, or some features. It writes
one partial sum; a second launch adds a sample's up, in a fixed order. Not run on a GPU yet: the tests interpret the
kernels and compile them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from raccgan.kernels import dispatch, tuning
from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.autograd import differentiate, wanted
from raccgan.kernels.triton_runtime import Compilation, Config, jit, tl

_TENSORS = 4  # x, x_hat, f, f_hat


def supports(call: dispatch.Call) -> str | None:
    """Why the Triton kernels cannot serve ``call``, in one line; ``None`` where they can."""
    return runtime.why_not(call)


def anomaly_score(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in :func:`raccgan.kernels.anomaly_score.anomaly_score`; the map is empty, [0], unless wanted.

    Args:
        x, x_hat: [N, C, H, W] in float32, bfloat16 or float16, any strides. Read in place where both are NCHW or both
            channels_last, copied otherwise.
        f, f_hat: [N, ...] likewise, both or neither.
        want_map: also return the map.

    Returns:
        residual [N], feature [N] (zeros without f) and map [N, H, W], all float32. A sample's bits depend on the
        sample, its memory order and the configuration (see :mod:`raccgan.kernels.tuning`), not on the batch.

    Gradients: every order, for all four tensors; from the second order on by PyTorch's operations.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.raccgan.anomaly_score_triton(x, x_hat, f, f_hat, want_map)
    return outputs


# ---- kernels --------------------------------------------------------------------------------------------------------


@jit
def _sums(
    x, x_hat,  # [N, C, P], or [N, P, C] where LAST
    f, f_hat,  # [N, E], or None
    to_map,  # [N, P], or None
    partial,  # [N, image_pieces + feature_pieces]
    P, E, image_pieces, feature_pieces,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """partial[n, piece] = sum of squared differences over the piece; the map of the piece, where it is wanted."""
    pieces = image_pieces + feature_pieces
    n = (tl.program_id(0) // pieces).to(tl.int64)
    piece = (tl.program_id(0) % pieces).to(tl.int64)
    if piece < image_pieces:
        p = piece * PIXELS + tl.arange(0, PIXELS)
        squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            at = (n * P + p[:, None]) * C + c[None, :] if LAST else (n * C + c[None, :]) * P + p[:, None]
            inside = (p < P)[:, None] & (c < C)[None, :]
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(x_hat + at, mask=inside, other=0.0).to(tl.float32)
            squares += (a - b) * (a - b)
        of_pixel = tl.sum(squares, axis=1)
        if to_map is not None:
            tl.store(to_map + n * P + p, of_pixel / C, mask=p < P)
        tl.store(partial + tl.program_id(0), tl.sum(of_pixel, axis=0))
    elif f is not None:
        i = (piece - image_pieces) * FEATURES + tl.arange(0, FEATURES)
        a = tl.load(f + n * E + i, mask=i < E, other=0.0).to(tl.float32)
        b = tl.load(f_hat + n * E + i, mask=i < E, other=0.0).to(tl.float32)
        tl.store(partial + tl.program_id(0), tl.sum((a - b) * (a - b), axis=0))


@jit
def _means(
    partial,  # as _sums leaves it
    residual, feature,  # [N] each; feature stays untouched without features
    image_pieces, feature_pieces, image_size: float, feature_size: float,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Means over a sample's pieces, always added in the same order; one program a sample."""
    n = tl.program_id(0)
    start = n.to(tl.int64) * (image_pieces + feature_pieces)
    tl.store(residual + n, _sum_of(partial + start, image_pieces, PIECES) / image_size)
    if feature is not None:
        tl.store(feature + n, _sum_of(partial + start + image_pieces, feature_pieces, PIECES) / feature_size)


@jit
def _sum_of(values, count, PIECES: tl.constexpr):
    sums = tl.zeros([PIECES], tl.float32)
    first = 0
    while first < count:
        i = first + tl.arange(0, PIECES)
        sums += tl.load(values + i, mask=i < count, other=0.0)
        first += PIECES
    return tl.sum(sums, axis=0)


@jit
def _gradients(
    x, x_hat, f, f_hat,  # as in _sums
    g_residual, g_feature,  # [N] each, or None
    g_map,  # [N, P], or None
    g_x, g_x_hat, g_f, g_f_hat,  # as the four, or None where not wanted
    P, E, image_pieces, feature_pieces, image_size: float, feature_size: float,
    C: tl.constexpr, LAST: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The gradients of a piece; where no image's is wanted image_pieces is 0, and likewise feature_pieces."""
    pieces = image_pieces + feature_pieces
    n = (tl.program_id(0) // pieces).to(tl.int64)
    piece = (tl.program_id(0) % pieces).to(tl.int64)
    if piece < image_pieces:
        p = piece * PIXELS + tl.arange(0, PIXELS)
        weight = tl.zeros([PIXELS], tl.float32)
        if g_residual is not None:
            weight += tl.load(g_residual + n) / image_size
        if g_map is not None:
            weight += tl.load(g_map + n * P + p, mask=p < P, other=0.0) / C
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            at = (n * P + p[:, None]) * C + c[None, :] if LAST else (n * C + c[None, :]) * P + p[:, None]
            inside = (p < P)[:, None] & (c < C)[None, :]
            _write(x, x_hat, g_x, g_x_hat, at, inside, weight[:, None])
    elif g_feature is not None:
        i = (piece - image_pieces) * FEATURES + tl.arange(0, FEATURES)
        _write(f, f_hat, g_f, g_f_hat, n * E + i, i < E, tl.load(g_feature + n) / feature_size)


@jit
def _write(a, b, g_a, g_b, at, inside, weight):
    """g_a = 2 weight (a - b) and g_b = -g_a, where they are wanted."""
    wide_a = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    wide_b = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    g = 2 * weight * (wide_a - wide_b)
    if g_a is not None:
        tl.store(g_a + at, g.to(g_a.dtype.element_ty), mask=inside)
    if g_b is not None:
        tl.store(g_b + at, (-g).to(g_b.dtype.element_ty), mask=inside)


# ---- launches -------------------------------------------------------------------------------------------------------

_ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
_FINISH = Config({"PIECES": 128}, 1)


def _tile(config: Config, channels: int, last: bool) -> Config:
    """The image's tile, and the features', of a configuration that says only how many elements a program has."""
    elements = config.tile["ELEMENTS"]
    side = min(32, runtime.power_of_two(channels)) if last else 1
    return config._replace(tile={"PIXELS": elements // side, "CHANNELS": side, "FEATURES": elements})


class _Pieces:
    """How a call is cut into programs. Nothing of it depends on the batch, so that no score does."""

    def __init__(self, x: Tensor, f: Tensor | None, config: Config, images: bool = True, features: bool = True) -> None:
        self.n, self.c, self.p, self.e, self.last = _sizes(x, f)
        self.config = _tile(config, self.c, self.last)
        self.image = runtime.cdiv(self.p, self.config.tile["PIXELS"]) if images else 0
        self.feature = runtime.cdiv(self.e, self.config.tile["FEATURES"]) if features else 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.p, self.e, self.image, self.feature

    @property
    def sizes(self) -> tuple[float, float]:
        return float(self.c * self.p), float(self.e)


def _sizes(x: Tensor, f: Tensor | None) -> tuple[int, int, int, int, bool]:
    """N, C, pixels, features of a sample, and whether x is channels_last."""
    n, c, h, w = x.shape
    return n, c, h * w, 0 if f is None or n == 0 else f.numel() // n, not x.is_contiguous()


def _config(x: Tensor, f: Tensor | None, run: Callable[[Config], object] | None = None) -> Config:
    """Measured with the forward pass, and the same backward."""
    _, *sizes, last = _sizes(x, f)
    shape = (*sizes, x.dtype, "channels_last" if last else "NCHW")
    return tuning.choose("anomaly_score", [__file__], shape, _candidates(*sizes, last), x.device, run)


@cache
def _candidates(c: int, p: int, e: int, last: bool) -> list[Config]:
    def work(config: Config) -> tuple[int, int]:
        tile = _tile(config, c, last).tile
        return runtime.cdiv(p, tile["PIXELS"]) + runtime.cdiv(e, tile["FEATURES"]), config.tile["ELEMENTS"]

    return tuning.ranked(_ELEMENTS, work)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they are where they are dense in the same order; else copies that are."""
    if a.is_contiguous() and b.is_contiguous():
        return a, b
    if a.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        return a, b
    return a.contiguous(), b.contiguous()


def _all_alike(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return *_alike(x, x_hat), *((f, f_hat) if f is None or f_hat is None else _alike(f, f_hat))


@torch.library.custom_op(
    "raccgan::anomaly_score_triton",
    mutates_args=(),
    schema="(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, bool want_map) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _all_alike(x, x_hat, f, f_hat)
    outputs = _shapes(*tensors, want_map)
    config = _config(tensors[0], tensors[2], lambda config: _launch_forward(*tensors, want_map, config, *outputs))
    _launch_forward(*tensors, want_map, config, *outputs)
    return outputs


def _launch_forward(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool, config: Config,
    residual: Tensor, feature: Tensor, to_map: Tensor,
) -> None:  # fmt: skip
    """Fill the outputs, the last three."""
    pieces = _Pieces(x, f, config)
    partial = residual.new_empty(pieces.n * (pieces.image + pieces.feature))
    runtime.launch(
        _sums, partial.numel(), x, x_hat, f, f_hat, to_map if want_map else None, partial, *pieces.counts,
        config=pieces.config, C=pieces.c, LAST=pieces.last,
    )  # fmt: skip
    runtime.launch(
        _means, pieces.n, partial, residual, feature if f is not None else None, pieces.image, pieces.feature,
        *pieces.sizes, config=_FINISH,
    )  # fmt: skip
    if f is None:
        feature.zero_()


@_forward.register_fake
def _shapes(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None, want_map: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return empty(n), empty(n), empty(n, h, w) if want_map else empty(0)


@torch.library.custom_op(
    "raccgan::anomaly_score_triton_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor x_hat, Tensor? f, Tensor? f_hat, Tensor? g_residual, Tensor? g_feature, Tensor? g_map,"
    " int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None,
    g_residual: Tensor | None, g_feature: Tensor | None, g_map: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients whose bit in ``wanted`` is set; empty, [0], in the place of the others."""
    given = (x, x_hat, f, f_hat)
    found = _backward_shapes(*given, g_residual, g_feature, g_map, wanted)
    x, x_hat, f, f_hat = _all_alike(*given)
    pieces = _Pieces(x, f, _config(x, f), images=bool(wanted & 3), features=bool(wanted & 12))
    runtime.launch(
        _gradients, pieces.n * (pieces.image + pieces.feature), x, x_hat, f, f_hat,
        *(g if g is None else g.contiguous() for g in (g_residual, g_feature, g_map)),
        *(g if wanted >> i & 1 else None for i, g in enumerate(found)), *pieces.counts, *pieces.sizes,
        config=pieces.config, C=pieces.c, LAST=pieces.last,
    )  # fmt: skip
    return found


@_backward.register_fake
def _backward_shapes(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None,
    g_residual: Tensor | None, g_feature: Tensor | None, g_map: Tensor | None, wanted: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = _all_alike(x, x_hat, f, f_hat)
    return tuple(
        torch.empty_like(t) if t is not None and wanted >> i & 1 else x.new_empty(0) for i, t in enumerate(tensors)
    )


# ---- gradients ------------------------------------------------------------------------------------------------------


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    mask: int


def _save(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.set_materialize_grads(False)


def _of_scores(
    ctx: _Context, g_residual: Tensor | None, g_feature: Tensor | None, g_map: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if g_map is not None and g_map.dim() == 1:
        g_map = None  # of a map that was not wanted
    comes = (g_residual is not None or g_map is not None, g_feature is not None and tensors[2] is not None)
    asked = [i for i in range(_TENSORS) if comes[i // 2] and wanted(ctx, i, tensors)]
    if not asked:
        return (None,) * (_TENSORS + 1)
    found = torch.ops.raccgan.anomaly_score_triton_backward(
        *tensors, g_residual, g_feature, g_map, sum(1 << i for i in asked)
    )
    return *(found[i] if i in asked else None for i in range(_TENSORS)), None


def _save_backward(ctx: _Context, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.set_materialize_grads(False)
    ctx.mask = inputs[-1]


def _of_gradients(ctx: _Context, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the formula at the top, written in PyTorch's operations."""
    used = [t if ctx.mask >> i & 1 else None for i, t in enumerate(cotangents)]
    needed = [wanted(ctx, i, ctx.saved_tensors) for i in range(_TENSORS + 3)]
    return *differentiate(_formula, ctx.saved_tensors, used, needed), None


def _formula(
    x: Tensor, x_hat: Tensor, f: Tensor | None, f_hat: Tensor | None,
    g_residual: Tensor | None, g_feature: Tensor | None, g_map: Tensor | None,
) -> Sequence[Tensor | None]:  # fmt: skip
    n, c, h, w = x.shape
    weight = x.new_zeros((n, 1, 1, 1), dtype=torch.float32)
    if g_residual is not None:
        weight = weight + (g_residual / (c * h * w)).view(n, 1, 1, 1)
    if g_map is not None:
        weight = weight + (g_map / c).unsqueeze(1)
    g = 2 * weight * (x.float() - x_hat.float())
    if f is None or f_hat is None or g_feature is None:
        return g.to(x.dtype), -g.to(x.dtype), None, None
    size = f.numel() // max(n, 1)
    g_f = 2 * (g_feature / size).view(n, *(1 for _ in f.shape[1:])) * (f.float() - f_hat.float())
    return g.to(x.dtype), -g.to(x.dtype), g_f.to(f.dtype), -g_f.to(f.dtype)


_forward.register_autograd(_of_scores, setup_context=_save)
_backward.register_autograd(_of_gradients, setup_context=_save_backward)


# ---- ahead of time --------------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """Every configuration in every dtype and layout; with everything wanted, and with the least, for one of each."""
    types = {
        **dict.fromkeys(("P", "E", "image_pieces", "feature_pieces"), "i32"),
        **dict.fromkeys(("image_size", "feature_size"), "fp32"),
        **dict.fromkeys(("partial", "to_map", "g_residual", "g_feature", "g_map", "residual", "feature"), "*fp32"),
    }
    least = dict.fromkeys(("f", "f_hat", "to_map", "g_feature", "g_map", "g_x_hat", "g_f", "g_f_hat", "feature"))
    for (i, config), dtype, (c, last) in product(enumerate(_ELEMENTS), runtime.DTYPES, ((1, False), (3, True))):
        tensors = ("x", "x_hat", "f", "f_hat", "g_x", "g_x_hat", "g_f", "g_f_hat")
        typed = {**types, **dict.fromkeys(tensors, runtime.pointer(dtype))}
        for kernel, absent in product((_sums, _gradients), ({}, least) if i == 0 else ({},)):
            yield Compilation.of(kernel, _tile(config, c, last), typed, {"C": c, "LAST": last, **absent})
    yield Compilation.of(_means, _FINISH, types, {})
    yield Compilation.of(_means, _FINISH, types, least)
