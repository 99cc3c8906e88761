"""The triton backend of CBAM.

The forward pass (:mod:`.forward`) sweeps over x three times. So does the backward pass (:mod:`.backward`), whose last
sweep writes. The reference computes gradients of these gradients, which only a CBAM in the discriminator needs, and
which is an option. The kernels have not run on a GPU yet: the tests execute their PTX on a CPU (tests/ptx) and compile
them for sm_80 and sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from raccgan.kernels import triton_runtime as runtime
from raccgan.kernels.cbam import autograd
from raccgan.kernels.cbam.autograd import TENSORS, CbamNeeds, CbamTensors
from raccgan.kernels.cbam.options import CbamNorm, CbamWeights
from raccgan.kernels.cbam.triton import backward as back
from raccgan.kernels.cbam.triton import forward
from raccgan.kernels.moments.triton import join_moments
from raccgan.kernels.triton_runtime import Config, cdiv, empty_in_order, launch, power_of_two


def cbam(x: Tensor, weights: CbamWeights, norm: CbamNorm) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`raccgan.kernels.cbam.cbam`, the same bits in every run. x is copied if not NCHW or channels_last."""
    return autograd.run(torch.ops.raccgan.cbam_triton, x, weights, norm)


# 16 elements a thread at most: with 32 the backward sweeps take 242 registers of 255.
_ELEMENTS = (Config({"ELEMENTS": 1024}, 4), Config({"ELEMENTS": 2048}, 4), Config({"ELEMENTS": 4096}, 8))
_SCORES = Config({"PIXEL_TILE": 256}, 4)
_MOMENTS = Config({"ITEMS": 256, "COLUMNS": 1}, 4)
_ITEMS = Config({"ITEMS": 256}, 4)


@cache
def _sweep_tile(channels: int, pixels: int, channels_last: bool) -> Config:
    """Pixels and channels of a tile. A small image is cut into eight at least, for more programs than samples."""
    eighth = power_of_two(cdiv(pixels, 8))

    def tile(config: Config) -> Config:
        elements = config.tile["ELEMENTS"]
        if channels_last:
            most = elements // 32  # so many pixels at least share the sums that a tile leaves of each channel
            whole = (size for size in (128, 64, 32) if channels % size == 0 and size <= most)  # all lanes have channels
            channel_tile = next(whole, min(most, power_of_two(channels)))
            pixel_tile = min(elements // channel_tile, max(4, eighth))
        else:
            pixel_tile = min(256, max(32, eighth))
            channel_tile = min(elements // pixel_tile, power_of_two(channels))
        return config._replace(tile={"PIXEL_TILE": pixel_tile, "CHANNEL_TILE": channel_tile})

    return runtime.cheapest_sweep(map(tile, _ELEMENTS), channels, pixels)


def _saved_sizes(tensors: CbamTensors, groups: int) -> list[int]:
    """Floats of gate [N, C], pooled [N, 2, C], hidden [N, 2, R], planes [N, 2, P], scores [N, P], moments [2, groups].

    The moments are empty where they were given; they are last, as they would leave the others unaligned.
    """
    n, c, h, w = tensors.x.shape
    hidden, moments = tensors.reduce_weight.shape[0], groups if tensors.mean is None else 0
    return [n * c, 2 * n * c, 2 * n * hidden, 2 * n * h * w, n * h * w, 2 * moments]


class _Call:
    """The sizes of a call, and its programs. Nothing but their number depends on the batch."""

    def __init__(self, tensors: CbamTensors, batch: bool, saved: Tensor) -> None:
        x, *others = tensors
        dense = (None if t is None else t.contiguous() for t in others)
        self.tensors = CbamTensors(runtime.in_order(x), *dense)  # type: ignore[arg-type]  # None for None
        (self.n, self.c, height, self.width), last = x.shape, not self.tensors.x.is_contiguous()
        self.pixels, self.hidden = height * self.width, tensors.reduce_weight.shape[0]
        self.fixed = tensors.mean is not None
        self.grouped = not (batch or self.fixed)  # whether each sample has moments of its own
        self.groups, self.group_size = (self.n, 1) if self.grouped else (1, self.n)
        self.layout = {"CHANNELS": self.c, "CHANNELS_LAST": last}
        self.sweep_tile = _sweep_tile(self.c, self.pixels, last)
        self.tiles = cdiv(self.pixels, self.sweep_tile.tile["PIXEL_TILE"])  # of a sample, in a sweep over x
        self.score_tiles = cdiv(self.pixels, _SCORES.tile["PIXEL_TILE"])
        self.saved = saved
        parts = saved.split(_saved_sizes(tensors, self.groups))
        self.gate, self.pooled, self.hidden_units, self.planes, self.scores, self.moments = parts

    def floats(self, *shape: int) -> Tensor:
        return self.saved.new_empty(shape)

    def sweep(self, kernel: Any, *tensors: Tensor | None, sizes: tuple[float, ...] = (), **constants: Any) -> None:
        """Launch a sweep over x: a program a tile. ``sizes`` follow pixels and tiles."""
        arguments = (*tensors, self.pixels, self.tiles, *sizes)
        launch(kernel, self.n * self.tiles, *arguments, config=self.sweep_tile, **self.layout, **constants)

    def mlp(self, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel of the channel gate: a program a sample."""
        wide = power_of_two(self.hidden)
        config = Config({"HIDDEN_TILE": wide, "CHANNEL_TILE": min(power_of_two(self.c), max(16, 4096 // wide))}, 4)
        launch(kernel, self.n, *arguments, config=config, CHANNELS=self.c, HIDDEN=self.hidden)

    def convolution(self, kernel: Any, tiles: int, config: Config, *tensors: Tensor | None, **constants: Any) -> None:
        """Launch a kernel of the spatial gate's convolution: so many programs a sample."""
        constants["KERNEL_SIZE"] = self.tensors.spatial_weight.shape[-1]
        launch(kernel, self.n * tiles, *tensors, self.pixels, self.width, tiles, config=config, **constants)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    y, mean, var, saved = autograd.forward_shapes(empty_in_order, _saved_sizes, *inputs)
    batch, eps = inputs[TENSORS:]
    call = _Call(CbamTensors(*inputs[:TENSORS]), batch, saved)
    tensors, n, size, tiles = call.tensors, call.n, call.group_size, call.score_tiles
    sums = call.floats(n, call.tiles, 2, call.c)
    call.sweep(forward.pool, tensors.x, sums)
    gate = (call.gate, call.pooled, call.hidden_units)
    call.mlp(forward.find_gate, sums, *tensors[1:5], *gate, call.tiles, float(call.pixels))
    call.sweep(forward.find_planes, tensors.x, call.gate, call.planes)
    partial = None if call.fixed else call.floats(n, tiles, 2)
    planes = (call.planes, tensors.spatial_weight, call.scores, partial)
    call.convolution(forward.find_scores, tiles, _SCORES, *planes)
    if partial is not None:
        parts = (partial, mean, var, call.moments, call.pixels, tiles, size * tiles, float(size * call.pixels))
        launch(join_moments, call.groups, *parts, config=_MOMENTS, CHANNELS=1, **_SCORES.tile)
    moments = (tensors.mean, tensors.var) if call.fixed else (mean, var)
    given = (tensors.x, call.gate, call.scores, *moments, tensors.norm_weight, tensors.norm_bias)
    call.sweep(forward.apply, *given, y, sizes=(eps,), GROUPED=call.grouped)
    return y, mean, var, saved


def _backward_pass(inputs: Sequence[Any], found: tuple[Tensor, ...]) -> None:
    """Fill the gradients that are needed; the others have no elements."""
    grads, tensors, (batch, eps, saved), needs = autograd.backward_arguments(*inputs)
    call, wanted = _Call(tensors, batch, saved), CbamTensors(*found)
    tensors = call.tensors
    n, c, r, pixels, grouped = call.n, call.c, call.hidden, call.pixels, {"GROUPED": call.grouped}
    order = torch.channels_last if call.layout["CHANNELS_LAST"] else torch.contiguous_format

    # From y to the scores.
    mean, var = (tensors.mean, tensors.var) if call.fixed else call.moments.chunk(2)
    norm = (call.scores, mean, var, tensors.norm_weight, tensors.norm_bias)
    given = (tensors.x, inputs[0].contiguous(memory_format=order), call.gate, call.planes, *norm)
    flow, ties, through = call.floats(n, pixels), call.floats(n, pixels), call.floats(n, call.tiles, c)
    of_tiles = call.floats(n, call.tiles, 2)
    call.sweep(back.find_flow, *given, flow, ties, through, of_tiles, sizes=(eps,), **grouped)
    coefficients, grad_norm = call.floats(call.groups, 3), call.floats(call.groups, 4)
    grad_moments = (None if g is None else g.float().contiguous() for g in grads[1:])
    parts = (of_tiles, var, tensors.norm_weight, *grad_moments, coefficients, grad_norm)
    sizes = (call.group_size * call.tiles, float(call.group_size * pixels), eps)
    launch(back.join_norm, call.groups, *parts, *sizes, config=_ITEMS, FIXED=call.fixed)
    if needs.norm or needs.moments:
        for grad, total in zip(found[-4:], grad_norm.sum(dim=0), strict=True):
            grad.copy_(total)
    if needs.spatial_weight:
        taps = tensors.spatial_weight.numel()
        tile = power_of_two(taps)
        config = Config({"TAPS": tile, "STEP": max(1, 2048 // tile), "STEPS": 16}, 8)
        tiles = cdiv(pixels, 16 * config.tile["STEP"])
        of_tiles = call.floats(n * tiles, taps)
        call.convolution(
            back.spatial_back, tiles, config, flow, call.scores, call.planes, mean, coefficients, of_tiles, **grouped
        )
        wanted.spatial_weight.copy_(of_tiles.sum(dim=0).view_as(wanted.spatial_weight))
    if not (needs.x or needs.mlp):
        return

    # From the scores to what was pooled.
    grad_planes, sums = call.floats(n, 2, pixels), call.floats(n, call.tiles, 2, c)
    scores = (flow, call.scores, mean, coefficients, tensors.spatial_weight, ties)
    call.convolution(back.score_back, call.score_tiles, _SCORES, *scores, grad_planes, CHANNELS=c, **grouped)
    call.sweep(back.gather, tensors.x, call.gate, call.planes, grad_planes, call.pooled, sums)
    grad_logits, grad_hidden = call.floats(n, c), call.floats(n, 2, r)
    grad_pooled, tied = call.floats(n, 2, c), call.floats(n, c)
    gate = (call.gate, call.hidden_units, tensors.reduce_weight, tensors.expand_weight)
    call.mlp(back.gate_back, through, sums, *gate, grad_logits, grad_hidden, grad_pooled, tied, call.tiles)
    if needs.mlp:
        wanted.reduce_weight.copy_(grad_hidden.view(2 * n, r).t() @ call.pooled.view(2 * n, c))
        wanted.reduce_bias.copy_(grad_hidden.sum(dim=(0, 1)))
        wanted.expand_weight.copy_(grad_logits.t() @ call.hidden_units.view(n, 2, r).sum(dim=1))
        wanted.expand_bias.copy_(2 * grad_logits.sum(dim=0))
    if needs.x:
        pooled = (grad_planes, call.pooled, grad_pooled, tied)
        call.sweep(back.apply_back, *given, *pooled, wanted.x, sizes=(float(pixels), eps), **grouped)


_TENSORS = ", ".join(f"Tensor{'?' if name in ('mean', 'var') else ''} {name}" for name in CbamTensors._fields)
_INPUTS = f"{_TENSORS}, bool batch, float eps"
_NEEDS = ", ".join(f"bool needs_{name}" for name in CbamNeeds._fields)
_GRADS = ", ".join(f"Tensor {name}" for name in CbamTensors._fields)


def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    found = autograd.backward_shapes(empty_in_order, *inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        _backward_pass(inputs, found)
    return found


_BACKWARD = f"(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, {_INPUTS}, Tensor saved, {_NEEDS}) -> ({_GRADS})"
_OPS = [
    torch.library.custom_op(f"raccgan::cbam_triton{name}", run, mutates_args=(), schema=schema)
    for name, run, schema in (
        ("", _forward, f"({_INPUTS}) -> (Tensor y, Tensor mean, Tensor var, Tensor saved)"),
        ("_backward", _backward, _BACKWARD),
    )
]
autograd.register_both("cbam_triton", empty_in_order, _saved_sizes)
