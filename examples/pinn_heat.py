"""A network that solves the heat equation u_t = u_xx / 4 in space and time, by Levenberg and Marquardt's method.

u is 0 at both ends of the unit interval and sin(pi x) at t = 0; one network 2-64-1 is the solution at all x and t.
L-BFGS starts from the same weights and has the same seconds.

    python examples/pinn_heat.py --seconds 6 --out pinn_heat.png
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
from secant.benchmarks.plot import BF16, GREY, SECANT
from secant.benchmarks.report import Table
from secant.benchmarks.residual_problems import Heat1d
from secant.cli import console

METHODS = {"LevenbergMarquardt": SECANT, "LBFGS": BF16}
#: Errors whose time is told; the last one ends a run.
LEVELS = (1e-2, 1e-3, 1e-4, 1e-5)


class Run(NamedTuple):
    """A trained network, and its error |u - exact| / |exact| after so many seconds of training."""

    name: str
    model: nn.Module
    seconds: list[float]
    errors: list[float]

    def reached(self, level: float) -> str:
        """Return when an error was reached, as a table has it."""
        found = next((s for s, e in zip(self.seconds, self.errors, strict=True) if e <= level), None)
        return "-" if found is None else f"{found:.1f} s"


def train(name: str, problem: Heat1d, seconds: float, seed: int, advance: console.Advance) -> Run:
    """Train a network for some seconds, the measuring of its error not counted."""
    model = problem.model(seed)
    run, measuring, start = Run(name, model, [], []), 0.0, 0.0

    def told(iteration: secant.result.Iteration) -> bool:
        """Measure where an iteration has led; True ends the run."""
        nonlocal measuring
        now = time.perf_counter()
        run.seconds.append(now - start - measuring)
        run.errors.append(problem.error(model))
        advance(min(1.0, run.seconds[-1] / seconds), name)
        measuring += time.perf_counter() - now
        return run.seconds[-1] > seconds or run.errors[-1] <= LEVELS[-1]

    if name == "LevenbergMarquardt":
        optimizer = secant.optim.LevenbergMarquardt(model.parameters(), max_iter=10_000, callback=told)
        start = time.perf_counter()
        optimizer.step(lambda: problem.residuals(model))
    else:
        quasi_newton = secant.optim.LBFGS(
            model.parameters(), max_iter=10_000, history_size=100, line_search_fn="strong_wolfe", callback=told
        )

        def closure() -> Tensor:
            quasi_newton.zero_grad()
            loss = torch.cat(problem.residuals(model)).square().sum() / 2
            loss.backward()
            return loss

        start = time.perf_counter()
        quasi_newton.step(closure)
    return run


def draw(path: Path, problem: Heat1d, runs: list[Run]) -> None:
    """Draw errors over seconds, the rod at five times, and what is wrong with the better network."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, rod, error = figure.subplots(1, 3, width_ratios=(1.3, 1.1, 1))
    for run in runs:
        curves.semilogy(run.seconds, run.errors, color=METHODS[run.name], label=run.name, linewidth=1.8)
    curves.set(title="Relative error over seconds", xlabel="seconds", ylim=(LEVELS[-1] / 3, 3))
    curves.grid(axis="y", color=GREY, alpha=0.25)
    curves.legend(frameon=False)
    model, x = min(runs, key=lambda run: run.errors[-1]).model, torch.linspace(0, 1, 101, dtype=torch.float64)
    with torch.no_grad():
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            u = model(torch.stack([x, torch.full_like(x, t)], 1))[:, 0]
            rod.plot(x, u, color=SECANT, alpha=1.0 - 0.7 * t)
            rod.annotate(f"t = {t:g}", (0.5, float(u[50])), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        grid = torch.cartesian_prod(x, x)
        wrong = (model(grid)[:, 0] - problem.exact(grid)).reshape(101, 101)
    rod.set(title="u of the network", xlabel="x", ylim=(0, 1.12))
    image = error.imshow(wrong.T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="RdBu")
    figure.colorbar(image, ax=error, shrink=0.85)
    error.set(title="u - exact", xlabel="x", ylabel="t")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train both, print when they reached which error, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of training, each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the network's weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pinn_heat.png"), help="picture (default: %(default)s)")
    given = parser.parse_args(arguments)
    problem, runs = Heat1d(), []
    for name in METHODS:
        with console.progress(name) as advance:
            runs.append(train(name, problem, given.seconds, given.seed, advance))
    rows = [(r.name, str(len(r.errors)), *map(r.reached, LEVELS), f"{r.errors[-1]:.1e}") for r in runs]
    columns = ("optimizer", "iterations", *(f"to {level:.0e}" for level in LEVELS), "last error")
    console.show(Table("u_t = u_xx / 4, 2-64-1 network, float64", columns, rows))
    draw(given.out, problem, runs)
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
