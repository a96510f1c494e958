"""Curves fitted to data by Levenberg and Marquardt's method: one with outliers and bounds, one by a network in batches.

Left: a decay y = a exp(-b t) + c to 60 points of which 9 are wrong, by squares and by a loss that outliers cannot pull
("cauchy"), all parameters within bounds. Right: a network 1-20-1 to 20,000 points of sin(10 pi x) / (10 pi x), in
batches of 1,000: each call of `step` is about one batch.

    python examples/fit_curve.py --epochs 10 --out fit_curve.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import secant
from secant.benchmarks.plot import GREY, INK, SECANT, TORCH
from secant.benchmarks.report import Table
from secant.benchmarks.residual_problems import Sinc
from secant.cli import console

TRUE = (2.5, 1.3, 0.5)
NOISE = 0.05


def measured() -> tuple[Tensor, Tensor]:
    """Return times and values of a decay, with noise and outliers."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 3, 60, dtype=torch.float64)
    a, b, c = TRUE
    y = a * torch.exp(-b * t) + c + NOISE * torch.randn(60, generator=generator, dtype=torch.float64)
    y[4::7] += 1.5
    return t, y


def decay(x: Tensor, t: Tensor) -> Tensor:
    """Return a exp(-b t) + c."""
    return x[0] * torch.exp(-x[1] * t) + x[2]


def fit_decay(loss: str) -> Tensor:
    """Return a, b, c, each in [0, 5]."""
    t, y = measured()
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = secant.optim.LevenbergMarquardt(
        [x], max_iter=100, loss=loss, f_scale=2 * NOISE, bounds=(0.0, 5.0), tolerance_grad=1e-10
    )
    optimizer.step(lambda: decay(x, t) - y)
    return x.detach()


def fit_network(problem: Sinc, epochs: int) -> tuple[torch.nn.Module, list[float]]:
    """Return the network, and its mean squared error after each epoch."""
    model, errors = problem.model(0), []
    optimizer = secant.optim.LevenbergMarquardt(model.parameters(), max_iter=1)
    generator = torch.Generator().manual_seed(0)
    with console.progress("network, batches of 1,000") as advance:
        for epoch in range(epochs):
            for rows in torch.randperm(len(problem.x), generator=generator).split(1_000):
                optimizer.step(lambda rows=rows: problem.residuals(model, rows))
            errors.append(problem.mse(model))
            advance((epoch + 1) / epochs, f"epoch {epoch + 1}: mean squared error {errors[-1]:.1e}")
    return model, errors


def draw_decay(axes: Axes, fits: dict[str, Tensor]) -> None:
    """Draw the points and both fits."""
    t, y = measured()
    axes.plot(t, y, "o", color=GREY, markersize=4, label="data")
    axes.plot(t, decay(torch.tensor(TRUE), t), color=INK, linestyle=":", label="truth")
    for (loss, x), color in zip(fits.items(), (TORCH, SECANT), strict=True):
        axes.plot(t, decay(x, t), color=color, label=f'loss="{loss}"')
    axes.set(title="A decay with outliers", xlabel="t")
    axes.legend(frameon=False)


def main(arguments: list[str] | None = None) -> int:
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="of the network's training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("fit_curve.png"), help="picture (default: %(default)s)")
    given = parser.parse_args(arguments)
    fits = {loss: fit_decay(loss) for loss in ("linear", "cauchy")}
    rows = [(loss, *(f"{v:.3f}" for v in x.tolist())) for loss, x in fits.items()]
    console.show(Table("a exp(-b t) + c", ("loss", "a", "b", "c"), [("truth", *map("{:.3f}".format, TRUE)), *rows]))
    problem = Sinc()
    model, errors = fit_network(problem, given.epochs)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    draw_decay(left, fits)
    with torch.no_grad():
        middle.plot(problem.x[:, 0], problem.y, color=GREY, linewidth=4, alpha=0.6, label="data")
        middle.plot(problem.x[:, 0], model(problem.x)[:, 0], color=SECANT, label="network, 61 parameters")
    middle.set(title="sin(10 pi x) / (10 pi x)", xlabel="x")
    middle.legend(frameon=False, loc="upper left", fontsize=8)
    middle.set_xticks([-1.0, -0.5, 0.0, 0.5, 1.0])
    right.semilogy(range(1, given.epochs + 1), errors, "o-", color=SECANT)
    right.set(title="Mean squared error over epochs", xlabel="epoch")
    right.grid(axis="y", color=GREY, alpha=0.25)
    figure.savefig(given.out, dpi=120)
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
