"""A decay fitted to each pixel of an image: T2 relaxation, 40,000 fits in one call of `secant.curve_fit`.

An image of signals s exp(-t / T2) + c at 12 echo times is made of a map of T2 with four tissues, and noise is added.
Left: the map; middle: what was fitted; right: how many times one standard deviation, as the covariances have it, the
fits are off, which should be a normal distribution. Some pixels have lost their data (NaN): they end as NOT_FINITE.

    python examples/fits_per_pixel.py --side 200 --out fits_per_pixel.png
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
from secant.benchmarks.plot import GREY, SECANT
from secant.benchmarks.report import Table
from secant.cli import console

ECHOES = torch.linspace(8.0, 180.0, 12, dtype=torch.float64)  # milliseconds
NOISE, SIGNAL, FLOOR = 0.01, 1.0, 0.05


def decay(t: Tensor, s: Tensor, rate: Tensor, c: Tensor) -> Tensor:
    """Return s exp(-rate t) + c."""
    return s * torch.exp(-rate * t) + c


def tissues(side: int) -> Tensor:
    """Return a map of T2 in milliseconds: a disk with a core, a ring and two spots."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side, dtype=torch.float64)] * 2, indexing="ij")
    radius = (x * x + y * y).sqrt()
    t2 = torch.full_like(x, 40.0)
    t2[radius < 0.85] = 80.0
    t2[radius < 0.45] = 110.0
    for a, b in ((-0.5, 0.35), (0.45, -0.3)):
        t2[(x - a) ** 2 + (y - b) ** 2 < 0.03] = 60.0
    return t2


def measured(t2: Tensor) -> Tensor:
    """Return the noisy signals of all pixels, (pixels, echoes); every 997th is lost."""
    draw = torch.Generator().manual_seed(0)
    clean = decay(ECHOES, torch.tensor(SIGNAL), 1.0 / t2.reshape(-1, 1), torch.tensor(FLOOR))
    y = clean + NOISE * torch.randn(clean.shape, generator=draw, dtype=torch.float64)
    y[::997] = torch.nan
    return y


def fit(y: Tensor) -> tuple[secant.CurveFit, float]:
    """Fit all of them; the seconds that it took."""
    begin = time.perf_counter()
    found = secant.curve_fit(
        decay,
        ECHOES,
        y,
        p0=[0.8, 0.02, 0.1],
        sigma=NOISE,
        absolute_sigma=True,
        bounds=([0.0, 1e-3, -1.0], [5.0, 1.0, 1.0]),
        progress=True,
    )
    return found, time.perf_counter() - begin


def main(side: int, out: Path) -> tuple[Tensor, secant.CurveFit]:
    """Make the image, fit it, draw it, and return what was to be found and what was."""
    t2 = tissues(side)
    found, seconds = fit(measured(t2))
    good = found.status <= 1
    fitted = torch.where(good, 1.0 / found.popt[:, 1], torch.nan)
    off = ((found.popt[:, 1] - 1.0 / t2.reshape(-1)) / found.pcov[:, 1, 1].sqrt())[good]
    rows = [
        ("fits", f"{len(good):,}"),
        ("converged", f"{int(good.sum()):,}"),
        ("without data (NOT_FINITE)", f"{int((found.status == secant.Status.NOT_FINITE).sum()):,}"),
        ("seconds", f"{seconds:.2f}"),
        ("fits a second", f"{len(good) / seconds:,.0f}"),
        ("deviation of the fits, of one expected", f"{float(off.std()):.3f}"),
    ]
    console.show(Table("A decay for each pixel", ("", ""), rows))

    figure = Figure(figsize=(11.0, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, values, title in ((left, t2, "T2, as it was made"), (middle, fitted.view(side, side), "T2, fitted")):
        image = axes.imshow(values, vmin=30, vmax=120, cmap="viridis")
        axes.set(title=title, xticks=[], yticks=[])
    figure.colorbar(image, ax=middle, label="milliseconds")
    bins = torch.linspace(-4, 4, 61)
    right.hist(off.clamp(-4, 4), bins=bins, density=True, color=SECANT)
    right.plot(bins, torch.exp(-bins.square() / 2) / (2 * torch.pi) ** 0.5, color=GREY)
    right.set(title="error of 1/T2, in standard deviations", yticks=[])
    figure.savefig(out)
    print(f"Wrote {out}.")
    return t2, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--side", type=int, default=200, help="of the image, in pixels")
    parser.add_argument("--out", type=Path, default=Path("fits_per_pixel.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.side, given.out)
