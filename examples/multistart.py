"""All minima of a function of many: a search from thousands of starts, in one call of `secant.minimize`.

Himmelblau's function with waves on it has tens of minima. Every start goes down to one; those that are the same are
counted once. Printed are the best, with how many starts have found each; drawn are the function, the starts in the
colour of where they went, and the minima.

    python examples/multistart.py --starts 4000 --out multistart.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import secant
from secant.benchmarks.batched_problems import himmelblau_waves
from secant.benchmarks.report import Table
from secant.cli import console

EDGE = 6.0
#: Ends that are nearer than this are the same minimum.
APART = 1e-3


class Minima(NamedTuple):
    """Distinct minima (m, 2), the best first; their values and how many starts have found each, (m,).

    which: the minimum of each start that came to rest; -1: none.
    """

    x: Tensor
    value: Tensor
    count: Tensor
    which: Tensor


def distinct(x: Tensor, value: Tensor, good: Tensor) -> Minima:
    """Put together the ends that are the same."""
    _, cell = torch.unique((x / APART).round(), dim=0, return_inverse=True)
    first = torch.full((int(cell.max()) + 1,), -1)
    first[cell] = torch.arange(len(x))  # any of a cell
    # A minimum on the border of two cells is in both: the first of those that are near.
    near = (x[first][:, None] - x[first][None]).norm(dim=-1) < APART
    cell = near.int().argmax(1)[cell]
    kept, which = torch.unique(torch.where(good, cell, -1), return_inverse=True)
    begin = int(kept[0] == -1)
    ends, which = first[kept[begin:]], which - begin
    order = value[ends].argsort()
    place = torch.cat([order.argsort(), torch.tensor([-1])])
    count = torch.bincount(which[which >= 0], minlength=len(ends))
    return Minima(x[ends][order], value[ends][order], count[order], place[which])


def main(starts: int, out: Path) -> Minima:
    """Search, print, draw, and return what was found."""
    draw = torch.Generator().manual_seed(0)
    x0 = EDGE * (2.0 * torch.rand(starts, 2, generator=draw, dtype=torch.float64) - 1.0)
    begin = time.perf_counter()
    options = {"gtol": 1e-8, "ftol": 0.0}
    found = secant.minimize(lambda x, *, index: himmelblau_waves(x), x0, batch=True, options=options)
    seconds = time.perf_counter() - begin
    minima = distinct(found.x, found.fun, found.jac.abs().amax(-1) < 1e-5)
    rows = [
        (f"({float(x[0]):.4f}, {float(x[1]):.4f})", f"{float(value):.6f}", f"{int(count):,}")
        for x, value, count in zip(minima.x[:8], minima.value[:8], minima.count[:8], strict=True)
    ]
    note = f"{len(minima.value)} minima from {starts:,} starts in {seconds:.2f} s."
    console.show(Table("The best minima", ("where", "value", "starts"), rows, (note,)))

    figure = Figure(figsize=(8.0, 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    line = torch.linspace(-EDGE, EDGE, 300, dtype=torch.float64)
    b, a = torch.meshgrid(line, line, indexing="ij")
    height = himmelblau_waves(torch.stack([a.reshape(-1), b.reshape(-1)], 1)).view(300, 300)
    axes.contour(line, line, (height + 1.0).log(), levels=18, colors="#c9c9c9", linewidths=0.7)
    kept = minima.which >= 0
    axes.scatter(*x0[kept].T, c=minima.which[kept] % 20, cmap="tab20", s=5)
    axes.scatter(*minima.x.T, s=34, facecolor="white", edgecolor="#222222", zorder=3)
    axes.scatter(*minima.x[0], s=170, marker="*", facecolor="#D55E00", edgecolor="#222222", zorder=4)
    axes.set_title(f"{len(minima.value)} minima; each start in the colour of its own")
    axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
    figure.savefig(out)
    print(f"Wrote {out}.")
    return minima


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--starts", type=int, default=4000, help="points to start from")
    parser.add_argument("--out", type=Path, default=Path("multistart.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.starts, given.out)
