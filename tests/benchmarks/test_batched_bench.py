"""Many problems at once: the problems and their derivatives, what is counted of the ends, and the bars."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from secant.benchmarks import batched_problems as problems
from secant.benchmarks.case import Row, find
from secant.benchmarks.families import batched as family
from secant.benchmarks.families.batched import Ends, Many, Rounds, bars, measured
from secant.benchmarks.report import as_json
from secant.benchmarks.timing import Timing

CPU = torch.device("cpu")
F64 = torch.float64


def rows(n, seed=0, count=5):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=F64)


FUNCTIONS = {
    "Rosenbrock": (problems.rosenbrock, problems.rosenbrock_value_grad, problems.rosenbrock_one, rows(6), ()),
    "arm": (
        problems.reach,
        problems.reach_value_grad,
        problems.reach_one,
        rows(7),
        (problems.hand(rows(7, 1)),),
    ),
    "clusters": (
        problems.lennard_jones,
        problems.lennard_jones_value_grad,
        problems.lennard_jones_one,
        problems.clusters(5, 6),
        (),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_closed_forms_are_the_derivatives(name):
    """Sums of some hundred terms that lose at most a digit or two: to 1e-10 of the largest."""
    fun, both, one, x, more = FUNCTIONS[name]
    leaf = x.clone().requires_grad_()
    value = fun(leaf, *more)
    (g,) = torch.autograd.grad(value.sum(), leaf)
    close = {"rtol": 1e-10, "atol": 1e-10 * float(g.abs().max())}
    for found, want in zip(both(x, *more), (value.detach(), g), strict=True):
        torch.testing.assert_close(found, want, **close)
    for i in range(len(x)):
        single, gradient = one(x[i].numpy(), *(part[i].numpy() for part in more))
        torch.testing.assert_close(torch.tensor(single, dtype=F64), value[i].detach(), **close)
        torch.testing.assert_close(torch.from_numpy(gradient), g[i], **close)
    alone = torch.stack([both(x[i : i + 1], *(part[i : i + 1] for part in more))[0][0] for i in range(len(x))])
    assert torch.equal(alone, both(x, *more)[0])


def test_peaks_have_their_derivatives_and_their_noise():
    own = problems.peaks(400, 9)
    parameters = [x.clone().requires_grad_() for x in own.true[:3, :, None].expand(3, 5, 81).unbind(1)]
    values = problems.peak((own.x, own.y), *parameters)
    want = torch.stack(torch.autograd.grad(values.sum(), parameters), -1)
    torch.testing.assert_close(problems.peak_jac((own.x, own.y), *own.true[:3, :, None].unbind(1)), want)
    one = problems.peak_one((own.x.numpy(), own.y.numpy()), *own.true[0].tolist())
    torch.testing.assert_close(torch.from_numpy(one), own.clean[0])
    off = (own.data - own.clean) / own.clean.sqrt()
    assert abs(float(off.mean())) < 4.0 / off.numel() ** 0.5
    # The variance of chi^2 of counts near 10: 2 + 1 / 10 a number.
    assert abs(float(off.square().mean()) - 1.0) < 4.0 * (2.1 / off.numel()) ** 0.5


def test_the_arm_is_rigid_and_as_long_as_it_is_built():
    found = problems.hand(torch.zeros(1, 7, dtype=F64))[0]
    torch.testing.assert_close(found[:3], torch.tensor([0.0, 0.0, 1.266], dtype=F64), rtol=0, atol=1e-12)
    axes = problems.hand(rows(7))[:, 3:].view(5, 3, 3)
    torch.testing.assert_close(axes @ axes.mT, torch.eye(3, dtype=F64).expand(5, 3, 3), rtol=0, atol=1e-14)
    own = problems.goals(50)
    assert float(problems.reach(own.known, own.goal).max()) == 0.0
    assert bool((own.known.abs() <= torch.tensor(problems.LIMITS)).all())


@pytest.mark.parametrize("cases", family.groups(CPU, quick=True), ids=lambda cases: cases[0].op)
def test_a_short_run(cases):
    [case] = cases
    pytest.importorskip("scipy")
    found = measured(cases, CPU, seconds=0.02, wanted=lambda case, name: name not in ("botorch", "jaxopt"))
    ours = find(found, case)
    assert ours.name == "secant"
    assert all(row.correct and row.seconds > 0.0 for row in found)
    assert {row.kind for row in found} == {"backend", "peer"}
    if isinstance(case, Rounds):
        assert ours.case.nbytes == 8 * 50 * 10 * (2 * 5 + 10)
        return
    assert all(row.figures["problems"] == family.FEW for row in found)
    if case.op in ("Rosenbrock", "Lennard-Jones clusters"):
        assert ours.figures["wasted"] < 0.05
    assert as_json(found, bars(found, CPU, 1e10), None)["bars"] == []  # bars are of full sizes


def test_a_gpu_is_filled_and_does_not_wait_for_loops():
    cases = [case for [case] in family.groups(torch.device("cuda"))]
    assert {case.op for case in cases} == {*family.TASKS, family.ROUND.op}
    assert all(case.count == family.FILLED for case in cases if isinstance(case, Many))
    assert family.COMPARED["cuda"] < family.COMPARED["cpu"]


def test_a_loop_is_timed_on_a_part_and_scaled(monkeypatch):
    monkeypatch.setattr(family, "TIMED", {"cpu": 3})
    monkeypatch.setattr(family, "COMPARED", {"cpu": 4})
    solved = []

    class Counted(family.Task):
        def solve(self, name, count):
            solved.append((name, count))
            return Ends(torch.zeros(count, 1), torch.zeros(count), torch.ones(count, dtype=torch.bool))

    monkeypatch.setattr(family, "TASKS", {"x": Counted})
    found = measured([Many("x", 30, 1)], CPU, seconds=0.0)
    assert [(row.name, row.units) for row in found] == [("secant", 30), ("secant, autograd", 30), ("scipy", 3)]
    assert solved[:3] == [("secant", 30), ("secant, autograd", 30), ("scipy", 4)]
    assert set(solved[3:]) == {("secant", 30), ("secant, autograd", 30), ("scipy", 3)}
    assert found[2].note == "timed on 3 of 30 problems, scaled"


def test_what_ends_wrong_has_no_time(monkeypatch):
    class Wrong(family.Task):
        PEERS = MappingProxyType({})

        def solve(self, name, count):
            return Ends(torch.zeros(count, 1), torch.zeros(count), torch.arange(count) > 0)

    monkeypatch.setattr(family, "TASKS", {"x": Wrong})
    row = measured([Many("x", 4, 1)], CPU, seconds=0.0)[0]
    assert row.timing is None
    assert (row.error, row.tolerance, row.note) == (0.25, 0.0, "does not solve them")
    assert (row.figures["converged"], row.figures["problems"]) == (3, 4)


def test_values_are_compared_where_both_converge():
    task = family.Rosenbrock(5, 2, CPU, 0)
    good = torch.tensor([True, True, True, True, False])
    task.known = Ends(torch.zeros(5, 2), torch.tensor([0.0, 1e-9, 1e-7, 3.9, 5.0], dtype=F64), good)
    own = Ends(torch.zeros(5, 2), torch.zeros(5, dtype=F64), torch.ones(5, dtype=torch.bool))
    found = task.figures(own)
    assert (found["compared"], found["differ"], found["elsewhere"]) == (4, 2, 1)
    assert (found["converged"], found["converged_compared"], found["scipy_converged"]) == (5, 5, 4)
    assert (found["best"], found["scipy_best"]) == (5, 3)


def test_a_loop_keeps_the_digits_of_its_values():
    """In float32 a value near 4 would be off by 1e-7."""
    pytest.importorskip("scipy")
    task = family.Rosenbrock(6, 10, CPU, 0)
    ends = task.solve("scipy", 6)
    assert ends.value.dtype == F64
    torch.testing.assert_close(problems.rosenbrock(ends.x), ends.value, rtol=1e-12, atol=1e-14)


def test_bars_of_a_full_run():
    def row(case, name, kind, seconds, **figures):
        return Row(case, name, kind, Timing((seconds,)), 1e-7, 1e-6, "", 1, (), figures)

    known = {"differ": 2, "elsewhere": 2, "converged_compared": 999, "scipy_converged": 1000, "wasted": 0.01}
    known |= {"met_compared": 0.9, "scipy_met": 0.8, "best_compared": 30, "scipy_best": 40}
    cases = (family.ROSENBROCK, family.PEAKS, family.ARM, family.CLUSTERS)
    found = [
        row(case, *who, **known) for case in cases for who in (("secant", "backend", 1.0), ("scipy", "peer", 60.0))
    ]
    found += [row(family.ROUND, "secant", "backend", 2e-3), row(family.ROUND, "torch ops", "peer", 3e-2)]
    bytes_per_second = family.ROUND.nbytes / 1e-3
    met = {bar.measure: (bar.measured, bar.met) for bar in bars(found, CPU, bytes_per_second)}
    values = [value for value, _ in met.values()]
    assert values == [60.0] * 4 + [2, 0, -1, 0.01, 1e-7, 0.9 / 0.8, 0.75, pytest.approx(2.0), pytest.approx(15.0)]
    assert [is_met for _, is_met in met.values()] == [
        True, False, True, True, False, True, False, True, True, True, False, True, True,
    ]  # fmt: skip
    assert bars([], CPU, 1.0) == []
