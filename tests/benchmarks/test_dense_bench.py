"""The case of a dense quasi-Newton step."""

import torch

from secant.benchmarks.case import everything, no_compile
from secant.benchmarks.dense import DenseStep, bfgs_step
from secant.benchmarks.families import lbfgs
from secant.benchmarks.measure import measure

CPU = torch.device("cpu")


def test_bytes_and_operations():
    case = DenseStep("dense_update", 10)
    assert case.nbytes == (2 * 55 + 3 * 10 + 4 * 10) * 8
    assert case.limit_bytes == 2 * 55 * 8
    assert case.flops == 4 * 100 + 250
    assert DenseStep("dense_update", 5000) in [x for group in lbfgs.groups(CPU) for x in group]


def test_the_formula_in_torch_is_bfgs():
    n = 5
    a = torch.diag(torch.linspace(1, 3, n, dtype=torch.float64))
    h, prev = torch.eye(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    d = -prev.clone()
    s = 0.5 * d
    g = prev + a @ s
    y = g - prev
    bfgs_step(h, g, prev, d, 0.5)
    left = torch.eye(n, dtype=torch.float64) - torch.outer(s, y) / (s @ y)
    want = left @ left.T + torch.outer(s, s) / (s @ y)
    assert torch.allclose(h, want, rtol=1e-13, atol=1e-14)
    assert torch.allclose(d, -want @ g, rtol=1e-13, atol=1e-14)
    assert torch.equal(prev, g)


def test_every_contender_is_right_and_goes_round():
    for dtype in (torch.float32, torch.float64):
        case = DenseStep("dense_update", 60, dtype)
        problem = case.problem(CPU)
        found = case.contenders(problem, no_compile)
        assert [c.name for c in found] == ["cpu", "reference", "eager"]
        for contender in found:
            check = contender.check(problem)
            assert check.error <= check.bound < 0.1, contender.name
            with contender.timed.around():
                ends = [[call().clone() for call in contender.timed.calls] for _ in range(12)]
            # H y = s from then on: the same two directions for ever, but for rounding.
            assert torch.allclose(ends[-1][0], ends[2][0], rtol=1e-3, atol=1e-3)
            assert torch.allclose(ends[-1][0], -ends[-1][1], rtol=1e-3, atol=1e-3)
    assert "compiled" in [c for c in case.names(CPU) if everything(case, c)]


def test_it_is_measured():
    rows = measure([DenseStep("dense_update", 40)], CPU, seconds=0.0, wanted=no_compile)
    assert all(row.seconds for row in rows)
    assert {row.name for row in rows} >= {"cpu", "eager", DenseStep.LIMIT}
