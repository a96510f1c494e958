"""Whole runs: the optimizers on a quadratic and on the digits."""

from __future__ import annotations

import pytest
import torch

from secant.benchmarks import optimizers, timing
from secant.benchmarks.measure import measure
from secant.benchmarks.optimizers import OPTIMIZERS, OutsideClosure, Running, Stopwatch, counts, timed_step
from secant.benchmarks.timing import HostClock

CPU = torch.device("cpu")


class VirtualClock(HostClock):
    """Time that passes only where the test says so."""

    now = 0.0

    def mark(self):
        return self.now


class Scripted:
    """An optimizer that works for 3 seconds before and 4 after each of two evaluations."""

    def __init__(self, clock):
        self.clock, self.param_groups = clock, [{"params": ["x"]}]
        self.state = {"x": {"n_iter": 5, "func_evals": 7}}

    def step(self, closure):
        for _ in range(2):
            self.clock.now += 3.0
            closure()
            self.clock.now += 4.0
        self.state["x"] = {"n_iter": 6, "func_evals": 9}


def test_time_is_split_between_closure_and_optimizer():
    clock = VirtualClock()

    def closure():
        clock.now += 10.0
        return torch.tensor(clock.now)

    steps = timed_step(Scripted(clock), closure, clock)
    assert (steps.total, steps.inside, steps.outside) == (34.0, 20.0, 14.0)
    assert (steps.iterations, steps.evaluations) == (1, 2)
    assert steps.times == [13.0, 30.0]
    assert steps.losses == [13.0, 30.0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_counts_are_those_of_the_optimizer(name):
    f = optimizers.Quadratic(30, CPU)
    optimizer = OPTIMIZERS[name]([f.x], max_iter=4)
    assert counts(optimizer) == (0, 0)
    watch = Stopwatch(f.closure, HostClock())
    optimizer.step(watch)
    assert counts(optimizer) == (4, len(watch.spans))


def test_quadratic_has_its_gradient():
    f = optimizers.Quadratic(20, CPU)
    value = f.closure()
    x = f.x.detach().clone().requires_grad_()
    want = (f.h * x * x).sum() / 2
    (grad,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(f.x.grad, grad)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_outside_per_iteration_of_both(search):
    rows = measure([OutsideClosure("LBFGS", 50, 5, search)], CPU, seconds=0.0)
    assert {row.name for row in rows} == OPTIMIZERS.keys()
    for row in rows:
        assert len(row.timing.samples) == timing.MIN_ROUNDS
        assert 0 < row.best < 1
        assert row.correct


def test_what_the_closure_takes_is_not_counted_and_the_rest_is_per_iteration(monkeypatch):
    clock, running = VirtualClock(), Running("torch", OutsideClosure("LBFGS", 50, 5), CPU)

    def closure():
        clock.now += 10.0
        return running.f.closure()

    def slow(watch, step=running.optimizer.step):
        clock.now += 7.0
        return step(watch)

    running.watch = Stopwatch(closure, clock)
    monkeypatch.setattr(running.optimizer, "step", slow)
    timed = timing.Timed([running.advance], inside=running.inside)
    found = timing.interleaved({"x": timed}, clock, seconds=0.0)["x"].per(optimizers.ITERATIONS)
    assert found.samples == (7.0 / optimizers.ITERATIONS,) * timing.MIN_ROUNDS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_ends_early_is_no_measurement(monkeypatch, name):
    monkeypatch.setattr(optimizers.Quadratic, "closure", lambda self: self.x.grad.zero_().sum())
    with pytest.raises(RuntimeError, match=f"{name}: stopped after"):
        Running(name, OutsideClosure("LBFGS", 50, 5), CPU)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from secant.benchmarks import digits

    return digits


@pytest.fixture(scope="module")
def data(digits):
    return digits.load(CPU)


def test_digits_are_split_and_standardised(digits, data):
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    counts = torch.cat([data.train_y, data.test_y]).bincount().tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    spread = data.train_x.double().std(0)
    blank = (data.train_x == 0).all(0)
    assert bool(blank[[0, 32, 39]].all())  # no digit touches these
    torch.testing.assert_close(spread, (~blank).double(), rtol=1e-5, atol=0)
    assert float(data.train_x.double().mean(0).abs().max()) < 1e-6
    again = digits.load(CPU)
    assert all(torch.equal(a, b) for a, b in zip(data, again, strict=True))


def test_both_optimizers_start_at_one_point_and_learn(digits, data):
    runs = {name: digits.train(name, digits.MODELS[0], data, HostClock(), iterations=12) for name in OPTIMIZERS}
    ours, theirs = runs["secant"], runs["torch"]
    assert ours.steps.losses[0] == theirs.steps.losses[0] == pytest.approx(2.4, abs=0.5)
    assert ours.steps.iterations == theirs.steps.iterations == 12
    # The same algorithm: twelve iterations of float32 do not part the losses visibly.
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-2)
    assert ours.loss < 0.1
    assert min(ours.accuracy, theirs.accuracy) > 0.9


def test_images_lost_by_chance(digits):
    """By hand: 3 of 3 lost, 1/8; 3 of 4, 5/16; the 9 of 10 of a fair coin, 11/1024; none lost, for sure."""
    theirs = torch.arange(20) < 12
    assert digits.chance_of_fewer(torch.arange(20) < 9, theirs) == 1 / 8
    assert digits.chance_of_fewer((torch.arange(20) < 9) | (torch.arange(20) == 15), theirs) == 5 / 16
    assert digits.chance_of_fewer((torch.arange(20) < 3) | (torch.arange(20) == 15), theirs) == 11 / 1024
    assert digits.chance_of_fewer(theirs, theirs) == 1.0
    assert digits.chance_of_fewer(torch.arange(20) < 14, theirs) == 1.0


def test_float32_directions_on_recorded_pairs(digits, data):
    pairs = list(digits.recorded_pairs(data, every=6, calls=2))
    # The pair of a call's last step is formed before the call ends.
    assert [s.shape[0] for _, s, _ in pairs] == [6, digits.HISTORY]
    for _, s, y in pairs:
        assert bool(((s * y).sum(-1) > 0).all())
    errors = digits.direction_errors(data)
    assert 0 < errors["secant"] < 1e-5
