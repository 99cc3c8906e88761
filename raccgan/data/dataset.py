"""Samples as tensors, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from raccgan.data.cpus import usable_cpus
from raccgan.data.images.decode import decode, decode_mask, decode_stack
from raccgan.data.samples import Sample
from raccgan.errors import InputError

T = TypeVar("T")


class ImageDataset:
    """Decoded samples: ``images(indices)`` is float32 [n, C, size, size] in [-1, 1], ``labels[indices]`` int64 [n].

    A label is the place of the sample's class in ``classes``, -1 where it has none. ``size``, ``channels``, ``fit`` and
    ``brightness`` are those of ``images.decode``. As many images as fit in ``cache_bytes`` are decoded once, on first
    use, and kept as float32. Pixels that are in memory already are decoded together at the start.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        classes: Sequence[str],
        size: int,
        channels: int,
        fit: str = "stretch",
        brightness: str = "keep",
        cache_bytes: int = 2 << 30,
    ) -> None:
        self.samples = tuple(samples)
        self.classes = tuple(classes)
        self.size = size
        self.channels = channels
        self.fit = fit
        self._decoded_to: dict[str, Any] = {"size": size, "channels": channels, "fit": fit, "brightness": brightness}
        place = {name: index for index, name in enumerate(self.classes)}
        self.labels = torch.tensor([place.get(sample.label, -1) for sample in self.samples], dtype=torch.int64)  # [N]
        kept = min(len(self.samples), cache_bytes // (4 * channels * size * size))
        self._cache = torch.empty(kept, channels, size, size)  # the first `kept` images
        self._cached = np.zeros(len(self.samples), dtype=bool)
        self._preload()

    def __len__(self) -> int:
        return len(self.samples)

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images at ``indices`` (0..N-1, any order, repeats allowed): float32 [n, C, size, size], a copy.

        A file that cannot be decoded is an InputError.
        """
        wanted = indices if isinstance(indices, Tensor) else torch.tensor(list(indices), dtype=torch.int64)
        places = wanted.tolist()
        if places and not 0 <= min(places) <= max(places) < len(self):
            raise IndexError(f"images {min(places)} to {max(places)} of {len(self)}")
        cached = torch.from_numpy(self._cached[places])
        if cached.all():
            return self._cache[wanted]
        batch = torch.empty(len(wanted), self.channels, self.size, self.size)
        batch[cached] = self._cache[wanted[cached]]
        rows = torch.nonzero(~cached).flatten().tolist()
        for row, image in zip(rows, _in_threads(self._decoded, [places[row] for row in rows]), strict=True):
            batch[row] = image
        return batch

    def problems(
        self, progress: Callable[[int, int], None] | None = None, share: Sequence[int] | None = None
    ) -> dict[int, str]:
        """Decode every image and mask once, in threads, so that a bad file is found before training starts.

        ``share`` holds the indices to decode here, where other processes decode the others; by default all.
        ``progress`` is called with (done, total) after each. The result has the index of each bad sample, and a line
        that says what is wrong.
        """
        share = range(len(self)) if share is None else share
        bad = {}
        for done, (index, problem) in enumerate(zip(share, _in_threads(self._problem, share), strict=True), start=1):
            if problem is not None:
                bad[index] = problem
            if progress is not None:
                progress(done, len(share))
        return bad

    def refusal(self, bad: Mapping[int, str]) -> InputError:
        """The error for the :meth:`problems` of these samples: the first, and how many more."""
        first, *others = bad.values()
        more = f" ({len(others)} more of the {len(self)} images cannot be used either)" if others else ""
        return InputError(first + more)

    def _problem(self, index: int) -> str | None:
        sample = self.samples[index]
        try:
            if not self._cached[index]:
                self._decoded(index)
            if sample.mask is not None:
                decode_mask(sample.mask, sample.image, size=self.size, fit=self.fit)
        except InputError as error:
            return str(error)
        return None

    def _decoded(self, index: int) -> Tensor:
        """One image [C, size, size] from its file, which the cache keeps where it has room."""
        image = torch.from_numpy(decode(self.samples[index].image, **self._decoded_to))
        if index < len(self._cache):
            self._cache[index] = image
            self._cached[index] = True
        return image

    def _preload(self, chunk: int = 4096) -> None:
        """Decode the pixels in memory, a chunk of images of one shape and type at a time."""
        alike: dict[tuple[tuple[int, ...], str], list[int]] = {}
        for index, sample in enumerate(self.samples[: len(self._cache)]):
            if not isinstance(sample.image, Path):
                alike.setdefault((sample.image.shape, sample.image.dtype.str), []).append(index)
        for members in alike.values():
            for start in range(0, len(members), chunk):
                part = members[start : start + chunk]
                stack = np.stack([np.asarray(self.samples[index].image) for index in part])
                self._cache[part] = torch.from_numpy(decode_stack(stack, **self._decoded_to))
                self._cached[part] = True


def _in_threads(function: Callable[[int], T], indices: Sequence[int], few: int = 2) -> Iterator[T]:
    """``map`` in threads, results in order; Pillow decodes without the interpreter lock."""
    if len(indices) <= few:
        yield from map(function, indices)
    else:
        with ThreadPoolExecutor(min(16, usable_cpus())) as pool:
            yield from pool.map(function, indices)


class StepBatches:
    """The batch of each training step as a pure function of (seed, step): what makes resuming exact.

    Epoch e is a permutation of the indices of ``length`` images, drawn from (seed, e). The permutations follow each
    other in one endless sequence, and step s takes places s*batch_size to (s+1)*batch_size of it. So every batch is
    full; one that crosses an epoch's end may hold an index twice, and a batch larger than the data holds every index at
    least once.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length {length} and batch_size {batch_size} have to be at least 1")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> list[int]:
        """The indices of one step."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            epoch, first = divmod(step * self.batch_size + len(batch), self.length)
            batch += self._permutation(epoch)[first : first + self.batch_size - len(batch)].tolist()
        return batch

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Sorted raw output of the bit generator: NumPy keeps that stream fixed across versions, which it does not
            # promise for Generator.permutation, nor PyTorch for randperm.
            words = np.random.PCG64([self.seed % 2**64, epoch]).random_raw(self.length)
            self._order = np.argsort(words, kind="stable")
            self._epoch = epoch
        return self._order
