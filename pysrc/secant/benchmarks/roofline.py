"""Every measured kernel as a point of operations a byte and operations a second, under the roofs of its machine.

References:
    Williams, Waterman and Patterson, Roofline: an insightful visual performance model, CACM 52 (2009), 65-76.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from secant import backends

#: Okabe and Ito's colours, shades of them and a grey, an op each.
COLORS = {
    "two_loop": "#0072B2",
    "direction": "#56B4E9",
    "step": "#000000",
    "dense_update": "#6a51a3",
    "block_inv": "#D55E00",
    "block_solve": "#E69F00",
    "block_eigh": "#8a5a00",
    "glm_hvp": "#009E73",
    "glm_value_grad": "#7fd1b3",
    "softmax_hvp": "#CC79A7",
    "cross_entropy_hvp": "#8a8a8a",
    "gram": "#004d3a",
    "precond_step": "#F0E442",
    "newton_schulz": "#a6761d",
    "newton_inv_root": "#b07aa1",
}
MARKERS = {"cpu": "o", "cuda": "o", "triton": "^", "nvrtc": "s"}
#: Backends whose rows are of kernels.
KERNELS = tuple(name for name in backends.ORDER if name != "reference")
#: Roofs by their key in `machine.rates`.
ROOFS = {"matmul_float32": "matrix product, float32", "matmul_float64": "matrix product, float64"}


class Dot(NamedTuple):
    """A measured kernel: op, backend, whether it computes in float64, operations a byte, operations a second."""

    op: str
    by: str
    double: bool
    intensity: float
    rate: float


def rows_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Join the rows of all families in what `python -m secant bench --json` wrote."""
    return [row for family in data["families"].values() for row in family["rows"]]


def dots(rows: Iterable[Mapping[str, Any]]) -> list[Dot]:
    """Place the kernels' rows, of backends but for the reference; what gave a wrong answer has no time and no dot."""
    return [
        Dot(row["op"], row["by"], row["dtype"] == "float64", row["flops"] / row["bytes"], row["flops"] / row["median"])
        for row in rows
        if row["kind"] == "backend" and row["by"] in KERNELS and row["median"]
    ]


def save(path: Path, found: Sequence[Dot], rates: Mapping[str, float], title: str, footer: str) -> None:
    """Draw the dots under the roofs that were measured; the file's ending says the format. Needs matplotlib.

    Args:
        path: where. found: at least one dot. title, footer: above and below.
        rates: "bandwidth" and the keys of `ROOFS`, as `machine.rates` gives them; a roof that is missing is not drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(11.5, 6.8), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.105, 0.12, 0.655, 0.76))
    ax.set_xscale("log")
    ax.set_yscale("log")
    slope = rates["bandwidth"]
    tops = {key: rates[key] for key in ROOFS if key in rates}
    knees = [top / slope for top in tops.values()]
    left = min(point.intensity for point in found) / 2
    right = 20.0 * max([*(point.intensity for point in found), *knees])  # room for the words of the roofs
    highest = max(tops.values()) if tops else slope * right
    low = min(point.rate for point in found) / 2.5
    ax.set_xlim(left, right)
    ax.set_ylim(low, 2.5 * max(highest, *(point.rate for point in found)))
    end = max(knees) if knees else right
    ax.plot([left, end], [slope * left, slope * end], color="#444444", linewidth=1.4, zorder=1)
    for number, (key, top) in enumerate(sorted(tops.items(), key=lambda item: -item[1])):
        ax.plot(
            [top / slope, right], [top, top], color="#444444", linewidth=1.4, linestyle="-" if number == 0 else "--"
        )
        above = number == 0  # the highest is labelled above its line, those under it below
        ax.annotate(
            f"{ROOFS[key]}: {_rate(top)}", (right, top), (-4, 4 if above else -4), textcoords="offset points",
            ha="right", va="bottom" if above else "top", fontsize=9, color="#333333",
        )  # fmt: skip
    # Where the slanted roof stands clear of the points: at its lower end, turned as the line is.
    at = left * 1.15
    (x0, y0), (x1, y1) = ax.transData.transform([(at, slope * at), (10 * at, slope * 10 * at)])
    turned = math.degrees(math.atan2(y1 - y0, x1 - x0))
    ax.annotate(
        f"memory: {slope / 1e9:,.0f} GB/s", (at, slope * at), (2, 7), textcoords="offset points", fontsize=9,
        color="#333333", rotation=turned, rotation_mode="anchor", ha="left", va="bottom",
    )  # fmt: skip
    for point in found:
        color = COLORS.get(point.op, "#222222")
        ax.plot(
            point.intensity, point.rate, MARKERS.get(point.by, "D"), color=color, markersize=6.5, alpha=0.9,
            markerfacecolor="white" if point.double else color, markeredgewidth=1.3, linestyle="",
        )  # fmt: skip
    ax.set_xlabel("operations for each byte that must move", fontsize=10)
    ax.set_ylabel("operations per second", fontsize=10)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _rate(y)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ops = [op for op in COLORS if any(point.op == op for point in found)]
    handles = [Line2D([], [], color=COLORS[op], marker="o", linestyle="", markersize=7, label=op) for op in ops]
    for by in dict.fromkeys(point.by for point in found):
        handles.append(Line2D([], [], color="#444444", marker=MARKERS.get(by, "D"), linestyle="", label=f"by {by}"))
    if any(point.double for point in found):
        hollow = Line2D([], [], color="#444444", marker="o", linestyle="", label="hollow: float64")
        hollow.set_markerfacecolor("white")
        hollow.set_markeredgewidth(1.3)
        handles.append(hollow)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.765, 0.89), frameon=False, fontsize=9.5)
    figure.text(0.105, 0.94, title, fontsize=13, fontweight="bold", color="#222222")
    below = "A point above the memory's line was served by a cache. Operations: of the definition, not of the kernel."
    figure.text(0.105, 0.9, below, fontsize=9.5, color="#5a5a5a")
    figure.text(0.105, 0.025, footer, fontsize=8.5, color="#7a7a7a")
    figure.savefig(path)


def _rate(per_second: float) -> str:
    for unit, scale in (("Tflop/s", 1e12), ("Gflop/s", 1e9), ("Mflop/s", 1e6)):
        if per_second >= scale or unit == "Mflop/s":
            return f"{per_second / scale:.3g} {unit}"
    raise AssertionError("unreachable")
