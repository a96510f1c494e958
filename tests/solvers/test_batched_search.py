"""The batched line search: for each problem the steps of `strong_wolfe`, whatever the others do."""

from __future__ import annotations

import math

import pytest
import torch

from secant.solvers import Trial, strong_wolfe
from secant.solvers.batched_search import BatchedStrongWolfe

F64 = torch.float64

#: Functions of t: falling for ever, wells near and far, steep walls, infinite and undefined beyond, bumps, flat, noisy.
LINES = {
    "well at 3": lambda t: ((t - 3.0) ** 2, 2.0 * (t - 3.0)),
    "well at .01": lambda t: ((t - 0.01) ** 2, 2.0 * (t - 0.01)),
    "well at 1e4": lambda t: ((t - 1e4) ** 2, 2.0 * (t - 1e4)),
    "quartic": lambda t: ((t - 2.0) ** 4 - t, 4.0 * (t - 2.0) ** 3 - 1.0),
    "for ever": lambda t: (-t, -1.0),
    "exponential": lambda t: (math.exp(-t), -math.exp(-t)),
    "sine": lambda t: (-math.sin(t), -math.cos(t)),
    "fast sine": lambda t: (-math.sin(30.0 * t) - 0.1 * t, -30.0 * math.cos(30.0 * t) - 0.1),
    "wall": lambda t: (-t + math.exp(40.0 * (t - 1.0)) if t < 18.0 else math.inf,
                       -1.0 + 40.0 * math.exp(40.0 * (t - 1.0)) if t < 18.0 else math.inf),
    "infinite beyond .3": lambda t: ((t - 1.0) ** 2, 2.0 * (t - 1.0)) if t < 0.3 else (math.inf, math.inf),
    "undefined beyond 2": lambda t: ((t - 5.0) ** 2, 2.0 * (t - 5.0)) if t < 2.0 else (math.nan, math.nan),
    "undefined everywhere": lambda t: (1.0, -1.0) if t == 0.0 else (math.nan, math.nan),
    "up at once": lambda t: (t - 1e-9 * t, 1.0) if t > 0.0 else (0.0, -1.0),
    "steps": lambda t: (round(10.0 * (t - 0.7) ** 2) / 10.0, 2.0 * (t - 0.7)),
    "far below rounding": lambda t: (1.0 - 1e-20 * t, -1e-20 * (1.0 - t)),
    "same everywhere": lambda t: (1.0, -1e-18),
    "a kink": lambda t: (abs(t - 0.4), -1.0 if t < 0.4 else 1.0),
}  # fmt: skip


def alone(line, t, **options):
    """Run the generator; return the ts that were tried, and what it chose."""
    trial = lambda t: Trial(t, *line(t))  # noqa: E731
    search, tried = strong_wolfe(trial(0.0), trial(t), **options), [t]
    try:
        wanted = next(search)
        while True:
            tried.append(wanted[0])
            wanted = search.send(trial(wanted[0]))
    except StopIteration as end:
        return tried, end.value.trial.t


def together(lines, ts, *, size, noise, **options):
    """Run the machine on all lines until the last is done; what has ended is tried on, and must not matter."""
    b = len(lines)
    machine = BatchedStrongWolfe(b, torch.device("cpu"), **options)
    at = torch.tensor([line(0.0) for line in lines], dtype=F64)
    full = lambda x: torch.full((b,), x, dtype=F64)  # noqa: E731
    machine.begin(
        torch.ones(b, dtype=torch.bool), at[:, 0], at[:, 1], torch.tensor(ts, dtype=F64), full(size), full(noise)
    )
    tried, chosen, kept = [[] for _ in lines], [None] * b, [0.0] * b
    for _ in range(60):
        now = machine.t.clone()
        values = torch.tensor([line(t) for line, t in zip(lines, now.tolist(), strict=True)], dtype=F64)
        outcome = machine.advance(values[:, 0], values[:, 1])
        for i, t in enumerate(now.tolist()):
            if chosen[i] is not None:
                continue
            tried[i].append(t)
            if outcome.keeps_new[i]:
                kept[i] = t
            if outcome.done[i]:
                chosen[i] = t if outcome.takes_new[i] else 0.0 if outcome.takes_start[i] else kept[i]
        if None not in chosen:
            return list(zip(tried, chosen, strict=True))
    raise AssertionError("a search does not end")


def assert_same(found, want, name):
    """The same trials and the same end; torch rounds a square root in another way than the C library does."""
    (tried, chosen), (tried_alone, chosen_alone) = found, want
    assert len(tried) == len(tried_alone), name
    assert tried == pytest.approx(tried_alone, rel=1e-11, abs=0.0), name
    assert (tried.index(chosen) if chosen else -1) == (tried_alone.index(chosen_alone) if chosen_alone else -1), name


@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-3])
@pytest.mark.parametrize("first", [1.0, 1e-3, 50.0])
@pytest.mark.parametrize("limit", [1, 2, 4, 25])
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_steps_are_those_of_the_generator(noise, first, limit, size):
    options = {"max_evaluations": limit, "tolerance": 1e-9}
    found = together(list(LINES.values()), [first] * len(LINES), size=size, noise=noise, **options)
    for (name, line), got in zip(LINES.items(), found, strict=True):
        assert_same(got, alone(line, first, size=size, noise=noise, **options), name)


@pytest.mark.parametrize("c2", [0.1, 0.9])
def test_random_lines(c2):
    """Polynomials with many turns, first trials of all lengths."""
    draw = torch.Generator().manual_seed(5)
    coefs = torch.randn(400, 7, generator=draw, dtype=F64)
    coefs[:, 1] = -coefs[:, 1].abs() - 1e-3
    lines = []
    for c in coefs.tolist():

        def line(t, c=c):
            return sum(x * t**i for i, x in enumerate(c)), sum(i * x * t ** (i - 1) for i, x in enumerate(c) if i)

        lines.append(line)
    ts = (10.0 ** (4.0 * torch.rand(400, generator=draw, dtype=F64) - 3.0)).tolist()
    for noise in (0.0, 1e-12):
        found = together(lines, ts, size=1.0, noise=noise, c2=c2)
        for i, line in enumerate(lines):
            assert_same(found[i], alone(line, ts[i], noise=noise, c2=c2), i)


def test_problems_can_be_taken_out_and_begun_anew():
    machine = BatchedStrongWolfe(3, torch.device("cpu"))
    line = LINES["well at 3"]
    all_of_them = torch.ones(3, dtype=torch.bool)
    full = lambda x, b=3: torch.full((b,), x, dtype=F64)  # noqa: E731
    machine.begin(all_of_them, full(9.0), full(-6.0), torch.tensor([0.01, 0.1, 20.0], dtype=F64), full(1.0), full(0.0))
    values = torch.tensor([line(t) for t in machine.t.tolist()], dtype=F64)
    machine.advance(values[:, 0], values[:, 1])
    machine.take(torch.tensor([2, 0]))
    again = torch.tensor([False, True])
    machine.begin(again, full(9.0, 2), full(-6.0, 2), full(0.5, 2), full(1.0, 2), full(0.0, 2))
    tried = [[20.0], []]
    for _ in range(5):
        for i, t in enumerate(machine.t.tolist()):
            tried[i].append(t)
        values = torch.tensor([line(t) for t in machine.t.tolist()], dtype=F64)
        done = machine.advance(values[:, 0], values[:, 1]).done
    assert bool(done.numel() == 2)
    for i, t in enumerate((20.0, 0.5)):
        want = alone(line, t)[0]
        assert tried[i][: len(want)] == want
