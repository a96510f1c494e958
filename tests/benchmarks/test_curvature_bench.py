"""The benchmark of `secant.curvature`: its counts, its check, its contenders, and its bars."""

from __future__ import annotations

import math

import pytest
import torch

from secant.benchmarks import peers
from secant.benchmarks.case import Row, find, no_compile
from secant.benchmarks.families import curvature
from secant.benchmarks.families.curvature import Case, Problem
from secant.benchmarks.measure import measure
from secant.benchmarks.timing import Timing

CPU = torch.device("cpu")
CASES = [case for group in curvature.groups(CPU, quick=True) for case in group]


def test_counts_are_those_of_the_layers():
    parameters = 65 * 256 + 257 * 256 + 257 * 10
    assert Problem(Case("Hessian", 3, 2), CPU).v.shape == (parameters, 2)
    assert Case("Hessian", 3, 2).nbytes == (3 * 64 + 5 * parameters) * 4
    first, others = 64 * 256, 256 * 256 + 256 * 10
    assert Case("Hessian", 3, 2).flops == 2 * 3 * (4 * first + 12 * others)
    assert Case("GGN", 3).flops == 3 * (4 * first + 8 * others)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.k}")
def test_every_contender_is_right(case):
    problem = case.problem(CPU)
    found = case.contenders(problem, no_compile)
    assert [one.name for one in found] == [name for name in case.names(CPU) if name != "compiled"]
    for one in found:
        check = one.check(problem)
        assert 0 < check.error <= check.bound, one.name
        wrong = curvature._flat(one.probe()).clone()
        wrong[7, -1] += 1e-3 * problem.exact.norm()  # one entry of the last vector
        assert case.judge(problem, one, wrong).excess > 1
        wrong[7, -1] = math.nan
        assert case.judge(problem, one, wrong).excess == math.inf


def test_the_vectors_are_those_of_the_parameters():
    problem = Problem(Case("Hessian", 4, 3), CPU)
    parts = problem.parts()
    assert [part.shape for part in parts] == [(3, *p.shape) for p in problem.params]
    assert torch.equal(curvature._flat(parts), problem.v)
    assert torch.equal(curvature._flat([part[1] for part in parts]), problem.v[:, 1:2])


def test_several_vectors_are_compared_with_one_after_the_other():
    case = Case("Hessian", 8, 3)
    rows = measure([case], CPU, seconds=0.0, wanted=lambda case, name: name in ("secant", "matvecs"))
    assert [(row.name, row.kind) for row in rows] == [("secant", "backend"), ("matvecs", "peer")]
    assert all(row.correct and row.seconds > 0 for row in rows)


def test_bars_are_of_one_vector_at_512_rows():
    case = Case("Hessian", 512)
    times = {"secant": 1.0, "compiled": 1.2, "double backward": 1.4}
    rows = [Row(case, x, "backend" if x == "secant" else "peer", Timing((t,)), 0.0, 1.0) for x, t in times.items()]
    assert [(bar.target, bar.measured, bar.met) for bar in curvature.bars(rows, CPU)] == [
        (1.0, 1.2, True),
        (1.5, 1.4, False),
    ]
    assert curvature.bars([row._replace(case=CASES[0]) for row in rows], CPU) == []
    assert find(rows, case).name == "secant"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: f"{case.k}")
def test_compiled_products_are_right(case):
    problem = case.problem(CPU)
    [compiled] = case.contenders(problem, lambda case, name: name == "compiled")
    check = compiled.check(problem)
    assert check.error <= check.bound


def test_every_shape_of_a_peer_is_compiled(monkeypatch):
    """More shapes than torch would compile of one function before it goes on in eager mode without a word."""
    shapes, compile = [], torch.compile

    def backend(module, inputs):
        shapes.append(inputs[0].shape)
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(f, dynamic=dynamic, backend=backend))
    call = peers.compiled(lambda x: x.sin() + 1)
    for n in range(2, 22):
        call(torch.ones(n))
    assert shapes == [(n,) for n in range(2, 22)]
