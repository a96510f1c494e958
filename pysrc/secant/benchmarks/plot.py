"""Pictures of the demo and of the benchmarks. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from secant.benchmarks.report import duration

#: Okabe and Ito's colours, told apart with every kind of colour vision.
TORCH, SECANT, STEP, BF16, INK, GREY = "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#222222", "#8a8a8a"


class Curve(NamedTuple):
    """A loss over seconds: what it is called, its colour."""

    label: str
    color: str
    seconds: Sequence[float]
    losses: Sequence[float]


class Series(NamedTuple):
    """Seconds over n."""

    label: str
    color: str
    n: Sequence[int]
    seconds: Sequence[float]


def _bare(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(which="both", labelsize=9.5, labelcolor=INK, color=GREY, length=3)
    ax.grid(axis="y", color="#ebebeb", linewidth=0.8)
    ax.set_axisbelow(True)


def _title(ax: Axes, text: str, below: str) -> None:
    for words, height, size, weight, color in ((text, 24, 12, "bold", INK), (below, 8, 9.5, "normal", "#5a5a5a")):
        ax.annotate(
            words, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points", fontsize=size,
            fontweight=weight, color=color, va="bottom",
        )  # fmt: skip


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved apart until neighbours are `gap` away, as little as that takes."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    groups: list[list[int]] = []
    centers: list[float] = []
    for i in order:
        groups.append([i])
        centers.append(positions[i])
        # A group is centred on the mean of its members; one that touches the group below joins it.
        while len(groups) > 1 and centers[-1] - centers[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
            centers[-2:] = [sum(positions[j] for j in groups[-1]) / len(groups[-1])]
    moved = list(positions)
    for group, center in zip(groups, centers, strict=True):
        for rank, i in enumerate(group):
            moved[i] = center + gap * (rank - (len(group) - 1) / 2)
    return moved


def _end_labels(ax: Axes, series: Sequence[tuple[str, str, float, float]], points: float = 13.5) -> None:
    """Label each (text, color, x, y) to the right of its point, without overlaps."""
    scale = 72.0 / ax.figure.dpi
    pixels = [ax.transData.transform((x, y)) for _, _, x, y in series]
    heights = _spread([y * scale for _, y in pixels], points)
    for (text, color, x, y), (_, y0), height in zip(series, pixels, heights, strict=True):
        ax.annotate(
            text, (x, y), (8, height - y0 * scale), textcoords="offset points", va="center", color=color, fontsize=9.5,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def loss_panel(ax: Axes, title: str, below: str, curves: Sequence[Curve]) -> None:
    """Loss against seconds, one curve per optimizer, labelled where it ends."""
    longest = max(curve.seconds[-1] for curve in curves)
    for curve in curves:
        best, lowest = [], float("inf")
        for loss in curve.losses:
            lowest = min(lowest, loss)
            best.append(lowest)
        ax.step(curve.seconds, best, where="post", color=curve.color, linewidth=2.2, solid_joinstyle="round")
        ax.plot(curve.seconds[-1], best[-1], "o", color=curve.color, markersize=6)
        side = "left" if curve.seconds[-1] == longest else "right"  # labels part where the ends are close
        ax.annotate(
            f"{curve.label}\n{duration(curve.seconds[-1])}", (curve.seconds[-1], best[-1]), (0, 9), ha=side,
            textcoords="offset points", color=curve.color, fontsize=9.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlim(0, longest * 1.1)
    _bare(ax)
    _title(ax, title, below)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def direction_panel(
    ax: Axes, title: str, below: str, series: Sequence[Series], limit: Series, slow: str, fast: str
) -> None:
    """Seconds against n on logarithmic axes, the memory limit as a line, and how far `slow` is above `fast`."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.plot(limit.n, limit.seconds, color=limit.color, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
    for one in series:
        ax.plot(one.n, one.seconds, color=one.color, linewidth=2.2, marker="o", markersize=4.5)
    by_label = {one.label: dict(zip(one.n, one.seconds, strict=True)) for one in series}
    for n in sorted(by_label[slow].keys() & by_label[fast].keys()):
        high, low = by_label[slow][n], by_label[fast][n]
        if str(n).strip("0") == "1":  # powers of ten
            ax.plot([n, n], [low, high], color="#cfcfcf", linewidth=0.9, zorder=1)
            ax.annotate(
                f"{high / low:.2g}×",
                (n, high),
                (-3, 7),
                textcoords="offset points",
                ha="left" if n == series[0].n[0] else "right",  # clear of the axis, and of a rising line
                fontsize=9.5,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},  # over the other lines
                zorder=3,
            )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda t, _: duration(t)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("n, parameters", fontsize=10, color=INK)
    _bare(ax)
    _title(ax, title, below)
    ax.autoscale_view()
    _end_labels(ax, [(one.label, one.color, one.n[-1], one.seconds[-1]) for one in (*series, limit)])


class Panel(NamedTuple):
    """A title that says what is seen, and a line below it."""

    title: str
    below: str


def _figure() -> Figure:
    figure = Figure(figsize=(13.2, 6.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_demo(
    path: Path,
    losses: Sequence[tuple[Panel, Sequence[Curve]]],
    directions: Panel,
    series: Sequence[Series],
    limit: Series,
    footer: str,
) -> None:
    """Loss against time on the left, one panel per model; time of a direction against n on the right. Write a PNG.

    The first series is the one to beat, the second ours.
    """
    figure = _figure()
    grid = figure.add_gridspec(
        len(losses), 2, left=0.05, right=0.855, top=0.89, bottom=0.12, wspace=0.2, hspace=0.62, width_ratios=(1, 1.15)
    )
    for i, (panel, curves) in enumerate(losses):
        ax = figure.add_subplot(grid[i, 0])
        loss_panel(ax, *panel, curves)
        if i == len(losses) - 1:
            ax.set_xlabel("seconds", fontsize=10, color=INK)
    ax = figure.add_subplot(grid[:, 1])
    direction_panel(ax, *directions, series, limit, series[0].label, series[1].label)
    figure.text(0.055, 0.02, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


def save_bench(
    path: Path,
    directions: Panel,
    series: Sequence[Series],
    limit: Series,
    speedups: Panel,
    ratios: Sequence[tuple[str, dict[str, float]]],
    footer: str,
) -> None:
    """Time of a direction against n on the left, speed-up over every peer and case on the right. Write a PNG."""
    figure = _figure()
    left, right = (figure.add_axes(box) for box in ((0.055, 0.12, 0.33, 0.74), (0.66, 0.12, 0.31, 0.74)))
    direction_panel(left, *directions, series, limit, series[0].label, series[1].label)
    speedup_panel(right, *speedups, ratios)
    figure.text(0.055, 0.02, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


#: Colour of each peer, here and in the tables of the documentation.
PEERS = {"eager": TORCH, "eager bmm": "#B22222", "compiled": "#CC79A7", "compact": "#E69F00"}


def speedup_panel(ax: Axes, title: str, below: str, ratios: Sequence[tuple[str, dict[str, float]]]) -> None:
    """A line per case, a dot per peer: how many times longer the peer took. Left of 1 we lose."""
    ax.set_xscale("log")
    for i, (_, found) in enumerate(ratios):
        ax.plot([1, *found.values()], [i] * (len(found) + 1), color="#dddddd", linewidth=1.2, zorder=1)
        for name, ratio in found.items():
            ax.plot(ratio, i, "o", color=PEERS[name], markersize=7)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(ratios)), [label for label, _ in ratios])
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    _bare(ax)
    _title(ax, title, below)
    seen = [name for name in PEERS if any(name in found for _, found in ratios)]
    dots = [Line2D([], [], color=PEERS[name], marker="o", linestyle="", markersize=7) for name in seen]
    ax.legend(
        dots,
        seen,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.05),
        ncols=len(seen),
        frameon=False,
        fontsize=9.5,
        handletextpad=0.1,
        columnspacing=1.2,
    )


_LINALG = "torch.linalg: inv_ex, solve_ex, eigh"
#: Colour of each backend and peer of the blocks, and its name in the legend.
BLOCKS = {
    "cpu": (SECANT, "secant, cpu"),
    "cuda": (SECANT, "secant, cuda"),
    "triton": (STEP, "secant, triton"),
    "nvrtc": (BF16, "secant, nvrtc"),
    "reference": ("#b9b9b9", "secant, reference"),
    "inv_ex": (TORCH, _LINALG),
    "solve_ex": (TORCH, _LINALG),
    "eigh": (TORCH, _LINALG),
    "cholesky": ("#E69F00", "torch: cholesky_ex, then inverse or solve"),
    "matinvBatched": ("#CC79A7", "cuBLAS matinvBatched"),
    "cupy": ("#B22222", "cupy.linalg.inv"),
    "copy": (INK, "copy of the batch"),
}
_BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64)


class BlockPanels(NamedTuple):
    """What is computed, in words; over n, by name as in `BLOCKS`: seconds a block, and share of the copy bandwidth."""

    panel: Panel
    seconds: dict[str, dict[int, float]]
    shares: dict[str, dict[int, float]]


def _small_duration(seconds: float) -> str:
    return f"{seconds * 1e9:.3g} ns" if seconds < 1e-6 else duration(seconds)


def _block_curves(ax: Axes, curves: dict[str, dict[int, float]]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    for name, points in curves.items():
        ours, copy = name in ("cpu", "cuda"), name == "copy"
        ax.plot(
            list(points), list(points.values()), color=BLOCKS[name][0], linewidth=2.4 if ours else 1.5, zorder=3 - copy,
            marker="" if copy else "o", markersize=4 if ours else 3, linestyle=(0, (5, 3)) if copy else "-",
        )  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator(_BLOCK_SIZES))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    _bare(ax)


def save_blocks(path: Path, columns: Sequence[BlockPanels], footer: str) -> None:
    """A column per kind of block: time a block against n above, share of the copy bandwidth below. Write a PNG."""
    figure = Figure(figsize=(4.1 * len(columns) + 1.2, 9.6), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(left=0.09 - 0.008 * len(columns), right=0.985, top=0.91, bottom=0.15, wspace=0.1, hspace=0.2)
    for i, (column, above, below) in enumerate(zip(columns, *grid, strict=True)):
        _block_curves(above, column.seconds)
        _block_curves(below, column.shares)
        _title(above, *column.panel)
        below.set_xlabel("n, rows of a block", fontsize=10, color=INK)
        if i == 0:
            above.set_ylabel("time a block", fontsize=10, color=INK)
            below.set_ylabel("bytes that must move, against the copy", fontsize=10, color=INK)
    grid[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda t, _: _small_duration(t)))
    grid[1, 0].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3%}".rstrip("0%").rstrip(".") + "%"))
    seen = dict.fromkeys(BLOCKS[name] for name in BLOCKS if any(name in column.seconds for column in columns))
    lines = [
        Line2D([], [], color=color, linewidth=2.4, linestyle=(0, (3, 2)) if color == INK else "-") for color, _ in seen
    ]
    figure.legend(
        lines, [label for _, label in seen], loc="lower left", bbox_to_anchor=(0.04, 0.035), frameon=False,
        ncols=len(seen), fontsize=9.5,
    )  # fmt: skip
    figure.text(0.045, 0.015, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


def save_products(
    path: Path,
    shares: Sequence[tuple[str, float]],
    share_panel: Panel,
    speedups: Panel,
    ratios: Sequence[tuple[str, dict[str, float]]],
    footer: str,
) -> None:
    """Share of the bandwidth of each case on the left, speed-up over every peer on the right. Write a PNG."""
    figure = _figure()
    left, right = (figure.add_axes(box) for box in ((0.27, 0.14, 0.29, 0.72), (0.62, 0.14, 0.34, 0.72)))
    left.barh(range(len(shares)), [share for _, share in shares], color=SECANT, height=0.55)
    for i, (_, share) in enumerate(shares):
        left.text(share, i, f"  {share:.0%}", va="center", fontsize=9, color=INK)
    left.axvline(1, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    left.set_yticks(range(len(shares)), [label for label, _ in shares])
    left.invert_yaxis()
    left.set_xlim(0, 1.15 * max([1.0, *(share for _, share in shares)]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    _bare(left)
    _title(left, *share_panel)
    speedup_panel(right, *speedups, ratios)
    right.set_yticks(range(len(ratios)), [""] * len(ratios))
    right.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
    right.xaxis.set_minor_locator(NullLocator())
    for ax in (left, right):
        ax.set_ylim(len(shares) - 0.4, -0.6)
    figure.text(0.02, 0.02, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)
