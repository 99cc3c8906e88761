"""Figures of a run: each function takes arrays and writes one PNG, whole or not at all.

Images are float [1 or 3, H, W] in [-1, 1]. Words repeat what a colour says. Maps use inferno, which survives
colour-blindness and grey printing. A file that cannot be written is an InputError, another shape a ValueError.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogFormatter, PercentFormatter
from numpy.typing import ArrayLike

from raccgan.outputs.files import write_atomically
from raccgan.outputs.overlays import to_uint8
from raccgan.outputs.pictures import INK, Array, PathLike, plain, short

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b6fb8", "#d9550b", "#0a7d55", "#8a4fa8", "#6b7280"
RED, OUTLINE = "#c22f2f", "#06b6d4"
STYLE: dict[str, Any] = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), INK),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "grid.color": "#e5e7eb",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 10,
    "text.parse_math": False,  # a class may be called "$5" or "a_b$"
}
LOSSES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("discriminator and generator", {"wasserstein": "Wasserstein estimate", "generator": "generator loss"}),
    ("gradient penalty", {"penalty": "(gradient norm - 1)²"}),
    ("encoder", {"image": "image term", "feature": "feature term"}),
    ("pathology head", {"pathology": "logistic loss"}),
)


@dataclass(frozen=True)
class Reconstruction:
    """One row of :func:`reconstructions`."""

    original: Array  # [C, H, W] in [-1, 1]
    reconstruction: Array  # [C, H, W] in [-1, 1]
    map: Array  # [H, W], at least 0, higher = more anomalous
    name: str
    label: str
    score: float
    anomalous: bool  # the truth
    predicted: bool  # the decision
    mask: Array | None = None  # [H, W] bool, the true anomaly


def reconstructions(path: PathLike, items: Sequence[Reconstruction]) -> None:
    """A row an image: what is known and decided, original, reconstruction, and anomaly map on one common scale.

    The map lies over the original, clearer where it is low. The true mask, where there is one, is outlined.
    """
    scale = Normalize(0, max([float(np.quantile(item.map, 0.999)) for item in items] + [1e-12]))
    with _figure(path, 7.2, 0.9 + 1.5 * len(items)) as figure:
        heights = [*([1.0] * len(items)), 0.07]
        grid = figure.add_gridspec(len(heights), 4, width_ratios=(1.5, 1, 1, 1), height_ratios=heights)
        for row, item in enumerate(items):
            caption, *axes = (figure.add_subplot(grid[row, column]) for column in range(4))
            _caption(caption, item)
            original = to_uint8(item.original)
            below = original.mean(axis=-1)  # colours there would mix with the map's
            for ax, image in zip(axes, (original, to_uint8(item.reconstruction), below), strict=True):
                ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                ax.axis("off")
            clear = 0.4 + 0.6 * np.clip(scale(item.map), 0, 1)
            axes[2].imshow(item.map, cmap="inferno", norm=scale, alpha=clear, interpolation="nearest")
            for ax in (axes[0], axes[2]):
                _outline(ax, item.mask)
            if row == 0:
                for ax, title in zip(axes, ("original", "reconstruction", "anomaly map"), strict=True):
                    ax.set_title(title, loc="center")
        bar = figure.add_subplot(grid[-1, 1:])
        figure.colorbar(ScalarMappable(scale, "inferno"), bar, orientation="horizontal", extend="max")
        bar.set_xlabel("anomaly map: squared error of a pixel, smoothed")
        if any(item.mask is not None for item in items):
            note = figure.add_subplot(grid[-1, 0])
            note.axis("off")
            note.text(0, 0.5, "outline: the true anomaly", va="center", fontsize=9, color=OUTLINE, weight="bold")


def loss_curves(path: PathLike, history: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Losses over steps, faint as recorded and smoothed over a fiftieth of the points; a panel a kind.

    ``history`` holds (step, value) points by name: those of :data:`LOSSES`, others in a panel of their own. Values that
    are not finite leave a gap.
    """
    known = {name for _, labels in LOSSES for name in labels}
    others = {name: name.replace("_", " ") for name in history if name not in known}
    panels = [
        (title, drawn)
        for title, labels in (*LOSSES, ("other", others))
        if (drawn := {name: label for name, label in labels.items() if history.get(name)})
    ]
    with _figure(path, max(4.4 * len(panels), 4.4), 3.6) as figure:
        for place, (title, labels) in enumerate(panels):
            ax = figure.add_subplot(1, len(panels), place + 1)
            for (name, label), colour in zip(labels.items(), (BLUE, ORANGE, GREEN, PURPLE) * len(labels), strict=False):
                steps, values = np.array(history[name], dtype=float).T
                ax.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
                ax.plot(steps, _smooth(values), color=colour, linewidth=1.8, label=plain(label))
            ax.set(title=title, xlabel="step", ylabel="loss")
            finite = np.concatenate([np.array(history[name], dtype=float)[:, 1] for name in labels])
            if title != LOSSES[0][0] and (finite[np.isfinite(finite)] > 0).all():
                ax.set_yscale("log")
                _plain_powers(ax.yaxis)
            ax.legend(loc="best")
        if not panels:
            figure.text(0.5, 0.5, "no step recorded", ha="center", color=GREY)


class RocCurve(NamedTuple):
    """The ROC of one kind of score. False and true positive rates are empty, and ``auroc`` None, where undefined."""

    false_positive: ArrayLike  # [points], from 0 to 1
    true_positive: ArrayLike  # [points], from 0 to 1
    auroc: float | None


def roc_and_histogram(
    path: PathLike, scores: ArrayLike, anomalous: ArrayLike, threshold: float, curves: Mapping[str, RocCurve]
) -> None:
    """Left the ROC of each kind of score, the first one stands out; right a histogram of scores of either class.

    ``scores`` [N] are higher for anomalies, ``anomalous`` [N] is the truth; where one class is missing, the ROC says
    so. Scores above ``threshold`` are predicted anomalous.
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(anomalous).astype(bool)
    with _figure(path, 10.4, 4.4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _roc(left, curves)
        if y.all() or not y.any():
            left.text(0.5, 0.6, "needs normal and\nanomalous images", ha="center", color=INK, backgroundcolor="white")
        _histogram(right, s, y, threshold)


def _roc(ax: Axes, curves: Mapping[str, RocCurve]) -> None:
    ax.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle=":", label="chance, AUROC 0.500")
    colours = (BLUE, ORANGE, GREEN, PURPLE, GREY) * len(curves)
    for place, ((name, curve), colour) in enumerate(zip(curves.items(), colours, strict=False)):
        label = f"{plain(short(name, 24))}, AUROC {'undefined' if curve.auroc is None else f'{curve.auroc:.3f}'}"
        width, order = 2.4 if place == 0 else 1.4, 3 - place * 0.1
        ax.plot(curve.false_positive, curve.true_positive, color=colour, linewidth=width, label=label, zorder=order)
    ax.set(title="ROC", xlabel="normal images taken for anomalies", ylabel="anomalies found")
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="lower right", fontsize=9)


def _histogram(ax: Axes, s: Array, y: Array, threshold: float) -> None:
    shown = [*s, threshold] if math.isfinite(threshold) else [*s]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    # Errors spread over decades where a few images are far off: a linear axis would show two bars.
    logarithmic = low > 0 and high > 50 * low
    edges = np.geomspace(low, high, 41) if logarithmic else np.histogram_bin_edges([low, high], 40)
    for chosen, colour, name in ((~y, BLUE, "normal"), (y, ORANGE, "anomalous")):
        count = int(chosen.sum())
        shares = np.histogram(s[chosen], edges)[0] / max(count, 1)
        ax.stairs(shares, edges, fill=True, color=colour, alpha=0.3, label=f"{name}, {count} images")
        if count:
            ax.stairs(shares, edges, color=colour, linewidth=1.4)
    if logarithmic:
        ax.set_xscale("log")
        _plain_powers(ax.xaxis)
    ax.set(title="scores", xlabel="anomaly score", ylabel="share of the class's images")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylim(0, max(ax.get_ylim()[1] * 1.25, 0.01))  # room for the legend
    if math.isfinite(threshold):
        ax.axvline(threshold, color=INK, linewidth=1.4, linestyle="--", label=f"threshold {threshold:.4g}")
    ax.legend(loc="upper right", fontsize=9)


def comparison(
    path: PathLike, ours: Mapping[str, tuple[float, float]], beside: Mapping[str, float], *, title: str
) -> None:
    """One dot with its deviation a variant of ours, and under them one diamond a figure to compare with.

    ``ours`` holds mean and deviation by name, at least one; ``beside`` other figures on the same scale.
    """
    names = [*ours, *beside]
    with _figure(path, 8, 1.2 + 0.32 * len(names)) as figure:
        ax = figure.subplots()
        for place, (value, deviation) in enumerate(ours.values()):
            ax.errorbar(value, place, xerr=deviation, fmt="o", color=BLUE, capsize=3, markersize=7)
        ax.plot(list(beside.values()), range(len(ours), len(names)), "D", color=GREY, markersize=6, linestyle="none")
        values = [value for value, _ in ours.values()] + list(beside.values())
        for place, value in enumerate(values):
            ax.annotate(f"{value:.3f}", (value, place), (8, 6), textcoords="offset points", fontsize=9)
        ax.axvline(max(ours.values())[0], color=BLUE, linewidth=1, linestyle="--")
        ax.set_yticks(range(len(names)), [plain(short(name, 40)) for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        room = max(1 - min(values), 0.05)
        ax.set_xlim(min(values) - 0.08 * room, 1 + 0.1 * room)
        ax.set(title=plain(title), xlabel="area under the ROC curve (dots: ours, with the deviation over seeds)")


def _caption(ax: Axes, item: Reconstruction) -> None:
    verdict = {
        (True, True): "anomalous, found",
        (True, False): "normal, false alarm",
        (False, True): "anomalous, missed",
        (False, False): "normal, passed",
    }[bool(item.predicted), bool(item.anomalous)]
    ax.axis("off")
    lines = (
        (short(item.name, 25), INK, "bold"),
        (f"class {short(item.label, 21)}", GREY, "normal"),
        (f"score {item.score:.4g}", INK, "normal"),
        (verdict, GREEN if item.predicted == item.anomalous else RED, "bold"),
    )
    for place, (text, colour, weight) in enumerate(lines):
        y, words = 0.76 - 0.17 * place, plain(text)
        ax.text(0, y, words, transform=ax.transAxes, va="center", fontsize=9, color=colour, weight=weight)


def _outline(ax: Axes, mask: Array | None) -> None:
    if mask is None or not np.any(mask):
        return
    framed = np.pad(np.asarray(mask, dtype=float), 1)  # closes the outline at the border of the image
    height, width = framed.shape
    ax.contour(np.arange(width) - 1, np.arange(height) - 1, framed, levels=[0.5], colors=OUTLINE, linewidths=1.2)
    ax.set(xlim=(-0.5, width - 2.5), ylim=(height - 2.5, -0.5))


class _PlainPowers(LogFormatter):
    """0.01 instead of 1e-02, and numbers between where the axis holds less than a decade."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_powers(axis: Axis) -> None:
    axis.set_major_formatter(_PlainPowers())
    axis.set_minor_formatter(_PlainPowers(minor_thresholds=(1, 0.4)))


def _smooth(values: Array) -> Array:
    """Centred mean over a fiftieth of the points; the ends and values that are not finite count less, not as 0."""
    box = np.ones(2 * (len(values) // 100) + 1)
    good = np.isfinite(values)
    total = np.convolve(np.where(good, values, 0), box, "same")
    count = np.convolve(good, box, "same")
    return np.where(good, total / np.maximum(count, 1), np.nan)


@contextmanager
def _figure(path: PathLike, width: float, height: float) -> Iterator[Figure]:
    """A figure in inches that is written to ``path`` at the end, in our style whatever the user's settings are."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
        yield figure
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
