"""Pictures of the demo and of the benchmarks. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from secant.benchmarks.case import Row, fastest, find, ratio, ratios
from secant.benchmarks.report import duration, of_limit, short
from secant.benchmarks.timing import REPLAY

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


def _spread(positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move positions apart until neighbours are `gap` away, as little as that takes; into [low, high] if they fit."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    groups: list[list[int]] = []
    centers: list[float] = []

    def center(group: Sequence[int]) -> float:
        reach = gap * (len(group) - 1) / 2
        return max(min(sum(positions[j] for j in group) / len(group), high - reach), low + reach)

    for i in order:
        groups.append([i])
        centers.append(center([i]))
        # A group is centred on the mean of its members; one that touches the group below joins it.
        while len(groups) > 1 and centers[-1] - centers[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            groups[-2:] = [groups[-2] + groups[-1]]
            centers[-2:] = [center(groups[-1])]
    moved = list(positions)
    for group, middle in zip(groups, centers, strict=True):
        for rank, i in enumerate(group):
            moved[i] = middle + gap * (rank - (len(group) - 1) / 2)
    return moved


#: Labels that find room beside the points that they name; more of them stand in a column.
BESIDE = 8


def _end_labels(ax: Axes, series: Sequence[tuple[str, str, float, float]], points: float = 13.5) -> None:
    """Label each (text, color, x, y) to the right of its point, without overlaps; of many in a column, with leaders."""
    scale, many = 72.0 / ax.figure.dpi, len(series) > BESIDE
    pixels = [ax.transData.transform((x, y)) for _, _, x, y in series]
    (_, bottom), (right, top) = ax.transAxes.transform([(0, 0), (1, 1)])
    limits = (bottom * scale, top * scale) if many else ()
    heights = _spread([y * scale for _, y in pixels], points, *limits)
    for (text, color, x, y), (x0, y0), height in zip(series, pixels, heights, strict=True):
        beside = (right - x0) * scale + 16 if many else 8
        ax.annotate(
            text, (x, y), (beside, height - y0 * scale), textcoords="offset points", va="center", color=color,
            fontsize=9.5, fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.3, "relpos": (0, 0.5)} if many else None,
        )  # fmt: skip


def loss_panel(ax: Axes, title: str, below: str, curves: Sequence[Curve]) -> None:
    """Draw loss against seconds, one curve per optimizer, labelled where it ends."""
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
    """Draw seconds against n on logarithmic axes, the memory limit, and how far `slow` is above `fast`."""
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


def _figure(width: float = 13.2) -> Figure:
    figure = Figure(figsize=(width, 6.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_demo(
    path: Path,
    raced: tuple[Panel, Sequence[Curve]],
    losses: Sequence[tuple[Panel, Sequence[Curve]]],
    directions: Panel,
    series: Sequence[Series],
    limit: Series,
    footer: str,
) -> None:
    """Draw an equation's error against time, loss against time, a panel per model, and directions. Write a PNG.

    The first series is the one to beat, the second ours.
    """
    figure = _figure(19.6)
    grid = figure.add_gridspec(
        len(losses), 3, left=0.035, right=0.9, top=0.89, bottom=0.12, wspace=0.46, hspace=0.62, width_ratios=(1, 0.9, 1)
    )
    ax = figure.add_subplot(grid[:, 0])
    race_panel(ax, *raced[0], raced[1])
    ax.set_xlabel("seconds", fontsize=10, color=INK)
    for i, (panel, curves) in enumerate(losses):
        ax = figure.add_subplot(grid[i, 1])
        loss_panel(ax, *panel, curves)
        if i == len(losses) - 1:
            ax.set_xlabel("seconds", fontsize=10, color=INK)
    ax = figure.add_subplot(grid[:, 2])
    direction_panel(ax, *directions, series, limit, series[0].label, series[1].label)
    figure.text(0.035, 0.02, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


_LINALG = "torch.linalg: inv_ex, solve_ex, eigh"
#: Colour of each backend, peer and limit, and its name in a legend where that is another.
COLORS = {
    "cpu": (SECANT, "secant, cpu"),
    "cuda": (SECANT, "secant, cuda"),
    "triton": (STEP, "secant, triton"),
    "nvrtc": (BF16, "secant, nvrtc"),
    "reference": ("#b9b9b9", "secant, reference"),
    "secant": (SECANT, "secant"),
    "torch": (TORCH, "torch.optim"),
    "eager": (TORCH, "eager"),
    "eager bmm": ("#B22222", "eager bmm"),
    "compiled": ("#CC79A7", "compiled"),
    "compact": ("#E69F00", "compact"),
    "inv_ex": (TORCH, _LINALG),
    "solve_ex": (TORCH, _LINALG),
    "eigh": (TORCH, _LINALG),
    "block_inv_root": (BF16, "secant, by eigenvalues"),
    "cholesky": ("#E69F00", "torch: cholesky_ex, then inverse or solve"),
    "matinvBatched": ("#CC79A7", "cuBLAS matinvBatched"),
    "cupy": ("#B22222", "cupy.linalg.inv"),
    "double backward": ("#B22222", "double backward"),
    "jvp(grad)": ("#E69F00", "jvp(grad)"),
    "matvecs": (STEP, "one product after the other"),
    "backward passes": (TORCH, "a backward pass a row"),
    "LevenbergMarquardt": (SECANT, "Levenberg-Marquardt"),
    "NaturalGradient": ("#E69F00", "secant NaturalGradient"),
    "BFGS": (STEP, "secant BFGS"),
    "LBFGS": (BF16, "secant LBFGS"),
    "NewtonCG": (SECANT, "secant NewtonCG"),
    "NewtonCG, whole batch": (STEP, "NewtonCG, whole batch"),
    "torch LBFGS": (TORCH, "torch LBFGS"),
    "Adam": ("#B22222", "Adam"),
    "AdamW": ("#B22222", "AdamW"),
    "torch Muon": ("#E69F00", "torch Muon"),
    "Shampoo, default rate": (SECANT, "secant Shampoo, default rate"),
    "Shampoo": (STEP, "secant Shampoo, tuned"),
    "SOAP": (BF16, "secant SOAP"),
    "torchzero LM": ("#8c6d31", "torchzero LM"),
    "torchzero TrustCG": ("#bd9e39", "torchzero TrustCG"),
    "scipy L-BFGS-B": ("#CC79A7", "scipy L-BFGS-B"),
    "pytorch-minimize": ("#E69F00", "pytorch-minimize"),
    "scipy": ("#CC79A7", "scipy"),
    "torch ops": (TORCH, "operations of torch"),
    "botorch": ("#B22222", "botorch"),
    "jaxopt": ("#E69F00", "jaxopt"),
}
#: Inches: of a column, of a line of the other cases, of their part; left of the columns, below and above everything.
COLUMN, LINE, OTHERS, LEFT, BELOW, ABOVE = 4.1, 0.3, 4.6, 1.1, 1.4, 0.9


def _color(row: Row) -> str:
    return INK if row.kind == "limit" else COLORS.get(row.name, (GREY, row.name))[0]


def _curves(ax: Axes, rows: Sequence[Row], of: Callable[[Row], float | None]) -> None:
    """Draw what `of` gives of the rows over the size of their case, a curve a name."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        points = sorted((row.case.series[1], y) for row in own if (y := of(row)) is not None)
        limit, ours = own[0].kind == "limit", own[0].kind == "backend" and name != "reference"
        ax.plot(
            [x for x, _ in points], [y for _, y in points], color=_color(own[0]), linewidth=2.4 if ours else 1.5,
            zorder=3 - limit, marker="" if limit else "o", markersize=4 if ours else 3,
            linestyle=(0, (5, 3)) if limit else "-",
        )  # fmt: skip
    sizes = sorted({row.case.series[1] for row in rows})
    powers = [n for n in sizes if sizes[-1] > 1000 or n & (n - 1) == 0] or sizes  # ticks of small sizes: powers of two
    ax.xaxis.set_major_locator(FixedLocator(powers))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}" if n < 1e4 else f"{n:.0e}".replace("e+0", "e")))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    _bare(ax)


def _peers_panel(ax: Axes, lines: Sequence[tuple[str, dict[str, float]]]) -> None:
    """Draw a line per case, a dot per peer: how many times longer the peer took. Left of 1 we lose."""
    ax.set_xscale("log")
    for i, (_, found) in enumerate(lines):
        ax.plot([1, *found.values()], [i] * (len(found) + 1), color="#dddddd", linewidth=1.2, zorder=1)
        for name, x in found.items():
            ax.plot(x, i, "o", color=COLORS.get(name, (GREY,))[0], markersize=7)
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(range(len(lines)), [label for label, _ in lines])
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-5, 12)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    ax.xaxis.set_minor_locator(NullLocator())
    _bare(ax)
    every = [x for _, values in lines for x in values.values()]
    title = f"Faster than the peer in {sum(x >= 1 for x in every)} of {len(every)}"
    _title(ax, title, "how many times longer each peer takes; left of 1 we lose")


def race_panel(ax: Axes, title: str, below: str, curves: Sequence[Curve], targets: Sequence[float] = ()) -> None:
    """Draw the smallest error so far against seconds on logarithmic axes, a line an optimizer, labelled at its end."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for curve in curves:
        ax.step(curve.seconds, curve.losses, where="post", color=curve.color, linewidth=2.0)
        ax.plot(curve.seconds[-1], curve.losses[-1], "o", color=curve.color, markersize=5)
    for target in targets:
        ax.axhline(target, color="#d5d5d5", linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.5)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: duration(x)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    _bare(ax)
    _title(ax, title, below)
    ax.margins(y=0.15)  # labels of runs that end at the same error need room below it
    ax.autoscale_view()
    low, high = ax.get_ylim()  # within a decade or so the ticks between have numbers, too
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}") if high < 20 * low else NullFormatter())
    ax.tick_params(axis="y", which="minor", labelsize=8)
    _end_labels(ax, [(curve.label, curve.color, curve.seconds[-1], curve.losses[-1]) for curve in curves], 12.0)


def save_races(path: Path, rows: Sequence[Row], footer: str) -> None:
    """Draw error against seconds, a panel a problem, a line an optimizer: the start of median time. Write a PNG."""
    problems = list(dict.fromkeys(row.case.op for row in rows if row.curve))
    columns = min(3, len(problems))
    lines = -(-len(problems) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * lines + 0.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = 1 - 0.75 / (4.4 * lines), 0.9 / (4.4 * lines + 0.5)
    grid = figure.add_gridspec(
        lines, columns, left=0.13 / columns, right=1 - 0.36 / columns, top=top, bottom=bottom, wspace=0.62, hspace=0.5
    )
    for i, problem in enumerate(problems):
        own = [row for row in rows if row.case.op == problem and row.curve]
        longest = {row.name: row for row in sorted(own, key=lambda row: row.curve[-1][0])}
        curves = [
            plotted for name in dict.fromkeys(row.name for row in own) for plotted in [raced(name, longest[name].curve)]
        ]
        targets = sorted({row.case.target for row in own})
        ax = figure.add_subplot(grid[i // columns, i % columns])
        race_panel(ax, problem, "error against seconds of the optimizer; lines: errors to reach", curves, targets)
    figure.text(0.05, 0.25 / (4.4 * lines + 0.5), footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


#: Colours of names that `COLORS` has not.
_SPARE = ("#CC79A7", "#7fd1b3", "#004c6d", "#b9b9b9", "#6a51a3", "#8a5a00", "#004d3a", "#b35900", "#7a7a00", GREY)


def _colored(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give each name a colour and a label: those of `COLORS`, else one that is spare."""
    others = [name for name in names if name not in COLORS]
    spare = {name: (_SPARE[i % len(_SPARE)], name) for i, name in enumerate(others)}
    return {name: COLORS.get(name) or spare[name] for name in names}


def _training_panel(
    ax: Axes, title: str, below: str, lines: Sequence[tuple[str, str, bool, Sequence[tuple[float, float]]]]
) -> None:
    """Draw (label, colour, whether ours, points) each."""
    drawn = [line for line in lines if line[3]]
    for _, color, ours, points in drawn:
        width, marker = (2.4 if ours else 1.5), ("." if len(points) < 10 else "")
        ax.plot([x for x, _ in points], [y for _, y in points], color=color, linewidth=width, marker=marker)
        ax.plot(*points[-1], "o", color=color, markersize=5 if ours else 4)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    low, high = ax.get_ylim()
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}") if high < 20 * low else NullFormatter())
    ax.tick_params(axis="y", which="minor", labelsize=8)
    _bare(ax)
    _title(ax, title, below)
    _end_labels(ax, [(label, color, *points[-1]) for label, color, _, points in drawn], 11.0)


def save_training(path: Path, rows: Sequence[Row], footer: str) -> None:
    """Draw a line of panels a task: error against seconds, against steps, and by the learning rate. Write a PNG."""
    whole = [row for row in rows if "rates" in row.figures]
    tasks = list(dict.fromkeys(row.case.op for row in whole))
    colors = _colored(list(dict.fromkeys(row.name for row in whole)))
    tall = 6.0
    figure = Figure(figsize=(22.0, tall * len(tasks) + 0.5), dpi=90, facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = 1 - 0.8 / (tall * len(tasks)), 0.9 / (tall * len(tasks))
    grid = figure.add_gridspec(len(tasks), 3, left=0.04, right=0.885, top=top, bottom=bottom, wspace=0.58, hspace=0.33)
    for i, op in enumerate(tasks):
        own = [row for row in whole if row.case.op == op]
        title, _, _ = own[0].case.title.partition(", to ")
        panels: tuple[tuple[str, str, Callable[[Row], Sequence[tuple[float, float]]]], ...] = (
            (title, "error against seconds, the tuned run of the middle start", lambda row: row.curve),
            ("by steps", "the same run", lambda row: row.figures["by_step"]),
            (
                "by learning rate",
                "error at the end of a run",
                lambda row: [(x, y) for x, y in row.figures["rates"] if math.isfinite(y)],
            ),
        )
        for k, (above, below, points) in enumerate(panels):
            ax = figure.add_subplot(grid[i, k])
            if k == 2:
                ax.set_xscale("log")
            lines = [(colors[x.name][1], colors[x.name][0], x.kind == "backend", points(x)) for x in own]
            _training_panel(ax, above, below, lines if k < 2 else [line for line in lines if len(line[3]) > 1])
            ax.set_xlabel(("seconds", "steps", "learning rate")[k], fontsize=10, color=INK)
    figure.text(0.04, 0.2 / (tall * len(tasks)), footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


def raced(name: str, curve: Sequence[tuple[float, float]]) -> Curve:
    """Make the line of an optimizer, in its colour."""
    color, label = COLORS.get(name, (GREY, name))
    return Curve(label, color, [max(x, 1e-4) for x, _ in curve], [error for _, error in curve])


def save_family(path: Path, rows: Sequence[Row], bandwidth: float | None, footer: str) -> None:
    """Draw what a family measured; write a PNG.

    A column for each series of cases that differ in size: time of a unit above, share of the limit (of the bandwidth,
    where there is none) below. The other cases have a line each, with a dot for each peer.

    Args:
        path: where. rows: at least one. bandwidth: of the run, bytes per second. footer: below everything.
    """
    if any("rates" in row.figures for row in rows):
        save_training(path, rows, footer)
        return
    if any(row.curve for row in rows):
        save_races(path, rows, footer)
        return
    calls = [row for row in rows if row.note != REPLAY]
    sizes: dict[str, set[int]] = {}
    for row in calls:
        if row.case.series is not None:
            sizes.setdefault(row.case.series[0], set()).add(row.case.series[1])
    columns = [name for name, found in sizes.items() if len(found) > 1]
    alone = dict.fromkeys(x.case for x in calls if x.case.series is None or x.case.series[0] not in columns)
    lines = [(case.label, ratios(calls, ours)) for case in alone if (ours := find(calls, case)) is not None]
    lines = [(label, found) for label, found in lines if found]
    names = max((len(label) for label, _ in lines), default=0) * 0.076  # inches of the labels
    edge = LEFT + COLUMN * len(columns)
    width = max(8.0, edge * bool(columns) + (names + 0.4 + OTHERS) * bool(lines) + 0.3)
    height = max(9.6 if columns else 7.0, BELOW + ABOVE + LINE * len(lines))
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    tall = (height - BELOW - ABOVE) / (2.0 + 0.25)

    def share(row: Row) -> float | None:
        found = of_limit(calls, row)
        if found is not None or row.bytes_per_second is None or bandwidth is None:
            return found
        return row.bytes_per_second / bandwidth

    first: list[Axes | None] = [None, None]
    for i, name in enumerate(columns):
        own = [row for row in calls if row.case.series is not None and row.case.series[0] == name]
        for k, of in enumerate((lambda row: row.seconds, share)):
            bottom = BELOW + (1 - k) * 1.25 * tall
            box = ((LEFT + COLUMN * i) / width, bottom / height, (COLUMN - 0.5) / width, tall / height)
            ax = figure.add_axes(box, sharey=first[k])
            first[k] = first[k] or ax
            _curves(ax, [row for row in own if k == 0 or row.name != "reference"], of)
            if i:
                ax.tick_params(labelleft=False)
            if k == 0:
                slower = [ratio(fastest(own, row.case), row) for row in own if row is find(own, row.case)]
                known = [x for x in slower if x is not None]
                said = f"the fastest peer takes {min(known):.2g} to {max(known):.2g} times as long" if known else ""
                _title(ax, name, said)
            else:
                ax.set_xlabel("n", fontsize=10, color=INK)
    unit = next((row.case.UNIT for row in calls if row.case.series is not None), "call")
    for panel, text in zip(first, (f"time of a {unit}", "bytes that must move, against the limit"), strict=True):
        if panel is not None:
            panel.set_ylabel(text, fontsize=10, color=INK)
    if first[0] is not None and first[1] is not None:
        first[0].yaxis.set_major_formatter(FuncFormatter(lambda t, _: short(t)))
        first[1].yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3%}".rstrip("0%").rstrip(".") + "%"))
    if lines:
        left = edge * bool(columns) + names + 0.2
        high = min(height - BELOW - ABOVE, 0.5 * len(lines) + 0.5)
        box = (left / width, (height - ABOVE - high) / height, (width - left - 0.3) / width, high / height)
        _peers_panel(figure.add_axes(box), lines)
    shown = [row for row in calls if row.case.series is not None and row.case.series[0] in columns]
    limits = dict.fromkeys((INK, row.name) for row in shown if row.kind == "limit")
    used = {row.name for row in shown} | {name for _, found in lines for name in found}
    entries = dict.fromkeys([*(x for name, x in COLORS.items() if name in used), *limits])
    handles = [Line2D([], [], color=x, linewidth=2.4, linestyle=(0, (3, 2)) if x == INK else "-") for x, _ in entries]
    figure.legend(
        handles, [label for _, label in entries], loc="lower left", bbox_to_anchor=(0.3 / width, 0.28 / height),
        frameon=False, ncols=max(1, int(width / 3.2)), fontsize=9.5,
    )  # fmt: skip
    figure.text(0.35 / width, 0.14 / height, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)
