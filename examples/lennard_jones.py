"""Clusters of 13 atoms relaxed from 1,000 random places, in one call of `secant.minimize`.

Atoms attract each other from afar and repel each other when near. From random places most clusters come to rest in one
of more than a thousand minima; the best is an icosahedron. Left: the energies where they came to rest; right: the best
cluster, with its bonds.

    python examples/lennard_jones.py --clusters 1000 --out lennard_jones.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import secant
from secant.benchmarks.batched_problems import LJ13, clusters, lennard_jones
from secant.benchmarks.plot import INK, SECANT
from secant.benchmarks.report import Table
from secant.cli import console

ATOMS = 13
BOND = 1.25  # atoms nearer than this are drawn with a bond


def relaxed(count: int) -> secant.OptimizeResult:
    """Relax so many clusters."""
    return secant.minimize(
        lambda x, *, index: lennard_jones(x), clusters(count, ATOMS), batch=True,
        options={"gtol": 1e-5, "ftol": 0.0},
    )  # fmt: skip


def main(count: int, out: Path) -> tuple[secant.OptimizeResult, Tensor]:
    """Relax, draw, and return where they ended and the energies of the distinct minima, the best first."""
    begin = time.perf_counter()
    found = relaxed(count)
    seconds = time.perf_counter() - begin
    energies = found.fun[found.success].sort().values
    distinct, counts = torch.unique((1e4 * energies).round() / 1e4, return_counts=True)
    rows = [
        ("clusters", f"{count:,}"),
        ("relaxed", f"{len(energies):,}"),
        ("seconds", f"{seconds:.2f}"),
        ("energies that differ", f"{len(distinct):,}"),
        *((f"in {float(e):.4f}", f"{int(c):,}") for e, c in zip(distinct[:5], counts[:5], strict=True)),
    ]
    console.show(Table(f"{ATOMS} atoms", ("", ""), rows))

    figure = Figure(figsize=(11.0, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot(1, 2, 1)
    left.hist(energies, bins=80, color=SECANT)
    left.axvline(LJ13, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    left.annotate(
        "the best there is", (LJ13, 1.0), (5, -12), xycoords=("data", "axes fraction"), textcoords="offset points"
    )
    left.set(title="energies where clusters came to rest", xlabel="energy", ylabel="clusters")
    right = figure.add_subplot(1, 2, 2, projection="3d")
    at = found.x[found.fun.nan_to_num(nan=torch.inf).argmin()].view(ATOMS, 3)
    for i in range(ATOMS):
        for j in range(i):
            if float((at[i] - at[j]).norm()) < BOND:
                right.plot(*torch.stack([at[i], at[j]]).T, color="#9bb8cc", linewidth=1.5)
    right.scatter(*at.T, s=350, color=SECANT, edgecolor="white", depthshade=True)
    right.set(title=f"the best: {float(found.fun.nan_to_num(nan=torch.inf).min()):.6f}")
    right.set_box_aspect((1, 1, 1))
    right.set_axis_off()
    figure.savefig(out)
    print(f"Wrote {out}.")
    return found, distinct


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--clusters", type=int, default=1000, help="random starts")
    parser.add_argument("--out", type=Path, default=Path("lennard_jones.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.clusters, given.out)
