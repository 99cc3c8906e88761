"""The picture of a results table: every representative case's time over its floor, ours and the peers.

Cases are chosen in the source before anything is measured, so a losing one stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.results import NOISE, Judged, pick
from raccgan.outputs.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE
from raccgan.outputs.files import write_atomically
from raccgan.outputs.pictures import INK

# By what runs: marker and colour. Filled in channels_last, hollow in NCHW.
_KINDS = {
    "reference": ("o", GREY, "eager PyTorch"),
    "one process": ("p", GREY, "one process"),
    "torch.compile": ("s", GREY, "torch.compile"),
    "ONNX Runtime": ("v", GREY, "ONNX Runtime"),
    "OpenVINO": ("X", GREY, "OpenVINO"),
    "no kernel": ("^", PURPLE, "ours: PyTorch's own operations, rearranged"),
    "ours": ("D", BLUE, "ours: compiled kernels"),
    "ours, compiled": ("P", BLUE, "ours through torch.compile"),
}
_TITLES = {
    "anomaly_score": "anomaly score",
    "cbam": "CBAM",
    "depthwise": "depthwise convolution alone",
    "depthwise_separable": "depthwise-separable convolution",
    "moments": "moments of a batch norm",
    "scorer": "the whole scorer",
    "training_step": "training step",
    "training_ranks": "training step by two ranks, the time of all cores",
}
_KEY = (
    "G32.2a 256-128 @8 b16: generator at 32 px, block 2, first convolution, 256 to 128 channels, input 8 x 8, "
    "batch 16; D: discriminator, b: second, s: skip.\n"
    "1.10x: the best peer's time over that of what --kernels fused picks, in the networks' own layout, channels_last."
)
_TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
_INCHES_A_CASE = 0.27


def draw(path: Path, judged: Sequence[Judged], title: str) -> None:
    """Write the PNG: a panel an op, a line a case.

    Raises:
        InputError: the machine refuses to write there.
    """
    shown = [j for j in judged if j.row.representative] or list(judged)
    panels: dict[str, dict[tuple[str, ...], list[Judged]]] = {}
    for j in shown:
        panels.setdefault(j.row.op, {}).setdefault(j.row.key, []).append(j)
    cases = sum(len(panel) for panel in panels.values())
    with matplotlib.style.context(["default", STYLE]):
        height = _INCHES_A_CASE * cases + 0.35 * len(panels) + 1.5
        figure = Figure(figsize=(11, height), dpi=110, layout=ConstrainedLayoutEngine(h_pad=0.03))
        FigureCanvasAgg(figure)
        ratios = [len(panel) + 0.6 for panel in panels.values()]
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for ax, (op, panel) in zip(axes, panels.items(), strict=True):
            _panel(ax, list(panel.values()))
            ax.set_title(_TITLES.get(op, op))
        _share_axis(axes[-1], shown)
        figure.suptitle(f"Time over the floor on {title}", x=0.01, ha="left", weight="bold", fontsize=13)
        legend = figure.legend(
            handles=_legend(shown), loc="outside lower left", ncols=3, fontsize=9, title=_KEY, title_fontsize=9
        )
        legend.get_title().set_multialignment("left")
        legend.set_alignment("left")
        write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _panel(ax: Axes, cases: Sequence[Sequence[Judged]]) -> None:
    ax.set_ylim(len(cases) - 0.4, -0.6)
    ax.set_yticks(range(len(cases)), [_label(case[0]) for case in cases], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.axvline(1, color=INK, linewidth=1.2)
    for y, case in enumerate(cases):
        chosen = pick(case)
        if chosen is not None and chosen.row.median_ms is not None:
            best = chosen.best_peer.median_ms or chosen.row.median_ms
            ends = [time / chosen.floor_ms for time in (best, chosen.row.median_ms)]
            ax.plot(ends, [y, y], color=_colour(chosen), linewidth=5, alpha=0.25, solid_capstyle="butt", zorder=1)
        for j in case:
            if j.row.median_ms is not None:
                marker, colour, _ = _KINDS[_kind(j)]
                face = colour if j.row.layout == "channels_last" else "white"
                zorder = 3 if j.row.peer else 4
                ax.plot(
                    j.row.median_ms / j.floor_ms, y, marker, color=colour, markerfacecolor=face, ms=6, zorder=zorder
                )
        text, colour = _verdict(chosen, case)
        ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=colour)


def _label(j: Judged) -> str:
    dtype = "" if j.row.dtype == "float32" else f" {j.row.dtype}"
    pass_ = "" if j.row.pass_ in ("score", "step") else f"  {j.row.pass_}"
    return f"{j.row.case}{dtype}{pass_}"


def _kind(j: Judged) -> str:
    name = j.row.implementation
    if j.row.peer:
        return next(kind for kind in _KINDS if name.startswith(kind))
    if "(no kernel)" in name:
        return "no kernel"
    return "ours, compiled" if name.endswith(", compiled") else "ours"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _verdict(chosen: Judged | None, case: Sequence[Judged]) -> tuple[str, str]:
    if chosen is None or chosen.versus is None or chosen.row.median_ms is None:
        return "not measured", GREY
    row = chosen.row
    images = "" if row.images_per_second is None else f", {_three_digits(row.images_per_second)} images/s"
    raising = sorted({j.row.implementation for j in case if j.row.median_ms is None})
    raises = "".join(f", {name} raises" for name in raising)
    return f"{chosen.versus:.2f}x  {row.implementation}, {row.median_ms:.3g} ms{images}{raises}", _colour(chosen)


def _colour(chosen: Judged) -> str:
    versus = chosen.versus or 0
    return GREEN if versus > 1 + NOISE else ORANGE if versus < 1 - NOISE else INK


def _share_axis(ax: Axes, shown: Sequence[Judged]) -> None:
    times = [j.row.median_ms / j.floor_ms for j in shown if j.row.median_ms is not None]
    ax.set_xscale("log")
    ax.set_xlim(min(0.9, 0.9 * min(times)), 1.15 * max(times))
    ax.xaxis.set_major_locator(FixedLocator(_TICKS))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("time over the floor, which the machine's bandwidth and arithmetic set: 1 is as fast as it can be")


def _legend(shown: Sequence[Judged]) -> list[Line2D]:
    there = {_kind(j) for j in shown}
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=label)
        for kind, (marker, colour, label) in _KINDS.items()
        if kind in there
    ]
    handles.append(Line2D([], [], linestyle="", marker="o", color=INK, label="filled: channels_last"))
    handles.append(Line2D([], [], linestyle="", marker="o", color=INK, markerfacecolor="white", label="hollow: NCHW"))
    for colour, what in ((GREEN, "faster"), (ORANGE, "slower")):
        label = f"--kernels fused is {what} than the best peer"
        handles.append(Line2D([], [], color=colour, linewidth=5, alpha=0.4, label=label))
    return handles
