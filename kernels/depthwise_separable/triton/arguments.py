"""The arguments of the Triton kernels' launches and ops, in tuples. A registered op takes their fields one by one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """A prologue as the kernels have it: relu((pre_relu(.) - center) * scale + shift), a norm being folded in."""

    scale: Tensor | None = None  # [N, C] float32, with shift or not at all
    shift: Tensor | None = None  # [N, C] float32
    center: Tensor | None = None  # [N, C] float32, without a gradient
    pre_relu: bool = False
    relu: bool = False

    @property
    def nothing(self) -> bool:
        return self.scale is None and not (self.pre_relu or self.relu)

    def flags(self) -> dict[str, bool]:
        """The kernels' compile-time constants."""
        return {
            "PRE_RELU": self.pre_relu,
            "AFFINE": self.scale is not None,
            "RELU": self.relu,
            "CENTERED": self.center is not None,
        }

    def dense(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return dense(self.scale), dense(self.shift), dense(self.center)


NO_AFFINE = Affine()

SCHEMA = "Tensor? scale, Tensor? shift, Tensor? center, bool pre_relu, bool relu"
"""An :class:`Affine` in an op's schema."""


class Stride(NamedTuple):
    """Of a depthwise convolution: stride 2 (down), or transposed with stride 2 (up), or neither."""

    down: int = 1
    up: int = 1

    def transposed(self) -> Stride:
        return Stride(self.up, self.down)


PLAIN = Stride()


class Convolution(NamedTuple):
    """A depthwise convolution with its weights [C, 1, K, K] float32, K odd for stride 1 and even otherwise."""

    w: Tensor
    stride: Stride = PLAIN

    def transposed(self) -> Convolution:
        """The one that takes this one's gradient to its image."""
        return Convolution(self.w.flip(2, 3), self.stride.transposed())

    @property
    def kernel_size(self) -> int:
        return self.w.shape[-1]

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time constants."""
        return {"KERNEL_SIZE": self.kernel_size, "STRIDE": self.stride.down, "UP": self.stride.up}

    def taps(self) -> Tensor:
        """[K * K, C], where the channels that a program reads lie side by side."""
        return self.w.flatten(1).t().contiguous()


class Term(NamedTuple):
    """An image [N, C, H, W] and a factor [N, C], None where it is 1."""

    image: Tensor | None = None
    factor: Tensor | None = None
    centered: bool = False  # whether image - center stands for it

    def dense(self) -> Tensor | None:
        return dense(self.factor)


NO_TERM = Term()


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
