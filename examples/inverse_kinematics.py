"""Angles for an arm of seven joints that bring its hand to 10,000 goals, within the limits of its joints.

A goal is a place and a direction of the hand. Each is reached by L-BFGS within bounds from random angles, all of them
in one call of `secant.minimize`; what has come to rest elsewhere is tried again from other angles. Left: some of the
arms; middle: how far the hands are from their goals; right: goals that are met after so many tries.

    python examples/inverse_kinematics.py --goals 10000 --out inverse_kinematics.png
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
from secant.benchmarks.batched_problems import LIMITS, LINKS, MET, goals, hand, reach_value_grad
from secant.benchmarks.plot import GREY, SECANT
from secant.benchmarks.report import Table
from secant.cli import console

TRIES = 5
ARMS = 12  # that are drawn


def reached(goal: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the hand to each goal (b, 12) from angles (b, 7): angles where that ended, and what is left."""
    found = secant.minimize(
        lambda q, *, index: reach_value_grad(q, goal[index]), start, batch=True, method="l-bfgs-b", jac=True,
        bounds=[(-x, x) for x in LIMITS], options={"gtol": 1e-6, "ftol": 0.0, "maxiter": 200},
    )  # fmt: skip
    return found.x, found.fun


def joints(q: Tensor) -> Tensor:
    """Return the places of the joints of one arm, (8, 3): those of the hands of shorter arms."""
    places = [torch.zeros(3, dtype=q.dtype)]
    frame = torch.eye(4, dtype=q.dtype)
    for angle, (d, a, twist) in zip(q.tolist(), LINKS, strict=True):
        c, s, ct, st = math.cos(angle), math.sin(angle), math.cos(twist), math.sin(twist)
        step = [[c, -s * ct, s * st, a * c], [s, c * ct, -c * st, a * s], [0, st, ct, d], [0, 0, 0, 1]]
        frame = frame @ torch.tensor(step, dtype=q.dtype)
        places.append(frame[:3, 3])
    return torch.stack(places)


def main(count: int, out: Path) -> tuple[Tensor, Tensor, list[float]]:
    """Draw goals, reach them, draw what came of it; return goals, angles, and shares that are met after each try."""
    limits = torch.tensor(LIMITS, dtype=torch.float64)
    given = goals(count)
    draw = torch.Generator().manual_seed(1)
    begin = time.perf_counter()
    q, left = reached(given.goal, given.start)
    met, seconds = [float((left <= MET).double().mean())], [time.perf_counter() - begin]
    for _ in range(1, TRIES):
        again = (left > MET).nonzero()[:, 0]
        if len(again):
            start = limits * (2.0 * torch.rand(len(again), 7, generator=draw, dtype=torch.float64) - 1.0)
            new_q, new_left = reached(given.goal[again], start)
            better = new_left < left[again]
            q[again] = torch.where(better[:, None], new_q, q[again])
            left[again] = torch.where(better, new_left, left[again])
        met.append(float((left <= MET).double().mean()))
        seconds.append(time.perf_counter() - begin)
    assert bool((q.abs() <= limits).all())
    rows = [
        (f"{i} {'try' if i == 1 else 'tries'}", f"{share:.2%}", f"{taken:.2f}")
        for i, share, taken in zip(range(1, TRIES + 1), met, seconds, strict=True)
    ]
    console.show(Table(f"{count:,} goals for a hand", ("", "met", "seconds"), rows))

    figure = Figure(figsize=(13.5, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    arms = figure.add_subplot(1, 3, 1, projection="3d")
    for i in range(min(ARMS, count)):
        places = joints(q[i])
        arms.plot(*places.T, color=SECANT, linewidth=1.6, marker="o", markersize=2.5)
        arms.scatter(*given.goal[i, :3], color="#D55E00", s=14)
    arms.set(title="arms, and goals of their hands", xticklabels=[], yticklabels=[], zticklabels=[])
    far = (hand(q) - given.goal)[:, :3].norm(dim=1).clamp_min(1e-9).log10()
    middle, right = figure.add_subplot(1, 3, 2), figure.add_subplot(1, 3, 3)
    middle.hist(far, bins=60, color=SECANT)
    middle.set(title="distance from the goal", xlabel="log10 of metres", yscale="log", yticks=[])
    right.plot(range(1, TRIES + 1), met, color=SECANT, marker="o")
    right.axhline(1.0, color=GREY, linewidth=0.8)
    right.set(title="goals that are met", xlabel="tries", xticks=range(1, TRIES + 1))
    figure.savefig(out)
    print(f"Wrote {out}.")
    return given.goal, q, met


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(".")[0])
    parser.add_argument("--goals", type=int, default=10_000, help="places and directions of the hand")
    parser.add_argument("--out", type=Path, default=Path("inverse_kinematics.png"), help="the PNG to write")
    given = parser.parse_args()
    main(given.goals, given.out)
