"""Rows into a table: on the terminal always, under results/ when asked. What loses stays in.

Columns of the CSV file: op, case, dtype, layout, pass (``backward`` includes the forward pass, ``penalty`` all three),
implementation (``reference`` is eager PyTorch), median_ms (``raises`` where it cannot take part), floor_ms,
share_of_floor (floor over time: 1 is the floor), best_peer, versus_best_peer (the best peer's time over this one's:
above 1 is faster than it), max_rel_error (against float64), images_per_second (of the scorer and the training step),
memory_mb (of the training step: the most that it takes beyond networks and batch, in a process of its own; with
--full).
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import raccgan
from bench import machine
from bench.roofline import Ceilings, Cost
from raccgan.kernels import dispatch, library, triton_runtime
from raccgan.outputs.files import write_csv, write_text

COLUMNS = (
    *("op", "case", "dtype", "layout", "pass", "implementation", "median_ms", "floor_ms", "share_of_floor"),
    *("best_peer", "versus_best_peer", "max_rel_error", "images_per_second", "memory_mb"),
)

FOLDER = Path(__file__).with_name("results")

NOISE = 0.05  # of a ratio, within one run

Key = tuple[str, str, str, str]
"""Op, case, dtype and pass: what is compared with one another."""


@dataclass(frozen=True)
class Row:
    """One implementation in one case, as measured."""

    device: str
    op: str
    case: str
    dtype: str
    layout: str
    pass_: str
    implementation: str
    median_ms: float | None  # None where it raised
    costs: tuple[Cost, ...]
    error: float | None
    peer: bool
    fused: bool
    note: str = ""  # why it raised
    representative: bool = True  # not only with --full
    images: int | None = None  # that went through in a call
    memory_mb: float | None = None  # beyond what was there before the call

    @property
    def key(self) -> Key:
        return self.op, self.case, self.dtype, self.pass_

    @property
    def images_per_second(self) -> float | None:
        return None if self.images is None or self.median_ms is None else 1e3 * self.images / self.median_ms


@dataclass(frozen=True)
class Judged:
    """A row beside its floor and the best peer of its case."""

    row: Row
    floor_ms: float
    best_peer: Row

    @property
    def share(self) -> float | None:
        return None if self.row.median_ms is None else self.floor_ms / self.row.median_ms

    @property
    def versus(self) -> float | None:
        best = self.best_peer.median_ms
        return None if self.row.median_ms is None or best is None else best / self.row.median_ms

    def cells(self) -> list[object]:
        row, best = self.row, self.best_peer
        return [
            row.op, row.case, row.dtype, row.layout, row.pass_, row.implementation,
            "raises" if row.median_ms is None else f"{row.median_ms:.4g}",
            f"{self.floor_ms:.3g}",
            None if self.share is None else f"{self.share:.2g}",
            f"{best.implementation} {best.layout}",
            None if self.versus is None else f"{self.versus:.3g}",
            None if row.error is None else f"{row.error:.1e}",
            None if row.images_per_second is None else f"{row.images_per_second:.4g}",
            None if row.memory_mb is None else f"{row.memory_mb:.0f}",
        ]  # fmt: skip


def judge(rows: Iterable[Row], ceilings: Ceilings) -> list[Judged]:
    """All rows, those of one case together and in the order of their time."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.key, []).append(row)
    judged = []
    for case in cases.values():
        case.sort(key=milliseconds)
        best = next(row for row in case if row.peer)
        judged += [Judged(row, ceilings.floor_ms(row.costs), best) for row in case]
    return judged


def milliseconds(row: Row) -> float:
    """For comparisons: who raises takes for ever."""
    return float("inf") if row.median_ms is None else row.median_ms


def fastest(rows: Iterable[Row], implementation: str) -> float:
    """Milliseconds of an implementation in its faster layout; infinite where it has no row."""
    return min((milliseconds(row) for row in rows if row.implementation == implementation), default=float("inf"))


def table(judged: Sequence[Judged]) -> Iterator[str]:
    """Lines for the terminal; a star marks what ``--kernels fused`` picks."""
    key = None
    for j in judged:
        row = j.row
        if row.key != key:
            key = row.key
            yield ""
            head = f"{row.op}  {row.case}  {row.dtype}  {row.pass_}"
            title = ["ms", "floor", "share", "x peer", "error", *(["images/s"] if row.images else [])]
            yield f"{head:<46}" + "".join(f"{cell:>10}" for cell in title)
        name = f"  {'*' if row.fused else ' '} {row.implementation}, {row.layout}"
        if row.median_ms is None:
            yield f"{name:<46}    raises: {row.note[:60]}"
            continue
        numbers = [f"{row.median_ms:.4g}", f"{j.floor_ms:.3g}", f"{j.share:.0%}", f"{j.versus:.2f}", f"{row.error:.0e}"]
        if row.images_per_second is not None:
            numbers.append(f"{row.images_per_second:.4g}")
        if row.memory_mb is not None:
            numbers.append(f"{row.memory_mb:.0f} MB")
        yield f"{name:<46}" + "".join(f"{cell:>10}" for cell in numbers)


def pick(case: Iterable[Judged]) -> Judged | None:
    """What a user of the package gets: what ``--kernels fused`` picks, in the layout that the networks are built in."""
    return next((j for j in case if j.row.fused and j.row.layout == "channels_last"), None)


def losing(judged: Sequence[Judged]) -> list[Judged]:
    """The picks that are slower than the best peer in any layout, by more than the noise."""
    cases: dict[tuple[str, ...], list[Judged]] = {}
    for j in judged:
        cases.setdefault(j.row.key, []).append(j)
    picks = [found for found in map(pick, cases.values()) if found is not None]
    return [j for j in picks if j.versus is not None and j.versus < 1 - NOISE]


def means(judged: Sequence[Judged]) -> Iterator[str]:
    """Lines of geometric means over the cases of an op, pass and dtype: ours against the best peer and the floor."""
    found: dict[tuple[str, ...], list[Judged]] = {}
    for j in judged:
        row = j.row
        if not row.peer and row.layout == "channels_last" and j.versus is not None:
            found.setdefault((row.op, row.dtype, row.pass_, row.implementation), []).append(j)
    for (op, dtype, pass_, implementation), cases in found.items():
        if len(cases) > 1:
            versus = geometric_mean(j.versus or 0.0 for j in cases)
            share = geometric_mean(j.share or 0.0 for j in cases)
            head = f"{op}  {dtype}  {pass_}  {implementation}"
            yield f"{head:<66} {len(cases):>3} cases {versus:>7.2f} x peer {share:>5.0%} of the floor"


@dataclass(frozen=True)
class Run:
    """What is known about a session beside its rows."""

    command: str
    verdict: str
    load: str  # before it began
    kept: bool  # whether freed memory stayed with the process


def save(name: str, device: str, judged: Sequence[Judged], ceilings: Ceilings, run: Run) -> Path:
    """Write <device>.csv, .txt and .png, or <device>-<name>; returns the CSV's path.

    The device's name is as in :func:`bench.machine.slug`.
    """
    from bench.picture import draw

    stem = FOLDER / "-".join(filter(None, (machine.slug(device), name)))
    write_csv(stem.with_suffix(".csv"), COLUMNS, [j.cells() for j in judged])
    write_text(stem.with_suffix(".txt"), "\n".join(_circumstances(device, judged, ceilings, run)) + "\n")
    draw(stem.with_suffix(".png"), judged, title=f"{machine.model(device)}, {_threads()}")
    return stem.with_suffix(".csv")


@cache
def saved(device: str) -> frozenset[Key]:
    """The cases that the device's saved tables have as this process finds them, under whatever name."""
    found: set[Key] = set()
    for file in FOLDER.glob(f"{machine.slug(device)}*.csv"):
        with file.open(encoding="utf-8", newline="") as stream:
            found |= {(line["op"], line["case"], line["dtype"], line["pass"]) for line in csv.DictReader(stream)}
    return frozenset(found)


def _of_the_gpu() -> Iterator[str]:
    """Versions and switches that a GPU's numbers depend on; TF32 is as PyTorch allows it, for everyone alike."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # PyTorch declares none
    precision = torch.backends.cuda.matmul.fp32_precision, conv.fp32_precision
    cudnn = torch.backends.cudnn.version()
    yield f"GPU         CUDA {torch.version.cuda}, cuDNN {cudnn}, Triton {triton_runtime.state()}"
    yield f"float32     in matrix products: {precision[0]}; in convolutions: {precision[1]}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _circumstances(device: str, judged: Sequence[Judged], ceilings: Ceilings, run: Run) -> Iterator[str]:
    """Everything that the numbers depend on."""
    clock = "processor time" if machine.by_processor_time(device) else "time on the wall"
    yield f"command     {run.command}"
    yield f"outcome     {run.verdict}"
    yield f"date        {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    yield f"device      {machine.model(device)}, {platform.system()} {platform.machine()}; {run.load} before"
    yield f"threads     {torch.get_num_threads()}; instructions {torch.backends.cpu.get_cpu_capability()}; {clock}"
    yield f"memory      {'what is freed stays with the process' if run.kept else 'is left to the C library'}"
    yield f"versions    Python {platform.python_version()}, PyTorch {torch.__version__}, raccgan {raccgan.__version__}"
    if device == "cuda":
        yield from _of_the_gpu()
    build = library.build()
    yield f"library     {'none' if build is None else 'instructions ' + build['cpu_capability']}"
    peak = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {dtype}" for dtype, value in ceilings.peak.items())
    yield f"ceilings    copy {ceilings.copy / 1e9:.1f} GB/s, read {ceilings.read / 1e9:.1f} GB/s, {peak}"
    yield ""
    yield "--kernels fused picks, in float32:"
    for op, choice in dispatch.require("fused", torch.device(device)).items():
        yield f"  {op:<20} {choice.name}"
    if averages := list(means(judged)):
        yield ""
        yield "Geometric means, channels_last:"
        yield from (f"  {line}" for line in averages)
    notes = sorted({(j.row.implementation, j.row.pass_, j.row.note) for j in judged if j.row.note})
    if notes:
        yield ""
        yield "What raises, and its first line:"
        yield from (f"  {implementation}, {pass_}: {note}" for implementation, pass_, note in notes)
    yield ""
    yield "Medians of interleaved rounds on rotated inputs. Only ratios within one file count."
