"""Images from the averaged generator.

Image i of a seed is made from the latent z_i ~ N(0, 1), which depends on the seed and on i alone: z_i is the same for
every class and for any number of images. A truncation t draws every coordinate outside [-t, t] again until it lies
within (BigGAN's truncation trick).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from raccgan.models.generator import Generator
from raccgan.models.randomness import stream

LOWEST_TRUNCATION = 0.1  # below, fewer than one coordinate in twelve is kept, and drawing again takes ever longer


def latents(indices: Iterable[int], size: int, *, seed: int, truncation: float | None = None) -> Tensor:
    """The latents z_i of ``indices``, [N, size], on the CPU; a ValueError below :data:`LOWEST_TRUNCATION`."""
    if truncation is not None and not truncation >= LOWEST_TRUNCATION:
        raise ValueError(f"the truncation must be at least {LOWEST_TRUNCATION}, got {truncation}")
    rows = []
    for index in indices:
        draw = stream(seed, "generate", index)
        z = torch.randn(size, generator=draw)
        while truncation is not None and (beyond := z.abs() > truncation).any():
            z[beyond] = torch.randn(int(beyond.sum()), generator=draw)
        rows.append(z)
    return torch.stack(rows) if rows else torch.empty(0, size)


@torch.inference_mode()
def images(generator: Generator, z: Tensor, y: int, *, batch: int = 64) -> Tensor:
    """G(z, y) of latents z [N, latent] and the class of index y: [N, C, S, S] in [-1, 1], float32, on the CPU."""
    device = generator.embedding.weight.device
    batches = z.to(device).split(batch)
    made = [generator(part, torch.full((len(part),), y, device=device)).float().cpu() for part in batches]
    return torch.cat(made).contiguous()


@torch.inference_mode()
def between_classes(generator: Generator, z: Tensor, first: int, last: int, steps: int) -> Tensor:
    """From one class to another at a fixed latent z [latent]: [steps, C, S, S] in [-1, 1], on the CPU.

    The generator looks class embeddings up in a table; here the table is the straight line between those of the two.
    """
    table = generator.embedding.weight
    line = torch.lerp(table[first], table[last], torch.linspace(0, 1, steps, device=table.device)[:, None])
    inputs = z.to(table.device).expand(steps, -1), torch.arange(steps, device=table.device)
    made: Tensor = torch.func.functional_call(generator, {"embedding.weight": line}, inputs)
    return made.float().cpu().contiguous()


def between_latents(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """A path between two latents [latent], ends included: [steps, latent], cos(t) first + sin(t) last.

    Of two draws from N(0, 1) every point is such a draw too. Halfway on a straight line the deviation would be 0.7.
    """
    turn = torch.linspace(0, math.pi / 2, steps)[:, None]
    path = turn.cos() * first + turn.sin() * last
    path[-1] = last  # cos of a quarter turn is not quite 0 in floating point
    return path
