"""Races: what is timed, when a run is over, and what a row says of runs that did not get there."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from secant.benchmarks import race as module
from secant.benchmarks.case import find, ratio
from secant.benchmarks.race import Race, Runner, Watch, race, reached, thinned
from secant.benchmarks.report import losses, plain_row

CPU = torch.device("cpu")


class Halving(Runner):
    """Halves its error at each iteration, until it is at its end."""

    def __init__(self, end, slow=0.0):
        self.value, self.end, self.slow, self.asked = 1.0, end, slow, 0

    def error(self):
        self.asked += 1
        time.sleep(self.slow)
        return self.value

    def run(self, over, seconds):
        self.allowed = seconds
        while self.value > self.end:
            self.value /= 2
            if over():
                return


@dataclasses.dataclass(frozen=True)
class Example(Race):
    SECONDS = (5.0, 4.0)

    def ours(self):
        return ["ours", "ours too"]

    def names(self, device):
        return ["peer", "ours"] + (["ours too"] if self.target > 0.01 else [])

    def problem(self, device, seed=0):
        return seed

    def runner(self, problem, name):
        made.append((problem, name, Halving(0.02 if name == "peer" else 1e-9)))
        return made[-1][2]


made: list = []


def test_rows_of_a_race():
    made.clear()
    cases = [Example("p", 0.1), Example("p", 1e-3)]
    rows = race(cases, CPU, seconds=math.inf)
    warm_up, made[:] = made[:3], made[3:]
    assert [name for _, name, _ in warm_up] == ["ours", "ours too", "peer"]
    assert [(seed, name) for seed, name, _ in made] == [
        (seed, name) for seed in range(3) for name in ("ours", "ours too", "peer")
    ]
    assert [(row.case.target, row.name) for row in rows] == [
        (0.1, "ours"), (0.1, "ours too"), (0.1, "peer"), (1e-3, "ours"), (1e-3, "peer"),
    ]  # fmt: skip
    ours, peer = find(rows, cases[1]), find(rows, cases[1], "peer")
    assert (ours.kind, peer.kind) == ("backend", "peer")
    assert len(ours.timing.samples) == 3
    assert ours.correct
    assert ours.error <= 1e-3
    assert peer.timing is None  # it ends at 1 / 64
    assert peer.note.startswith("0 of 3 starts; 1.6e-02 after ")
    assert ratio(peer, ours) is None
    assert ratio(find(rows, cases[0], "peer"), find(rows, cases[0])) > 0.0
    assert ours.curve[-1][1] == ours.error
    assert plain_row(rows, ours, None)["curve"] == ours.curve
    # A peer may take PATIENCE times what ours took to the same error.
    taken = [reached([(s, e) for s, e in row.curve], 1e-3) for row in rows if row.name == "ours"]
    allowed = [runner.allowed for _, name, runner in made if name == "peer"]
    assert all(0.0 < x < 4.0 for x in allowed)
    assert max(allowed) <= module.PATIENCE * 3 * max(max(ours.timing.samples), *taken)


def test_ours_that_does_not_get_there_is_lost(monkeypatch):
    case = Example("p", 1e-12)
    rows = race([case], CPU, seconds=math.inf)
    assert find(rows, case).timing is None
    assert losses(rows)[0].startswith("p to 1e-12: ours does not get there (error 9.3e-10)")


def test_the_clock_stands_still_while_the_error_is_measured():
    runner = Halving(1e-9, slow=0.01)
    curve = runner.until(0.2, 5.0)
    assert [error for _, error in curve] == [0.5, 0.25, 0.125]
    assert runner.asked == 3
    assert curve[-1][0] < 0.01
    watch = Watch(lambda: 1.0, 0.1, 0.02)
    assert not watch()
    time.sleep(0.03)
    assert watch()
    assert watch.curve[-1][0] >= 0.02


def test_curves_are_thinned_to_what_is_seen():
    curve = [(0.001 * k, 1.0 / k if k % 2 else 2.0) for k in range(1, 5001)]
    kept = thinned(curve, 50)
    assert 20 < len(kept) <= 53
    errors = [error for _, error in kept]
    assert errors == sorted(errors, reverse=True)
    assert kept[0] == curve[0]
    assert kept[-1] == (5.0, 1.0 / 4999)
    assert reached(curve, 1e-3) == pytest.approx(1.001)
    assert reached(curve, 1e-9) is None
    assert thinned([]) == []
