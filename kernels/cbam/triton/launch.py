"""Launches CBAM's Triton kernels in their order, and divides a call into programs."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam.autograd import BackwardArguments, CbamTensors
from raccgan.kernels.cbam.triton import backward as back
from raccgan.kernels.cbam.triton import forward
from raccgan.kernels.triton_runtime import Config, launch

# 16 elements a thread at most: with 32 the backward sweeps take 242 registers of 255.
ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
SCORES = Config({"PIXEL_TILE": 256}, 4)
ITEMS = Config({"ITEMS": 256}, 4)


def sweep_tile(config: Config, channels: int, pixels: int, channels_last: bool) -> Config:
    """Pixels and channels of a tile. A small image is cut into eight at least, for more programs than samples."""
    elements, eighth = config.tile["ELEMENTS"], runtime.power_of_two(runtime.cdiv(pixels, 8))
    if channels_last:
        most = elements // 32  # so many pixels at least share the sums that a tile leaves of each channel
        whole = (size for size in (128, 64, 32) if channels % size == 0 and size <= most)  # no lane without a channel
        channel_tile = next(whole, min(most, runtime.power_of_two(channels)))
        pixel_tile = min(elements // channel_tile, max(4, eighth))
    else:
        pixel_tile = min(256, max(32, eighth))
        channel_tile = min(elements // pixel_tile, runtime.power_of_two(channels))
    return config._replace(tile={"PIXEL_TILE": pixel_tile, "CHANNEL_TILE": channel_tile})


def mlp_tile(channels: int, hidden: int) -> Config:
    wide = runtime.power_of_two(hidden)
    return Config({"HIDDEN_TILE": wide, "CHANNEL_TILE": min(runtime.power_of_two(channels), max(16, 4096 // wide))}, 4)


def taps_tile(k: int) -> Config:
    taps = runtime.power_of_two(2 * k * k)
    return Config({"TAPS": taps, "STEP": max(1, 2048 // taps), "STEPS": 16}, 8)


class Plan(NamedTuple):
    """The sizes of a call, and its programs. Nothing but their number depends on the batch."""

    samples: int
    channels: int
    width: int
    pixels: int
    channels_last: bool
    hidden: int
    k: int
    fixed: bool
    grouped: bool  # whether each sample has moments of its own
    sweep_tile: Config
    mlp_tile: Config
    taps_tile: Config
    tiles: int  # of a sample, in a sweep over x
    score_tiles: int  # of a sample's scores
    tap_tiles: int  # of a sample's scores, for the gradient of the convolution's weight

    @classmethod
    def of(cls, tensors: CbamTensors, batch: bool) -> Plan:
        (n, c, height, width), last = tensors.x.shape, not tensors.x.is_contiguous()
        hidden, k, fixed = tensors.reduce_weight.shape[0], tensors.spatial_weight.shape[-1], tensors.mean is not None
        pixels, taps = height * width, taps_tile(k)
        sweep = sweep_tile(_config(c, pixels, last), c, pixels, last)
        per_tile = sweep.tile["PIXEL_TILE"], SCORES.tile["PIXEL_TILE"], taps.tile["STEP"] * taps.tile["STEPS"]
        sizes = (n, c, width, pixels, last, hidden, k, fixed, not (batch or fixed))
        return cls(*sizes, sweep, mlp_tile(c, hidden), taps, *(runtime.cdiv(pixels, size) for size in per_tile))

    @property
    def groups(self) -> int:
        """Of samples that share moments."""
        return self.samples if self.grouped else 1

    @property
    def group_size(self) -> int:
        return 1 if self.grouped else self.samples

    def sweep(self, kernel: Any, *tensors: Tensor | None, sizes: tuple[float, ...] = (), **constants: Any) -> None:
        """Launch a sweep over x: a program a tile. ``sizes`` follow pixels and tiles."""
        arguments = (*tensors, self.pixels, self.tiles, *sizes)
        constants |= {"CHANNELS": self.channels, "CHANNELS_LAST": self.channels_last}
        launch(kernel, self.samples * self.tiles, *arguments, config=self.sweep_tile, **constants)


@cache
def _config(channels: int, pixels: int, channels_last: bool) -> Config:
    def work(config: Config) -> tuple[int, int]:
        pixel_tile = sweep_tile(config, channels, pixels, channels_last).tile["PIXEL_TILE"]
        return runtime.cdiv(pixels, pixel_tile), pixel_tile * channels

    return runtime.cheapest(ELEMENTS, work)


class CbamSaved(NamedTuple):
    """What the backward pass needs of the forward pass: views of one tensor."""

    gate: Tensor  # [N, C]
    pooled: Tensor  # [N, 2, C]
    hidden: Tensor  # [N, 2, R]
    planes: Tensor  # [N, 2, P]
    scores: Tensor  # [N, P]
    moments: Tensor  # [2, groups], empty where they were given; last, as it would leave the others unaligned


def _saved_sizes(tensors: CbamTensors, groups: int) -> list[int]:
    n, c, h, w = tensors.x.shape
    hidden, moments = tensors.reduce_weight.shape[0], groups if tensors.mean is None else 0
    return [n * c, 2 * n * c, 2 * n * hidden, 2 * n * h * w, n * h * w, 2 * moments]


def saved(tensors: CbamTensors, groups: int) -> int:
    """Floats of :class:`CbamSaved`."""
    return sum(_saved_sizes(tensors, groups))


def _saved_in(saved: Tensor, tensors: CbamTensors, plan: Plan) -> CbamSaved:
    return CbamSaved(*saved.split(_saved_sizes(tensors, plan.groups)))


def like(x: Tensor) -> Tensor:
    """An empty tensor in x's order."""
    return torch.empty_like(in_order(x))


def in_order(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x dense, NCHW or channels_last: as it is where it is that, and as ``like`` where that is given."""
    last = x.is_contiguous(memory_format=torch.channels_last) if like is None else not like.is_contiguous()
    if last and not (like is None and x.is_contiguous()):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def contiguous(tensors: CbamTensors) -> CbamTensors:
    """x in order, the others contiguous."""
    x, *others = tensors
    assert x is not None
    return CbamTensors(in_order(x), *(None if t is None else t.contiguous() for t in others))  # type: ignore[arg-type]


class Forward(NamedTuple):
    """The outputs of the forward op."""

    y: Tensor
    mean: Tensor
    var: Tensor
    saved: Tensor


def forward_pass(tensors: CbamTensors, batch: bool, eps: float, outputs: Forward) -> None:
    """Fill the outputs. ``tensors`` are contiguous."""
    plan = Plan.of(tensors, batch)
    x, mean, var = tensors.x, tensors.mean, tensors.var
    saved = _saved_in(outputs.saved, tensors, plan)
    sums = outputs.saved.new_empty(plan.samples * plan.tiles * 2 * plan.channels)
    plan.sweep(forward.pool, x, sums)
    given = (sums, *tensors[1:5], saved.gate, saved.pooled, saved.hidden, plan.tiles, float(plan.pixels))
    launch(forward.find_gate, plan.samples, *given, config=plan.mlp_tile, CHANNELS=plan.channels, HIDDEN=plan.hidden)
    plan.sweep(forward.find_planes, x, saved.gate, saved.planes)
    partial = None if plan.fixed else outputs.saved.new_empty(plan.samples * plan.score_tiles * 2)
    planes = (saved.planes, tensors.spatial_weight, saved.scores, partial, plan.pixels, plan.width, plan.score_tiles)
    launch(forward.find_scores, plan.samples * plan.score_tiles, *planes, config=SCORES, KERNEL_SIZE=plan.k)
    if partial is not None:
        mean, var = outputs.mean, outputs.var
        sizes = (
            plan.pixels,
            plan.score_tiles,
            plan.group_size * plan.score_tiles,
            float(plan.group_size * plan.pixels),
        )
        parts = (partial, mean, var, saved.moments, *sizes)
        launch(forward.join_moments, plan.groups, *parts, config=ITEMS, **SCORES.tile)
    norm = (saved.scores, mean, var, tensors.norm_weight, tensors.norm_bias)
    plan.sweep(forward.apply, x, saved.gate, *norm, outputs.y, sizes=(eps,), GROUPED=plan.grouped)


def backward_pass(arguments: BackwardArguments, found: CbamTensors) -> None:
    """Fill the gradients that are needed."""
    tensors, needs = contiguous(arguments.tensors), arguments.needs
    plan = Plan.of(tensors, arguments.batch)
    backward = _Backward(plan, arguments, tensors)
    backward.through_norm()
    if needs.norm or needs.moments:
        of_norm = backward.grad_norm.sum(dim=0).view(4, 1)
        if needs.norm:
            found.norm_weight.copy_(of_norm[0])
            found.norm_bias.copy_(of_norm[1])
        if needs.moments and found.mean is not None and found.var is not None:
            found.mean.copy_(of_norm[2])
            found.var.copy_(of_norm[3])
    if needs.spatial_weight:
        found.spatial_weight.copy_(backward.of_spatial_weight().view_as(found.spatial_weight))
    if needs.x or needs.mlp:
        backward.through_channel_gate()
    if needs.mlp:
        backward.write_mlp(found)
    if needs.x:
        backward.write_x(found.x)


class _Backward:
    """The launches of the backward pass, in their order. What later ones need stays here."""

    def __init__(self, plan: Plan, arguments: BackwardArguments, tensors: CbamTensors) -> None:
        self.plan, self.eps, self.tensors = plan, arguments.eps, tensors
        self.saved = saved = _saved_in(arguments.saved, tensors, plan)
        self.grad_y = in_order(arguments.grad_y, tensors.x)
        moments = (arguments.grad_mean, arguments.grad_var)
        self.grad_moments = [None if g is None else g.float().contiguous() for g in moments]
        mean, var = (tensors.mean, tensors.var) if plan.fixed else saved.moments.chunk(2)
        self.mean, self.var = mean, var
        self.norm = (saved.scores, mean, var, tensors.norm_weight, tensors.norm_bias)
        n, c, pixels = plan.samples, plan.channels, plan.pixels
        self.flow, self.ties = self._floats(n * pixels), self._floats(n * pixels)
        self.through = self._floats(n * plan.tiles * c)
        self.coefficients, self.grad_norm = self._floats(plan.groups * 3), self._floats(plan.groups, 4)

    def _floats(self, *shape: int) -> Tensor:
        return self.saved.gate.new_empty(shape)

    def through_norm(self) -> None:
        """From y to the scores; leaves the gradients of the norm's weight, bias and moments in ``grad_norm``."""
        plan, saved = self.plan, self.saved
        partial = self._floats(plan.samples * plan.tiles * 2)
        given = (self.tensors.x, self.grad_y, saved.gate, saved.planes, *self.norm)
        found = (self.flow, self.ties, self.through, partial)
        plan.sweep(back.find_flow, *given, *found, sizes=(self.eps,), GROUPED=plan.grouped)
        parts = (partial, self.var, self.tensors.norm_weight, *self.grad_moments, self.coefficients, self.grad_norm)
        sizes = (plan.group_size * plan.tiles, float(plan.group_size * plan.pixels), self.eps)
        launch(back.join_norm, plan.groups, *parts, *sizes, config=ITEMS, FIXED=plan.fixed)

    def of_spatial_weight(self) -> Tensor:
        plan = self.plan
        partial = self._floats(plan.samples * plan.tap_tiles, 2 * plan.k * plan.k)
        given = (self.flow, self.saved.scores, self.saved.planes, self.mean, self.coefficients, partial)
        constants = {"GROUPED": plan.grouped, "KERNEL_SIZE": plan.k}
        sizes = (plan.pixels, plan.width, plan.tap_tiles)
        launch(back.spatial_back, len(partial), *given, *sizes, config=plan.taps_tile, **constants)
        return partial.sum(dim=0)

    def through_channel_gate(self) -> None:
        """From the scores to what was pooled."""
        plan, saved, tensors = self.plan, self.saved, self.tensors
        n, c = plan.samples, plan.channels
        self.grad_planes, sums = self._floats(n * 2 * plan.pixels), self._floats(n * plan.tiles * 2 * c)
        scores = (self.flow, saved.scores, self.mean, self.coefficients, tensors.spatial_weight, self.ties)
        sizes = (plan.pixels, plan.width, plan.score_tiles)
        constants = {"GROUPED": plan.grouped, "CHANNELS": c, "KERNEL_SIZE": plan.k}
        launch(back.score_back, n * sizes[-1], *scores, self.grad_planes, *sizes, config=SCORES, **constants)
        plan.sweep(back.gather, tensors.x, saved.gate, saved.planes, self.grad_planes, saved.pooled, sums)
        self.grad_logits, self.grad_hidden = self._floats(n, c), self._floats(n, 2, plan.hidden)
        self.grad_pooled, self.tied = self._floats(n, 2, c), self._floats(n, c)
        given = (self.through, sums, saved.gate, saved.hidden, tensors.reduce_weight, tensors.expand_weight)
        found = (self.grad_logits, self.grad_hidden, self.grad_pooled, self.tied)
        launch(back.gate_back, n, *given, *found, plan.tiles, config=plan.mlp_tile, CHANNELS=c, HIDDEN=plan.hidden)

    def write_x(self, grad_x: Tensor) -> None:
        plan, saved = self.plan, self.saved
        given = (self.tensors.x, self.grad_y, saved.gate, saved.planes, *self.norm)
        found = (self.grad_planes, saved.pooled, self.grad_pooled, self.tied, grad_x)
        sizes = (float(plan.pixels), self.eps)
        plan.sweep(back.apply_back, *given, *found, sizes=sizes, GROUPED=plan.grouped)

    def write_mlp(self, found: CbamTensors) -> None:
        n, c, r = self.plan.samples, self.plan.channels, self.plan.hidden
        found.reduce_weight.copy_(self.grad_hidden.view(2 * n, r).t() @ self.saved.pooled.view(2 * n, c))
        found.reduce_bias.copy_(self.grad_hidden.sum(dim=(0, 1)))
        found.expand_weight.copy_(self.grad_logits.t() @ self.saved.hidden.view(n, 2, r).sum(dim=1))
        found.expand_bias.copy_(2 * self.grad_logits.sum(dim=0))
