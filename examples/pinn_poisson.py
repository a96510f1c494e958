"""A network that solves u_xx + u_yy = f on the unit square, trained by Levenberg and Marquardt's method and by L-BFGS.

The solution is sin(pi x) sin(pi y), the network 2-64-1 with tanh, the residuals are the equation at 900 points and the
boundary values at 120, written with `torch.autograd.grad`. Both optimizers have the same seconds.

    python examples/pinn_poisson.py --seconds 6 --out pinn_poisson.png
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import secant
from secant.benchmarks.plot import GREY, SECANT, TORCH
from secant.benchmarks.report import Table
from secant.benchmarks.residual_problems import Equation, Poisson2d
from secant.cli import console

#: Errors whose time is told.
LEVELS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Run(NamedTuple):
    """A trained network, and its error |u - exact| / |exact| after so many seconds of training."""

    label: str
    color: str
    model: nn.Module
    seconds: list[float]
    errors: list[float]

    def reached(self, level: float) -> str:
        """Return when an error was reached, as a table has it."""
        found = next((s for s, e in zip(self.seconds, self.errors, strict=True) if e <= level), None)
        return "-" if found is None else f"{found:.1f} s"


def train(label: str, color: str, problem: Equation, seconds: float, seed: int, advance: console.Advance) -> Run:
    """Train one network for some seconds, the measuring of its error not counted."""
    model = problem.model(seed)
    run = Run(label, color, model, [], [])

    if label == "Levenberg-Marquardt":
        optimizer: torch.optim.Optimizer = secant.optim.LevenbergMarquardt(model.parameters(), max_iter=4)

        def closure() -> tuple[Tensor, ...] | Tensor:
            return problem.residuals(model)
    else:
        optimizer = torch.optim.LBFGS(model.parameters(), history_size=100, max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> tuple[Tensor, ...] | Tensor:
            optimizer.zero_grad()
            loss = sum(r.square().sum() for r in problem.residuals(model)) / 2
            loss.backward()
            return loss

    spent = 0.0
    while spent < seconds and not (run.errors and run.errors[-1] <= LEVELS[-1]):
        start = time.perf_counter()
        optimizer.step(closure)
        spent += time.perf_counter() - start
        run.seconds.append(spent)
        run.errors.append(problem.error(model))
        advance(min(1.0, spent / seconds), f"{label}: error {run.errors[-1]:.1e}")
    return run


def draw(path: Path, problem: Equation, runs: list[Run]) -> None:
    """Draw errors over seconds, the solution that was learned best, and what is wrong with it."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, solution, error = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    for run in runs:
        curves.semilogy(run.seconds, run.errors, color=run.color, label=run.label, linewidth=1.8)
    curves.set(title="Relative error over seconds", xlabel="seconds", ylim=(min(LEVELS) / 3, 3))
    curves.grid(axis="y", color=GREY, alpha=0.25)
    curves.legend(frameon=False)
    ticks = torch.linspace(0, 1, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(ticks, ticks)
    model = min(runs, key=lambda run: run.errors[-1]).model
    with torch.no_grad():
        found = model(grid)[:, 0]
    for axes, values, title, colors in (
        (solution, found, "u of the network", "viridis"),
        (error, found - problem.exact(grid), "u - exact", "RdBu"),
    ):
        image = axes.imshow(values.reshape(101, 101).T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap=colors)
        figure.colorbar(image, ax=axes, shrink=0.85)
        axes.set(title=title, xlabel="x", ylabel="y")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train both, print when they reached which error, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of training, each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the network's weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pinn_poisson.png"), help="picture (default: %(default)s)")
    given = parser.parse_args(arguments)
    problem = Poisson2d()
    runs = []
    for label, color in (("Levenberg-Marquardt", SECANT), ("torch.optim.LBFGS", TORCH)):
        with console.progress(label) as advance:
            runs.append(train(label, color, problem, given.seconds, given.seed, advance))
    columns = ("optimizer", *(f"to {level:.0e}" for level in LEVELS), "last error")
    rows = [(run.label, *map(run.reached, LEVELS), f"{run.errors[-1]:.1e}") for run in runs]
    console.show(Table("u_xx + u_yy = f, 2-64-1 network, float64", columns, rows))
    draw(given.out, problem, runs)
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
