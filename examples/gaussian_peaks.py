"""Spots found to a tenth of a pixel: 40,000 two-dimensional Gaussian peaks fitted in one call of `secant.curve_fit`.

Single molecules light up one after the other on a thin curve; each image of 15 x 15 pixels shows one of them as a
blurred spot of some hundred photons on a background, with the noise of counting. Left: all images added, as a
microscope would have it; middle: the positions that were fitted; right: how many standard deviations, as the
covariances have it, they are off. With --compile the model, its derivatives and the normal equations are compiled,
which needs a C++ compiler.

    python examples/gaussian_peaks.py --spots 40000 --compile --out gaussian_peaks.png
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import secant
from secant.benchmarks.batched_problems import SIDE, peak
from secant.benchmarks.plot import GREY, SECANT
from secant.benchmarks.report import Table
from secant.cli import console

FIELD = 120  # pixels of a side of what the microscope sees
FINE = 6  # of the middle picture, to a pixel


def molecules(count: int, draw: torch.Generator) -> Tensor:
    """Draw places (count, 2) in pixels: on a rose of seven leaves, and a ring around it."""
    turn = 2.0 * math.pi * torch.rand(count, generator=draw, dtype=torch.float64)
    radius = torch.where(torch.rand(count, generator=draw) < 0.25, 1.0, 0.25 + 0.6 * torch.cos(3.5 * turn).square())
    return FIELD / 2 + (FIELD / 2 - 12) * radius[:, None] * torch.stack([turn.cos(), turn.sin()], 1)


def images(places: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Take an image (SIDE^2,) around each; corners (count, 2) in whole pixels, and the counts."""
    corner = places.round() - SIDE // 2
    u = torch.rand(len(places), 3, generator=draw, dtype=torch.float64)
    at = places - corner
    shape = [x[:, None] for x in (200 + 300 * u[:, 0], at[:, 0], at[:, 1], 1.5 + 0.6 * u[:, 1], 6 + 6 * u[:, 2])]
    return corner, torch.poisson(peak(pixels(), *shape), generator=draw)


def pixels() -> tuple[Tensor, Tensor]:
    """Return x and y of the pixels of an image."""
    y, x = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float64)] * 2, indexing="ij")
    return x.reshape(-1), y.reshape(-1)


def guess(counts: Tensor) -> Tensor:
    """Guess from the least and largest counts: the brightest pixel, the floor, and a width of two pixels."""
    floor, (top, where) = counts.quantile(0.2, dim=1), counts.max(1)
    return torch.stack([top - floor, where % SIDE, where // SIDE, torch.full_like(top, 2.0), floor], 1)


def main(spots: int, out: Path, compile: bool = False) -> tuple[Tensor, Tensor, secant.CurveFit]:
    """Make the images, fit them, draw, and return true and fitted places, and all that was fitted."""
    draw = torch.Generator().manual_seed(0)
    places = molecules(spots, draw)
    corner, counts = images(places, draw)
    begin = time.perf_counter()
    found = secant.curve_fit(
        peak, pixels(), counts, guess(counts), sigma=counts.clamp_min(1.0).sqrt(), absolute_sigma=True,
        compile=compile, progress=not compile,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    good = found.status <= secant.Status.SMALL_CHANGE
    fitted = corner + found.popt[:, 1:3]
    deviation = found.pcov.diagonal(dim1=-2, dim2=-1)[:, 1:3].sqrt()
    off = ((fitted - places) / deviation)[good]
    rows = [
        ("spots", f"{spots:,}"),
        ("converged", f"{int(good.sum()):,}"),
        ("seconds" + (", with those of compiling" if compile else ""), f"{seconds:.2f}"),
        ("error of a place in pixels, median", f"{float((fitted - places)[good].norm(dim=1).median()):.3f}"),
        ("deviation of the fits, of one expected", f"{float(off.std()):.3f}"),
    ]
    console.show(Table("A place for each spot", ("", ""), rows))

    seen = torch.zeros(FIELD, FIELD, dtype=torch.float64)
    x, y = pixels()
    at = (corner[:, :1] + x).long().clamp(0, FIELD - 1), (corner[:, 1:] + y).long().clamp(0, FIELD - 1)
    seen.index_put_((at[1], at[0]), counts, accumulate=True)
    edges = torch.linspace(0, FIELD, FINE * FIELD + 1, dtype=torch.float64)
    sharp = torch.histogramdd(fitted[good].flip(1), [edges, edges]).hist
    figure = Figure(figsize=(13.5, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    left.imshow(seen, cmap="magma", extent=(0, FIELD, FIELD, 0))
    middle.imshow(sharp.clamp_max(4), cmap="magma", extent=(0, FIELD, FIELD, 0))
    for axes, title in ((left, "all images added"), (middle, "places that were fitted")):
        axes.set(title=title, xticks=[], yticks=[])
    bins = torch.linspace(-4, 4, 61)
    right.hist(off.reshape(-1).clamp(-4, 4), bins=bins, density=True, color=SECANT)
    right.plot(bins, torch.exp(-bins.square() / 2) / (2 * torch.pi) ** 0.5, color=GREY)
    right.set(title="error of a place, in standard deviations", yticks=[])
    figure.savefig(out)
    print(f"Wrote {out}.")
    return places, fitted, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--spots", type=int, default=40_000, help="images, of one spot each")
    parser.add_argument("--compile", action="store_true", help="compile model and normal equations")
    parser.add_argument("--out", type=Path, default=Path("gaussian_peaks.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.spots, given.out, given.compile)
