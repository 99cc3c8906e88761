"""The runtime of all Triton kernels: whether they can run, and how they are launched. The kernels keep these rules:

- ``@jit`` and ``tl`` come from here: both exist without Triton too, so that importing never fails.
- Arithmetic is float32: ``tl.load(...).to(tl.float32)`` at every load, ``.to(pointer.dtype.element_ty)`` at the store.
- Offsets that a tensor's size can carry past 2^31 are int64: start from ``tl.program_id(0).to(tl.int64)``.
- Bounds of a ``for`` are ``tl.constexpr``; others need a ``while``.
- No atomics. A sum over programs is a second launch.

The kernels need a GPU. The tests compile all that ships without one (tests/kernels/shipped.py), and execute its PTX on
a CPU (tests/ptx).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raccgan.kernels.dispatch import Call

RELEASE = (3, 6)  # the oldest that the kernels are written for; the tests compile them with 3.6 to 3.9
OLDEST = 8  # major compute capability of the oldest GPU that the kernels are compiled for in the tests: Ampere
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of the model of the work: programs that an H100 runs at a time, and what starting one costs, in elements that it moves
# meanwhile; of a batch of that size.
_AT_A_TIME, _START, _BATCH = 2 * 132, 2048, 16

# Settled once, at import, so that torch.compile sees constants.
_MISSING: str | None = None
tl: Any = None
try:
    import triton
    import triton.language

    tl = triton.language
    VERSION: str = triton.__version__
    if triton.knobs.runtime.interpret:
        _MISSING = "TRITON_INTERPRET is set, which would run the kernels in Python: unset it"
    if tuple(int(part) for part in re.findall(r"\d+", VERSION)[:2]) < RELEASE:
        _MISSING = (
            f"Triton {VERSION} is older than {RELEASE[0]}.{RELEASE[1]}: install a PyTorch that brings a later one"
        )
except ImportError:
    triton, VERSION = None, ""
    _MISSING = "Triton is not installed: CUDA builds of PyTorch bring it along"


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function as it is where Triton is missing: then nothing ever launches it."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def pixels_of(program, tiles, pixels, PIXEL_TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # by Triton
    """Of a sample's tile: the sample, its pixels, and which of them there are."""
    sample, pixel = program // tiles, program % tiles * PIXEL_TILE + tl.arange(0, PIXEL_TILE)
    return sample, pixel, pixel < pixels


@jit
def tile_of(  # type: ignore[no-untyped-def]
    sample, pixel, first, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, CHANNEL_TILE: tl.constexpr
):
    """Channels from ``first`` on, and which of them there are; which of the tile's values there are, and offsets."""
    channel = first + tl.arange(0, CHANNEL_TILE)
    in_channels = channel < CHANNELS
    inside = (pixel < pixels)[:, None] & in_channels[None, :]
    if CHANNELS_LAST:
        at = (sample * pixels + pixel[:, None]) * CHANNELS + channel[None, :]
    else:
        at = (sample * CHANNELS + channel[None, :]) * pixels + pixel[:, None]
    return channel, in_channels, inside, at


def supports(call: Call) -> str | None:
    """Why no Triton kernel can serve ``call``, in one line; ``None`` where one can."""
    if _MISSING is not None:
        return _MISSING
    if call.dtype not in DTYPES:
        return f"the Triton kernels add in float32 and do not take {call.dtype}"
    if call.device.type == "cpu":
        return "Triton needs a GPU"
    if call.device.type != "cuda" or torch.version.hip is not None:
        return f"there are no Triton kernels for {'ROCm' if torch.version.hip else call.device.type}"
    major, minor = torch.cuda.get_device_capability(call.device)  # torch.compile knows it as a constant
    if major < OLDEST:
        return f"the GPU's compute capability {major}.{minor} is below {OLDEST}.0"
    return None


def state() -> str:
    """What is there, in one line, for ``raccgan.doctor``."""
    return _MISSING or f"{VERSION}, for GPUs of compute capability {OLDEST}.0 and up"


class Config(NamedTuple):
    """How a kernel is launched: its tile, as compile-time constants, and Triton's options."""

    tile: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


def launch(kernel: Any, programs: int, *arguments: Any, config: Config, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on the current stream of the device of the first tensor argument."""
    if programs == 0:
        return
    options = {**constants, **config.tile, "num_warps": config.num_warps, "num_stages": config.num_stages}
    with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[(programs,)](*arguments, **options)


def cheapest(configs: Iterable[Config], work: Callable[[Config], tuple[int, int]]) -> Config:
    """The first of the configurations that costs least by a model of the work, which is how many programs a sample has,
    and how many elements each of them moves; no GPU has been asked.

    Not measured by ``triton.autotune``: the order of a sum follows the tile, so that the timing of one run would decide
    its bits. The batch has no part in the choice either.
    """

    def cost(config: Config) -> int:
        programs, elements = work(config)
        return cdiv(_BATCH * programs, _AT_A_TIME) * (_START + elements)

    return min(configs, key=cost)


def cheapest_sweep(tiles: Iterable[Config], channels: int, pixels: int) -> Config:
    """:func:`cheapest` of a sweep over images, a program of which takes PIXEL_TILE pixels with all their channels."""
    return cheapest(tiles, lambda tile: (cdiv(pixels, tile.tile["PIXEL_TILE"]), tile.tile["PIXEL_TILE"] * channels))


def in_order(x: Tensor) -> Tensor:
    """x dense, channels_last or NCHW; copied where it is neither."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def empty_in_order(x: Tensor) -> Tensor:
    return torch.empty_like(in_order(x))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not below ``n``: what Triton's tiles are measured in."""
    return 1 << max(0, n - 1).bit_length()
