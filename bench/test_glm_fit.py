"""pytest-benchmark over `secant.glm.fit` and the solvers of scikit-learn's LogisticRegression, on the same problem.

    pytest bench/test_glm_fit.py --benchmark-group-by=group --benchmark-sort=fullname

Generated rows with feature scales spread as exp(N(0, 1)), float64, C = 1; `correlated` features have singular values
from 1 to 1e-2 besides. `gap` is the objective relative to its minimum (a fit to 1e-10), less one; a fit of `secant`
whose gap is above 1e-7 fails, and so does everybody's if it is negative: then that was no minimum. Peers, of which some
take half a minute, are run once.
SECANT_BENCH_QUICK=1 takes a few thousand rows.
"""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import numpy as np
import pytest

import secant

linear_model = pytest.importorskip("sklearn.linear_model")

QUICK = os.environ.get("SECANT_BENCH_QUICK", "0") == "1"
GAP = 1e-7
SOLVERS = ("newton-cholesky", "newton-cg", "lbfgs")


class Case(NamedTuple):
    """Rows, columns, smallest singular value of the mixing of the features relative to the largest."""

    rows: int
    columns: int
    smallest: float

    @property
    def label(self) -> str:
        """Name of the group."""
        kind = "independent" if self.smallest == 1.0 else "correlated"
        return f"{self.rows} x {self.columns} {kind}"


SHAPES = ((4000, 20), (2000, 60)) if QUICK else ((150_000, 200), (30_000, 900))
CASES = [Case(*shape, smallest) for shape in SHAPES for smallest in (1.0, 1e-2)]


class Group:
    """Features and labels of a case, and the objective at any coefficients."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        n, d = case.rows, case.columns
        scale = np.exp(rng.standard_normal(d))
        self.x = rng.standard_normal((n, d))
        if case.smallest < 1.0:
            q, _ = np.linalg.qr(rng.standard_normal((d, d)))
            self.x = self.x @ (q * np.geomspace(1.0, case.smallest, d)) @ q.T
        self.x *= scale
        w = 2.0 / np.sqrt(d) * rng.standard_normal(d) / self.x[:1000].std(0)
        self.y = (rng.random(n) < 1.0 / (1.0 + np.exp(-(self.x @ w + 0.3)))).astype(float)
        best = secant.glm.fit(self.x, self.y, l2=1.0, tol=1e-10)
        self.best = self.value(best.coef.numpy(), float(best.intercept))

    def value(self, coef: np.ndarray, intercept: float) -> float:
        """Compute the objective, from its definition."""
        z = self.x @ coef + intercept
        return float((np.logaddexp(0.0, z) - self.y * z).sum() + 0.5 * coef @ coef)


def _secant(problem: Group, solver: str):
    result = secant.glm.fit(problem.x, problem.y, l2=1.0, solver=solver)
    return result.coef.numpy(), float(result.intercept), result.n_iter


def _scikit_learn(problem: Group, solver: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = linear_model.LogisticRegression(solver=solver, tol=1e-4, max_iter=300).fit(problem.x, problem.y)
    return model.coef_[0], float(model.intercept_[0]), int(model.n_iter_[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("library", ["secant", "scikit-learn"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_glm_fit(benchmark, group_of, case, library, solver):
    problem = group_of(case)
    fit, rounds = (_secant, 3) if library == "secant" else (_scikit_learn, 1)
    benchmark.group = case.label
    coef, intercept, iterations = benchmark.pedantic(fit, args=(problem, solver), rounds=rounds, warmup_rounds=0)
    gap = problem.value(coef, intercept) / problem.best - 1.0
    benchmark.extra_info.update(iterations=iterations, gap=gap)
    assert gap >= -1e-12  # the rounding of a sum
    assert library != "secant" or gap <= GAP
