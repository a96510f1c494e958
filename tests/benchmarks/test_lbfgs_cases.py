from __future__ import annotations

import math
import sys

import pytest
import torch

import secant
from secant import backends
from secant.benchmarks import machine, report
from secant.benchmarks import measure as measuring
from secant.benchmarks.case import everything, find, no_compile, ratios
from secant.benchmarks.families import lbfgs
from secant.benchmarks.families.lbfgs import LIMIT, Case, Problem
from secant.benchmarks.measure import copies, fits, measure

CPU = torch.device("cpu")


def test_bytes_count_the_history_twice_and_each_vector_once():
    n, m = 100, 10
    assert Case("two_loop", n).nbytes == 4 * m * n * 4 + 2 * n * 4
    assert Case("direction", n, storage=torch.bfloat16).nbytes == 4 * m * n * 2 + 2 * n * 4
    # A step reads g, g_prev and d, writes g_prev and d, and a pair into the ring.
    assert Case("step", n, storage=torch.bfloat16).nbytes == 4 * m * n * 2 + 5 * n * 4 + 2 * n * 2
    assert Case("direction", n, batch=3).nbytes == 3 * Case("direction", n).nbytes


@pytest.mark.parametrize("op", ["two_loop", "direction", "step"])
@pytest.mark.parametrize("batch", [0, 6])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_every_contender_is_right(op, batch, storage):
    case = Case(op, 70, m=5, batch=batch, storage=storage)
    problem = Problem(case, CPU)
    found = case.contenders(problem, no_compile)
    assert [c.name for c in found if c.kind == "backend"] == case.serving(CPU)
    for contender in found:
        check = contender.check(problem)
        assert check.error <= check.bound < 1e-3, contender.name


def test_check_tells_float32_from_a_lower_precision():
    case = Case("direction", 500, storage=torch.bfloat16)
    problem = Problem(case, CPU)
    own = case.contenders(problem, lambda case, name: name == "reference")[0]
    unrounded = case.replace(storage=torch.float32)
    assert own._replace(case=unrounded).check(problem).excess > 10  # against pairs that were not rounded to bfloat16


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_timed_steps_are_accepted_and_go_round(name):
    case = Case("step", 40, m=3)
    problem = Problem(case, CPU)
    calls = case.contenders(problem, lambda case, other: other == name)[0].timed.calls
    # The same steps in float64, by the reference: what is timed goes on from what it wrote itself.
    wide = Problem(Case("step", 40, m=3, dtype=torch.float64, storage=torch.float64), CPU)
    wide.g, wide.s, wide.y = problem.g.double(), problem.s.double(), problem.y.double()
    with secant.use_backend("reference"):
        exact, _ = lbfgs._history_calls(wide.case, wide)
        for i in range(24):
            want = exact[i % len(exact)]()
            torch.testing.assert_close(calls[i % len(calls)]().double(), want, rtol=1e-4, atol=1e-4)


def test_measure_times_every_contender_once():
    cases = [Case("direction", 60, m=4), Case("direction", 60, m=4, storage=torch.bfloat16)]
    rows = measure(cases, CPU, seconds=0.0, wanted=no_compile)
    names = cases[0].serving(CPU)
    limit = [(cases[0], LIMIT)] if machine.can_read() else []
    expected = (
        [(cases[0], name) for name in [*names, "eager", "compact"]] + [(cases[1], name) for name in names] + limit
    )
    assert [(row.case, row.name) for row in rows] == expected
    for row in rows:
        assert 0 < row.best <= row.seconds < 1
        moved = 2 * row.case.history_bytes if row.name == LIMIT else row.case.nbytes
        assert row.bytes_per_second == pytest.approx(moved / row.seconds)


def test_measure_rejects_cases_that_share_no_problem():
    with pytest.raises(ValueError, match="one n, m, batch and dtype"):
        measure([Case("direction", 60), Case("direction", 61)], CPU, seconds=0.0)


@pytest.mark.parametrize("value", [1.01, math.nan])
def test_a_wrong_answer_has_no_speed(monkeypatch, value):
    case = Case("two_loop", 50)
    auto = backends.load("lbfgs", case.serving(CPU)[0])
    right = auto.two_loop

    def wrong(grad, s, y, gamma, out):
        right(grad, s, y, gamma, out)
        out[..., 0] *= value

    monkeypatch.setattr(auto, "two_loop", wrong)
    monkeypatch.setattr(secant.ops.lbfgs, "_plain", lambda: None)  # no other way to the answer
    rows = measure([case], CPU, seconds=0.0, wanted=no_compile)
    assert (rows[0].seconds, rows[0].best, rows[0].bytes_per_second) == (None, None, None)
    assert rows[0].note == "wrong answer"
    assert not rows[0].correct
    assert ratios(rows, rows[0]) == {}
    assert any("wrong answer" in line for line in report.losses(rows))
    eager = find(rows, case, "eager")
    assert eager.seconds is not None


def test_a_peer_that_cannot_run_here_fails_alone(monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(lbfgs.peers, "compiled", broken)
    case = Case("two_loop", 50)
    rows = measure([case], CPU, seconds=0.0)
    failed = find(rows, case, "compiled")
    assert (failed.seconds, failed.note) == (None, "failed: RuntimeError")
    assert "compiled" not in ratios(rows, rows[0])
    assert {"eager", "compact"} == set(ratios(rows, rows[0]))
    assert not any("wrong answer" in line for line in report.losses(rows))


def test_auto_is_timed_as_a_user_calls_it_and_the_rest_by_choice(monkeypatch):
    case = Case("two_loop", 30)
    seen = []
    problem = Problem(case, CPU)
    for contender in case.contenders(problem, lambda case, name: name in backends.ORDER):
        with contender.timed.around():
            seen.append((contender.name, secant.current_backend()))
    first, *rest = case.serving(CPU)
    assert seen == [(first, "auto"), *((name, name) for name in rest)]


def test_the_reference_is_spared_long_vectors():
    long = Case("two_loop", 10**7)
    assert "reference" not in long.serving(CPU)
    assert "reference" in Case("two_loop", 10**6).serving(CPU)


def test_copies_outgrow_a_cache(monkeypatch):
    case = Case("two_loop", 10**5)  # 8 MB of history
    assert copies(case, CPU) == 1
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 50 * 10**6)
    assert copies(case, CPU) == 13
    assert copies(Case("two_loop", 1000), CPU) == Case.MAX_COPIES
    assert copies(Case("two_loop", 10**8), CPU) == 1


def test_cases_fit_into_the_memory_that_they_need(monkeypatch):
    cases = [Case("step", 10**6), Case("step", 10**6, storage=torch.bfloat16)]
    # Of its own each backend has 80 MB and 40 MB of history, and the problem alone 80 MB.
    needed = 80e6 + 120e6 * len(cases[0].serving(CPU))
    for free, expected in ((needed, False), (4 * needed, True), (None, True)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        assert fits(cases, CPU) is expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is free")
def test_free_memory_is_known():
    assert 1 << 20 < machine.free_bytes(CPU) < 1 << 50


def test_bandwidth_is_positive_and_described():
    found = machine.bandwidth(CPU, nbytes=1 << 22)
    assert 1e8 < found.bytes_per_second < 1e13
    assert found.method.startswith("read by")


def test_bandwidth_without_the_extension(monkeypatch):
    monkeypatch.setattr(machine, "_cpu", None)
    found = machine.bandwidth(CPU, nbytes=1 << 22)
    assert 1e8 < found.bytes_per_second < 1e13
    assert found.method == "read by torch.sum"
    assert not machine.can_read()


def test_what_cannot_be_captured_fails_alone(monkeypatch):
    case = Case("two_loop", 50)
    monkeypatch.setattr(measuring, "has_graphs", lambda device: True)
    monkeypatch.setattr(measuring, "captured", lambda timed, device: "not captured: RuntimeError")
    rows = measure([case], CPU, seconds=0.0, wanted=lambda case, name: name in ("cpu", "eager"))
    assert [(row.name, row.note) for row in rows] == [("cpu", ""), ("eager", ""), ("cpu", "not captured: RuntimeError")]
    assert rows[2].seconds is None
    assert report.losses(rows) == []


def test_short_problems_and_those_of_the_published_figures_are_replayed():
    def captured(case):
        return {one.name for one in case.contenders(Problem(case, CPU), everything) if one.capturable}

    case = Case("two_loop", 50)
    assert captured(case) == {*case.serving(CPU), "compiled", "compact"}  # the eager loop goes through the host
    assert captured(Case("step", 50)) == set(case.serving(CPU))
    assert captured(Case("direction", lbfgs.GRAPH_N + 1, m=2)) == set()
    published = lbfgs.published()[1].replace(n=lbfgs.PUBLISHED[1])
    assert captured(published) == set(published.serving(CPU))


@pytest.mark.slow
def test_compiled_steps_are_those_of_torch():
    """The same pairs and, but for the rounding of dot products, the same directions, call after call."""
    case = Case("step", 500, m=4)
    problem = Problem(case, CPU)
    compiled = next(one for one in case.contenders(problem, everything) if one.name == "compiled")
    check = compiled.check(problem)
    assert check.error <= check.bound < 1e-3
    # In float64: gradients that differ by a part in 256 make rounding 256 times as large, from call to call.
    case = case.replace(dtype=torch.float64, storage=torch.float64)
    both = {one.name: one.timed.calls for one in case.contenders(Problem(case, CPU), everything)}
    for _ in range(6):
        for one, other in zip(both["compiled"], both["eager"], strict=True):
            torch.testing.assert_close(one(), other(), rtol=1e-9, atol=1e-9)


def test_full_runs_have_every_op_over_the_whole_range():
    every = [case for group in lbfgs.groups(CPU, full=True) for case in group]
    for op in ("two_loop", "direction", "step"):
        flat = {case.n for case in every if case.series and case.op == op}
        assert flat == {10**2, 10**3, 10**4, 10**5, 10**6, 3 * 10**6, 10**7}
    assert {case for group in lbfgs.groups(CPU) for case in group} < set(every)
    assert len(every) == len(set(every))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_steps_go_round_and_read_every_row(storage):
    """However often: the pair is accepted, nothing grows, and each row has a coefficient that is not zero."""
    from secant.kernels.lbfgs import cpu

    case = Case("step", 1000, storage=storage)
    states, lengths = [], []
    original = secant.LBFGSHistory.step

    def watch(history, grad, prev_grad, direction, t):
        stats = original(history, grad, prev_grad, direction, t)
        assert float(stats.accepted) == 1.0
        states[:] = [history._state]
        lengths.append(float(direction.norm()))
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secant.LBFGSHistory, "step", watch)
        calls, _ = lbfgs._history_calls(case, Problem(case, CPU))
        for i in range(100):
            calls[i % len(calls)]()
    assert max(lengths[20:]) < 4 * min(lengths[20:])
    m = case.m
    dots, coefs = torch.empty(1, 4 * m + 8, dtype=torch.float64), torch.empty(1, 2 * m + 2, dtype=torch.float64)
    cpu.dots(states[0], None, torch.randn(1, 1000), dots)
    cpu.solve(states[0], dots, coefs, 0.0, False, True)
    assert bool((coefs[0, 2:] != 0).all())
