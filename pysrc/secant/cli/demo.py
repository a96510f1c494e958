"""`python -m secant demo`: solve an equation, train on real data, time the direction, and draw it all."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secant.benchmarks import machine, plot
from secant.benchmarks.case import Row, ratio
from secant.benchmarks.digits import HISTORY, MODELS, TEST_IMAGES, Digits, Model, Run, chance_of_fewer, load, train
from secant.benchmarks.families.lbfgs import Case
from secant.benchmarks.families.residuals import Fit
from secant.benchmarks.measure import fits, measure
from secant.benchmarks.optimizers import OPTIMIZERS
from secant.benchmarks.race import race, reached
from secant.benchmarks.report import Table, duration, losses, times
from secant.benchmarks.timing import clock_for
from secant.cli import console

#: Seconds that the demo may take from here on: of each optimizer on the equation, training of each model, directions of
#: each length, and all of it.
EQUATION_SECONDS, TRAIN_SECONDS, DIRECTION_SECONDS, ALL_SECONDS = 7.0, 5.0, 0.4, 52.0
#: Errors of the solution of the equation that the table shows, and those who are to reach them.
ERRORS = (1e-2, 1e-3, 1e-4, 1e-6)
SOLVERS = ("LevenbergMarquardt", "torch LBFGS", "Adam")
SIZES = (*(base * 10**k for k in range(3, 7) for base in (1, 3)), 10**7)
MAX_RUNS = 9
#: Final losses closer than this, relatively, are the same: rounding takes float32 runs along different paths.
VISIBLE = 1e-2
#: Test images that one of two models of the same quality would lose to the other by chance, this often, are no loss.
CHANCE = 0.05


class Pair(NamedTuple):
    """A model trained by both optimizers: of each the run of median length, and how many there were."""

    torch: Run
    secant: Run
    runs: int


@dataclasses.dataclass(frozen=True)
class OneStart(Fit):
    """An equation from one start: a demo is no benchmark."""

    SEEDS = 1
    SECONDS = (EQUATION_SECONDS, EQUATION_SECONDS)

    def names(self, device: torch.device) -> list[str]:
        """List those of the demo."""
        return list(SOLVERS)


def solve(device: torch.device, *, seconds: float) -> dict[str, Row]:
    """Solve the equation with every optimizer; the row of each at the hardest error."""
    with console.progress("equation") as advance:
        rows = race([OneStart("poisson-2d", ERRORS[-1])], device, seconds=seconds)
        advance(1.0, "done")
    return {row.name: row for row in rows}


def equation_table(solved: dict[str, Row]) -> Table:
    """Tabulate when each optimizer reached each error."""
    rows = []
    for name, row in solved.items():
        times_ = [reached(row.curve, error) for error in ERRORS]
        cells = ["-" if x is None else duration(x) for x in times_]
        rows.append((name, *cells, f"{row.error:.1e}", duration(row.curve[-1][0])))
    columns = ("optimizer", *(f"to {error:.0e}" for error in ERRORS), "reached", "after")
    notes = (
        "u_xx + u_yy = f on the unit square, 900 + 120 points, a tanh network 2-64-1, float64; relative errors.",
        f"Adam: cosine over its {EQUATION_SECONDS:.0f} seconds. The clock stands still while the error is measured.",
    )
    return Table("An equation solved by a network", columns, rows, notes)


def equation_losses(solved: dict[str, Row]) -> list[str]:
    """Say in words where ours was later than a peer, or did not get where it did."""
    ours, *peers = (solved[name] for name in SOLVERS)
    lost = []
    for error in ERRORS:
        mine = reached(ours.curve, error)
        for peer in peers:
            theirs = reached(peer.curve, error)
            if theirs is not None and (mine is None or mine > theirs):
                lost.append(f"equation, to {error:.0e}: {ours.name} comes after {peer.name}")
    return lost


def compare(model: Model, data: Digits, *, seconds: float, done: Callable[[float], None]) -> Pair:
    """Train with both optimizers in turn, from the same point, again and again until the time is up."""
    clock = clock_for(data.train_x.device)
    for name in OPTIMIZERS:
        train(name, model, data, clock, iterations=3)  # warm-up: first calls of kernels, allocator, threads
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    order, start, share = list(OPTIMIZERS), time.perf_counter(), 0.0
    while share < 1.0:
        for name in order:
            runs[name].append(train(name, model, data, clock))
        order.reverse()
        share = max((time.perf_counter() - start) / seconds, len(runs["torch"]) / MAX_RUNS)
        done(min(share, 1.0))
    count = len(runs["torch"])
    median = {name: sorted(found, key=lambda run: run.steps.total)[(count - 1) // 2] for name, found in runs.items()}
    return Pair(median["torch"], median["secant"], count)


def compare_all(data: Digits, *, seconds: float) -> dict[str, Pair]:
    """Compare on every model, by name."""
    results = {}
    with console.progress("training") as advance:
        for i, model in enumerate(MODELS):

            def done(share: float, i: int = i, name: str = model.name) -> None:
                advance((i + share) / len(MODELS), name)

            results[model.name] = compare(model, data, seconds=seconds, done=done)
    return results


def training_table(results: dict[str, Pair]) -> Table:
    """Tabulate both optimizers on each model."""
    rows = []
    for model, pair in results.items():
        slow = pair.torch.steps
        for name, run in (("torch", pair.torch), ("secant", pair.secant)):
            steps, ours = run.steps, run is pair.secant
            rows.append(
                (
                    model,
                    name,
                    f"{run.loss:.5f}",
                    f"{run.accuracy:.1%}",
                    str(steps.iterations),
                    str(steps.evaluations),
                    duration(steps.inside),
                    duration(steps.outside),
                    times(slow.outside / steps.outside) if ours else "",
                    duration(steps.total),
                    times(slow.total / steps.total) if ours else "",
                )
            )
    columns = (
        "model", "LBFGS", "final loss", "test acc.", "iterations", "evaluations",
        "closures", "optimizer", "less", "total", "less",
    )  # fmt: skip
    counts = ", ".join(str(pair.runs) for pair in results.values())
    notes = (
        f"LBFGS of torch.optim and of secant.optim, strong Wolfe, history {HISTORY}, float32; "
        f"the median of {counts} runs.",
        "closures: seconds in the model and its gradient; optimizer: seconds outside the closures.",
    )
    return Table("Training on 1,437 of the 1,797 digits, full batch, the same initial point", columns, rows, notes)


def training_losses(results: dict[str, Pair]) -> list[str]:
    """Say in words what secant did worse."""
    lost = []
    for model, (theirs, ours, _) in results.items():
        for where, a, b in (
            ("outside the closures", ours.steps.outside, theirs.steps.outside),
            ("in total", ours.steps.total, theirs.steps.total),
        ):
            if a > b:
                lost.append(f"{model}: secant takes {times(a / b)} the time of torch {where}")
        if ours.loss > theirs.loss * (1 + VISIBLE):
            lost.append(f"{model}: secant ends at a loss of {ours.loss:.5f}, torch at {theirs.loss:.5f}")
        if ours.accuracy < theirs.accuracy and chance_of_fewer(ours.right, theirs.right) < CHANCE:
            images = round((theirs.accuracy - ours.accuracy) * TEST_IMAGES)
            lost.append(f"{model}: secant classifies {images} of the {TEST_IMAGES} test images fewer than torch")
    return lost


#: Rows "eager", "two_loop", "step" and "step, bf16 history" at one length.
At = dict[str, Row]


def direction_cases(n: int) -> list[Case]:
    """List what is timed at each length; the first also by the eager loop."""
    return [Case("two_loop", n), Case("step", n), Case("step", n, storage=torch.bfloat16)]


def measure_directions(sizes: Sequence[int], device: torch.device, *, seconds: float, deadline: float) -> list[At]:
    """Time each length, shortest first; stop rather than go past the deadline (of `perf_counter`) or the memory."""
    found: list[At] = []
    cost = 0.0
    with console.progress("directions") as advance:
        for i, n in enumerate(sizes):
            start = time.perf_counter()
            late = found and start + cost * n / found[-1]["two_loop"].case.n > deadline
            if late or not fits(direction_cases(n), device):
                break
            found.append(_measure_at(n, device, seconds))
            cost = time.perf_counter() - start
            advance((i + 1) / len(sizes), f"n = {n:,}")
    return found


def _measure_at(n: int, device: torch.device, seconds: float) -> At:
    cases = direction_cases(n)
    ours = cases[0].serving(device)[0]

    def wanted(case: Any, name: str) -> bool:
        return name == ours or (name == "eager" and case.op == "two_loop")

    rows = {(row.case, row.name): row for row in measure(cases, device, seconds=seconds, wanted=wanted)}
    keys = ("two_loop", "step", "step, bf16 history")
    return {"eager": rows[cases[0], "eager"]} | {key: rows[case, ours] for key, case in zip(keys, cases, strict=True)}


def directions_table(found: Sequence[At], bandwidth: machine.Bandwidth) -> Table:
    """One line per length."""

    def share(row: Row) -> str:
        rate = row.bytes_per_second
        return "-" if rate is None else f"{rate / bandwidth.bytes_per_second:.0%}"

    rows = []
    for at in found:
        eager, ours = at["eager"], at["two_loop"]
        rows.append(
            (
                f"{ours.case.n:,}",
                duration(eager.seconds),
                duration(ours.seconds),
                times(ratio(eager, ours)),
                share(ours),
                *(
                    cell
                    for name in ("step", "step, bf16 history")
                    for cell in (duration(at[name].seconds), share(at[name]))
                ),
            )
        )
    columns = (
        "n", "eager two-loop", "two_loop", "faster", "of bandwidth", "step", "of bandwidth", "step, bf16 history",
        "of bandwidth",
    )  # fmt: skip
    notes = (
        f"bandwidth: {bandwidth.bytes_per_second / 1e9:.3g} GB/s ({bandwidth.method}); over 100%: from cache.",
        "step: the update of the history and the direction in one, what the optimizer calls once per iteration.",
    )
    return Table(f"A direction from {HISTORY} pairs, float32", columns, rows, notes)


def _loss_panel(model: str, pair: Pair) -> tuple[plot.Panel, list[plot.Curve]]:
    theirs, ours = pair.torch.steps, pair.secant.steps
    title = f"{model[0].upper()}{model[1:]}: done in {ours.total / theirs.total:.0%} of the time"
    alone = f"torch {duration(theirs.outside)}, secant {duration(ours.outside)}"
    below = f"training loss, {ours.iterations} iterations; optimizer alone: {alone}"
    curves = [
        plot.Curve("torch", plot.TORCH, theirs.times, theirs.losses),
        plot.Curve("secant", plot.SECANT, ours.times, ours.losses),
    ]
    return plot.Panel(title, below), curves


def _series(found: Sequence[At], key: str, label: str, color: str) -> plot.Series:
    points = [(at[key].case.n, seconds) for at in found if (seconds := at[key].seconds) is not None]
    return plot.Series(label, color, [n for n, _ in points], [seconds for _, seconds in points])


def _equation_panel(solved: dict[str, Row]) -> tuple[plot.Panel, list[plot.Curve]]:
    ours, peer = (reached(solved[name].curve, 1e-3) for name in SOLVERS[:2])
    said = f": an error of 1e-3 in {duration(ours)}" if ours else ""
    if ours and peer:
        said += f", torch's L-BFGS in {duration(peer)}"
    panel = plot.Panel("Poisson's equation" + said, "relative error of a network 2-64-1 against seconds")
    return panel, [plot.raced(name, row.curve) for name, row in solved.items() if row.curve]


def draw(
    path: Path,
    solved: dict[str, Row],
    results: dict[str, Pair],
    found: Sequence[At],
    bandwidth: machine.Bandwidth,
    footer: str,
) -> None:
    """Write the picture."""
    lines = [
        _series(found, "eager", "eager PyTorch", plot.TORCH),
        _series(found, "two_loop", "secant two_loop", plot.SECANT),
        _series(found, "step", "secant step", plot.STEP),
        _series(found, "step, bf16 history", "secant step, bf16", plot.BF16),
    ]
    sizes = [at["two_loop"].case.n for at in found]
    reads = [2 * at["two_loop"].case.history_bytes / bandwidth.bytes_per_second for at in found]
    limit = plot.Series("float32 memory limit", plot.GREY, sizes, reads)
    first, last = (ratio(at["eager"], at["two_loop"]) for at in (found[0], found[-1]))
    ratios = [f"{x:.2g}× at n = {n:,}" for x, n in ((first, sizes[0]), (last, sizes[-1])) if x is not None]
    title = f"Eager over two_loop: {', '.join(ratios)}"
    rate = f"{bandwidth.bytes_per_second / 1e9:.3g} GB/s"
    below = f"time of an L-BFGS direction, {HISTORY} pairs; memory limit: the history read twice at {rate}"
    losses = [_loss_panel(model, pair) for model, pair in results.items()]
    plot.save_demo(path, _equation_panel(solved), losses, plot.Panel(title, below), lines, limit, footer)


def run(device: torch.device, output: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the demo, print its tables and write its picture.

    Args:
        device: where. output: path of the PNG. quick: one run each, and short vectors only.

    Returns:
        "equation": `Row` by optimizer; "training": `Pair` by model; "directions": `At` by length; "bandwidth"; "lost":
        what we do worse, in words;
        "seconds": what it took.
    """
    start = time.perf_counter()
    sizes = SIZES[:3] if quick else SIZES
    solved = solve(device, seconds=0.3 if quick else EQUATION_SECONDS)
    console.show(equation_table(solved))
    data = load(device)
    results = compare_all(data, seconds=0.01 if quick else TRAIN_SECONDS)
    console.show(training_table(results))

    bandwidth = machine.bandwidth(device)
    seconds = 0.02 if quick else DIRECTION_SECONDS
    found = measure_directions(sizes, device, seconds=seconds, deadline=math.inf if quick else start + ALL_SECONDS)
    console.show(directions_table(found, bandwidth))
    if len(found) < len(sizes):
        print(f"Left out, for time or memory: n = {', '.join(f'{n:,}' for n in sizes[len(found) :])}.")

    lost = equation_losses(solved) + training_losses(results) + losses([row for at in found for row in at.values()])
    print(
        "\n  ".join(["Where secant is slower or worse:", *lost]) if lost else "secant is slower or worse nowhere above."
    )
    draw(output, solved, results, found, bandwidth, machine.summary(machine.describe(device)))
    taken = time.perf_counter() - start
    print(f"Wrote {output}; {taken:.0f} s.")
    return {
        "equation": solved,
        "training": results,
        "directions": found,
        "bandwidth": bandwidth,
        "lost": lost,
        "seconds": taken,
    }
