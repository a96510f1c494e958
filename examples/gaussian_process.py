"""Hyper-parameters of Gaussian processes for 200 small data sets, each with its own, in one call of `secant.minimize`.

Each data set has 40 noisy values of a function with a length, a size and a noise of its own. What makes its data most
likely is found for each by L-BFGS. Above: six of the data sets with what is predicted between the data and twice its
deviation; below: lengths, sizes and noises that were found against those that the data were made with.

    python examples/gaussian_process.py --sets 200 --out gaussian_process.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

import secant
from secant.benchmarks.batched_problems import gp_negative_log_likelihood
from secant.benchmarks.plot import GREY, SECANT, TORCH
from secant.benchmarks.report import Table
from secant.cli import console

POINTS = 40
NAMES = ("length", "size", "noise")


def data(sets: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw hyper-parameters (sets, 3), their logarithms, and x, y (sets, POINTS) of them."""
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(sets, 3, generator=draw, dtype=torch.float64)
    low, high = (torch.tensor(x, dtype=torch.float64).log() for x in ((0.08, 0.5, 0.05), (0.4, 2.0, 0.3)))
    theta = low + (high - low) * u
    x = torch.rand(sets, POINTS, generator=draw, dtype=torch.float64).sort(1).values
    factor = torch.linalg.cholesky(kernel(theta, x, x) + 1e-9 * torch.eye(POINTS, dtype=torch.float64))
    f = (factor @ torch.randn(sets, POINTS, 1, generator=draw, dtype=torch.float64))[..., 0]
    return theta, x, f + theta[:, 2:].exp() * torch.randn(sets, POINTS, generator=draw, dtype=torch.float64)


def kernel(theta: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Compute size^2 exp(-(x - z)^2 / (2 length^2)) between the points of each set."""
    length, size, _ = (part[:, None, None] for part in theta.exp().unbind(1))
    return size.square() * torch.exp(-0.5 * ((x[:, :, None] - z[:, None, :]) / length).square())


def predicted(theta: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation at z, (sets, m)."""
    own = kernel(theta, x, x) + (theta[:, 2].exp().square() + 1e-8)[:, None, None] * torch.eye(x.shape[1]).to(x)
    solved = torch.linalg.solve(own, torch.cat([y[..., None], kernel(theta, x, z)], -1))
    across = kernel(theta, z, x)
    mean = (across @ solved[..., :1])[..., 0]
    left = theta[:, 1:2].exp().square() - (across * solved[..., 1:].mT).sum(-1)
    return mean, left.clamp_min(0.0).sqrt()


def main(sets: int, out: Path) -> tuple[Tensor, secant.OptimizeResult, Tensor]:
    """Fit and draw; return what the data were made with, what was found, and the value at the former."""
    theta, x, y = data(sets)
    start = torch.tensor([0.2, 1.0, 0.1], dtype=torch.float64).log().expand(sets, 3)

    def fun(at: Tensor, *, index: Tensor) -> Tensor:
        return gp_negative_log_likelihood(at, x[index], y[index])

    begin = time.perf_counter()
    found = secant.minimize(fun, start, batch=True, options={"gtol": 1e-5, "ftol": 0.0, "maxiter": 200})
    seconds = time.perf_counter() - begin
    good = found.jac.abs().amax(-1) < 1e-3
    made = gp_negative_log_likelihood(theta, x, y)
    rows = [
        ("data sets", f"{sets:,}"),
        ("converged", f"{int(good.sum()):,}"),
        ("seconds", f"{seconds:.2f}"),
        ("more likely than what the data were made with", f"{int((found.fun <= made)[good].sum()):,}"),
    ]
    console.show(Table("Hyper-parameters", ("", ""), rows))

    figure = Figure(figsize=(12.0, 8.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 3)
    z = torch.linspace(0, 1, 200, dtype=torch.float64).expand(6, 200)
    shown = slice(0, min(6, sets))
    mean, deviation = predicted(found.x[shown], x[shown], y[shown], z[shown])
    for i, axes in zip(range(len(mean)), grid[:2].flat, strict=False):
        axes.fill_between(z[0], mean[i] - 2 * deviation[i], mean[i] + 2 * deviation[i], color="#cfe3f1", linewidth=0)
        axes.plot(z[0], mean[i], color=SECANT)
        axes.plot(x[i], y[i], ".", color=TORCH, markersize=4)
        axes.set(xticks=[], title="length {:.2f}, size {:.2f}, noise {:.2f}".format(*found.x[i].exp().tolist()))
    for k, (axes, name) in enumerate(zip(grid[2], NAMES, strict=True)):
        axes.plot(theta[good, k].exp(), found.x[good, k].exp(), ".", color=SECANT, markersize=5)
        ends = [float(theta[:, k].min().exp()), float(theta[:, k].max().exp())]
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=f"{name}, as made", ylabel="found")
        axes.set_ylim(ends[0] / 4, ends[1] * 4)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_formatter(NullFormatter())
    figure.savefig(out)
    print(f"Wrote {out}.")
    return theta, found, made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--sets", type=int, default=200, help="data sets")
    parser.add_argument("--out", type=Path, default=Path("gaussian_process.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.sets, given.out)
