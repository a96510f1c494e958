"""Races: optimizers on the same problem from the same points, and when each first came within an error.

A case is a problem and an error to reach; its time is that of the optimizer alone, the error being measured while the
clock stands still. Ours are run until the hardest error of a problem, a peer as long as it takes or `PATIENCE` times
what ours took, and where it got by then is its error.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from secant.benchmarks.case import Bar, Check, Contender, Row, Wanted, WholeRun, everything, find, ratio
from secant.benchmarks.measure import measure
from secant.benchmarks.timing import Timed, Timing

#: A peer may take this many times the seconds of ours to the same error.
PATIENCE = 50.0
#: Seconds that ours and peers may take where a family only shows that it runs.
QUICK_SECONDS = 3.0
#: Seconds of the warm-up of each optimizer.
WARM_UP = 0.3

#: Says whether a run is over; an optimizer asks after each of its iterations.
Watching = Callable[..., bool]


class Watch:
    """Times a run by asking for its error after each iteration, while the clock stands still.

    Args:
        error: measures it. target: at which the run is over. seconds: after which it is over.

    Attributes:
        curve: (seconds, error) after each iteration.
    """

    def __init__(self, error: Callable[[], float], target: float, seconds: float) -> None:
        self.error, self.target, self.seconds = error, target, seconds
        self.curve: list[tuple[float, float]] = []
        self._spent, self._since = 0.0, time.perf_counter()

    def __call__(self, *_: object) -> bool:
        """Note where the run is; true when it is over."""
        self._spent += time.perf_counter() - self._since
        error = self.error()
        self.curve.append((self._spent, error))
        over = error <= self.target or self._spent >= self.seconds
        self._since = time.perf_counter()
        return over


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the seconds after which an error was first reached; None: never."""
    return next((seconds for seconds, error in curve if error <= target), None)


class Runner(abc.ABC):
    """An optimizer on a problem, at its start."""

    @abc.abstractmethod
    def error(self) -> float:
        """Measure the error where it is now."""

    @abc.abstractmethod
    def run(self, over: Watching, seconds: float) -> None:
        """Run, asking `over` after each iteration, until it says so or there is nothing left to gain.

        Args:
            seconds: that are allowed, for schedules of learning rates.
        """

    def until(self, target: float, seconds: float) -> list[tuple[float, float]]:
        """Run from the start to an error; return the curve."""
        watch = Watch(self.error, target, seconds)
        self.run(watch, seconds)
        return watch.curve


@dataclasses.dataclass(frozen=True)
class Race(WholeRun):
    """Seconds to an error. op: the problem. target: the error."""

    target: float

    INPUT = ("op",)
    #: Starts, each a seed.
    SEEDS: ClassVar[int] = 3
    #: Seconds that ours may take, and peers at most.
    SECONDS: ClassVar[tuple[float, float]] = (30.0, 12.0)
    FAILURE = "does not get there"

    @property
    def title(self) -> str:
        """Name problem and error."""
        return f"{self.op} to {self.target:.0e}"

    @abc.abstractmethod
    def runner(self, problem: Any, name: str) -> Runner:
        """Put an optimizer at the start of a problem."""

    @abc.abstractmethod
    def ours(self) -> Sequence[str]:
        """List which of `names` are ours."""

    def contender(self, problem: Any, name: str) -> Contender:
        """Prepare the one of this name; timed as a whole run."""

        def call() -> float:
            return self.runner(problem, name).until(self.target, self.SECONDS[0])[-1][1]

        return Contender(self, name, "backend" if name in self.ours() else "peer", Timed([call]), call)

    def judge(self, problem: Any, contender: Contender, answer: float) -> Check:
        """Compare the error with the target."""
        return Check(answer, self.target)


def race(cases: Sequence[Race], device: torch.device, *, seconds: float, wanted: Wanted = everything) -> list[Row]:
    """Run every optimizer on one problem from every start, ours first; a row for each error and optimizer.

    Args:
        cases: the errors to reach, all of one problem. seconds: that ours may take, if shorter than the case says.
        device, wanted: as for `measure`.
    """
    first = cases[0]
    most, peers_most = (min(x, seconds) for x in first.SECONDS)
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    goals: dict[str, list[float]] = {}
    for case in cases:
        for name in case.names(device):
            if wanted(case, name):
                goals.setdefault(name, []).append(case.target)
    order = sorted(goals, key=lambda name: name not in first.ours())
    for name in order:  # first calls import, choose and allocate
        first.runner(first.problem(device, 0), name).until(0.0, min(WARM_UP, seconds / 10.0))
    for seed in range(first.SEEDS):
        best: dict[float, float] = {}  # seconds of ours to each error
        for name in order:
            mine, own = name in first.ours(), goals[name]
            allowed = most if mine else min(peers_most, PATIENCE * max(best.get(x, most) for x in own))
            curve = first.runner(first.problem(device, seed), name).until(min(own), allowed)
            curves.setdefault(name, []).append(curve)
            for target in own if name == order[0] else ():
                if (taken := reached(curve, target)) is not None:
                    best[target] = taken
    return [_row(case, name, curves[name]) for case in cases for name in order if case.target in goals[name]]


def measured(cases: Sequence[Any], device: torch.device, *, seconds: float, wanted: Wanted = everything) -> list[Row]:
    """Run races and time other cases, for a family with both; races are short if less than a second is given."""
    if isinstance(cases[0], Race):
        return race(cases, device, seconds=math.inf if seconds >= 1.0 else QUICK_SECONDS, wanted=wanted)
    return measure(cases, device, seconds=seconds, wanted=wanted)


def _row(case: Race, name: str, curves: Sequence[Sequence[tuple[float, float]]]) -> Row:
    """Make the row of an error: the seconds of each start, if all got there."""
    times = [reached(curve, case.target) for curve in curves]
    errors = [min((error for _, error in curve if not math.isnan(error)), default=math.nan) for curve in curves]
    there = [x for x in times if x is not None]
    kind = "backend" if name in case.ours() else "peer"
    note = ""
    timing = Timing(tuple(there)) if len(there) == len(times) else None
    if timing is None:
        longest = max((curve[-1][0] for curve in curves if curve), default=0.0)
        note = f"{len(there)} of {len(times)} starts; {max(errors):.1e} after {longest:.2g} s"
    order = sorted((math.inf if x is None else x, i) for i, x in enumerate(times))
    middle = order[len(order) // 2][1]
    return Row(case, name, kind, timing, max(errors), case.target, note, 1, tuple(thinned(curves[middle])))


def at_least(rows: Sequence[Row], case: Race, peer: str, ours: str, target: float) -> Bar:
    """Set a bar on how much less time ours takes than a peer; at least so much where that did not get there."""
    slow, fast = find(rows, case, peer), find(rows, case, ours)
    value = ratio(slow, fast)
    if value is None and slow is not None and fast is not None and fast.seconds and slow.curve:
        value = slow.curve[-1][0] / fast.seconds  # where it was stopped
    return Bar(f"{case.label}: {ours} against {peer}, times less", target, True, value, case=case, unit="x")


def thinned(curve: Sequence[tuple[float, float]], count: int = 200) -> list[tuple[float, float]]:
    """Keep the points where the error is the smallest so far, at most about `count` of them, evenly in log time."""
    best, kept, lowest = [], [], math.inf
    for seconds, error in curve:
        if error < lowest:
            lowest = error
            best.append((seconds, error))
    if not best:
        return []
    start, end = max(best[0][0], 1e-6), max(best[-1][0], 2e-6)
    width, last = math.log(end / start) / count, -math.inf
    for seconds, error in best:
        at = math.log(max(seconds, 1e-6))
        if at - last >= width or (seconds, error) == best[-1]:
            kept.append((seconds, error))
            last = at
    return [*kept, (curve[-1][0], lowest)] if curve[-1][0] > best[-1][0] else kept
