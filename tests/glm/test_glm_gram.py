"""Gram matrices, moments and what is made of them, against dense float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secant.glm.gram import softmax_gram, weighted_gram, weighted_moments
from secant.glm.objective import Objective
from secant.glm.preconditioners import CholeskyPreconditioner, DiagonalPreconditioner

EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def rows(n, d, dtype=torch.float64, kind="dense", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    if kind == "csr":
        return torch.where(torch.rand(n, d, generator=g) < 0.3, x, 0.0).to_sparse_csr()
    if kind == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).reshape(2 * n, d)[::2]
    return x


def dense(x, intercept):
    x = (x.to_dense() if x.layout is torch.sparse_csr else x).double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if intercept else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "csr", "strided"])
# One row, one column, fewer rows than columns, several panels of columns, several blocks of rows.
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 40), (300, 257), (30_000, 33), (2500, 520)])
def test_weighted_gram(shape, kind, dtype):
    n, d = shape
    x = rows(n, d, dtype, kind)
    weight = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    for intercept in (False, True):
        full = dense(x, intercept)
        want = full.t() @ (weight.double()[:, None] * full)
        got = weighted_gram(x, weight, intercept=intercept)
        assert got.dtype is torch.float64
        # Every entry is a sum of n products: n eps times the sum of their magnitudes.
        bound = (n + 2) * EPS[dtype] * (full.abs().t() @ (weight.double()[:, None] * full.abs()))
        assert bool(((got - want).abs() <= bound + 1e-300).all())
        assert bool(((got - got.t()).abs() <= 2 * bound + 1e-300).all())


@pytest.mark.parametrize("kind", ["dense", "csr"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (50, 3, 4), (3000, 40, 5)])
def test_softmax_gram(shape, kind, weighted, intercept):
    n, d, k = shape
    x = rows(n, d, kind=kind)
    g = torch.Generator().manual_seed(2)
    probs = torch.softmax(torch.randn(n, k, generator=g, dtype=torch.float64), 1)
    c = torch.rand(n, generator=g, dtype=torch.float64) if weighted else None
    full = dense(x, intercept)
    by_row = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    if weighted:
        by_row *= c[:, None, None]
    want = torch.einsum("nj,nab,nl->jalb", full, by_row, full)
    got = softmax_gram(x, probs, c, intercept=intercept)
    assert torch.allclose(got, want, rtol=0.0, atol=n * 2.3e-16 * 20)


@pytest.mark.parametrize("kind", ["dense", "csr", "strided"])
@pytest.mark.parametrize("columns", [None, 3])
def test_weighted_moments(kind, columns):
    x = rows(4000, 150, kind=kind)
    weight = torch.rand(4000, *(() if columns is None else (columns,)), dtype=torch.float64)
    total, first, second = weighted_moments(x, weight)
    full = dense(x, False)
    assert torch.allclose(total, weight.sum(0), rtol=1e-13)
    assert torch.allclose(first, full.t() @ weight, rtol=0.0, atol=1e-10)
    assert torch.allclose(second, (full * full).t() @ weight, rtol=1e-12)


def objective(x, y, loss="logistic", **options):
    total = float(len(y))
    return Objective(x, y, loss, 1.0, None, options.get("l2", 0.0), options.get("intercept", True), 0, total)


def test_diagonal_makes_uncorrelated_features_round():
    """T^T H T is the identity when the centred features are uncorrelated: here exactly, as they are orthogonal."""
    d = 4
    x = torch.tensor(np.array([[(i >> j) & 1 for j in range(d)] for i in range(2**d)]), dtype=torch.float64)
    x = (2.0 * x - 1.0) * torch.tensor([1e-3, 1.0, 50.0, 1e4]) + torch.tensor([0.0, 5.0, -1e3, 2e4])
    problem = objective(x, torch.zeros(2**d, dtype=torch.float64), "squared")
    point = problem.evaluate(problem.zeros())
    t = DiagonalPreconditioner(problem, point)
    basis = torch.eye(d + 1, dtype=torch.float64)
    product = torch.stack([t.to_u(problem.hvp(point, t.to_theta(e))) for e in basis])
    # Centring cancels (mean / deviation)^2 <= 400 of 16 digits.
    assert torch.allclose(product, basis, atol=1e-11)
    for e in basis:
        assert torch.allclose(t.from_theta(t.to_theta(e)), e, atol=1e-11)
        assert torch.allclose(t.solve(e), t.to_theta(t.to_u(e)))
        # <T^T g, u> = <g, T u>
        assert torch.allclose(t.to_u(basis[2]) @ e, basis[2] @ t.to_theta(e))


def test_factor_is_exact_whatever_the_scales_and_means():
    scale = torch.logspace(-4, 4, 12, dtype=torch.float64)
    x = rows(200, 12) * scale + 1e4 * scale.flip(0) ** 0.5 * scale
    full = dense(x, True)
    gram = full.t() @ full
    factor = CholeskyPreconditioner(gram, 1, 2.3e-16)
    assert factor.exact
    want = torch.linspace(-1, 1, 13, dtype=torch.float64) / torch.cat([scale, torch.ones(1, dtype=scale.dtype)])
    # Means of up to 1e6 deviations: centring cancels twelve of sixteen digits.
    got = x @ (factor.solve(gram @ want) - want)[:12]
    assert float((got - got.mean()).abs().max()) < 1e-2


@pytest.mark.parametrize("intercepts", [0, 1, 3])
def test_factor_is_the_inverse(intercepts):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40, 9, generator=g, dtype=torch.float64)
    gram = a.t() @ a
    factor = CholeskyPreconditioner(gram, intercepts, 2.3e-16)
    assert factor.exact
    inverse = torch.stack([factor.solve(e) for e in torch.eye(9, dtype=torch.float64)])
    assert torch.allclose(inverse @ gram, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert factor.solve(torch.ones(3, 3)).dtype is torch.float32


@pytest.mark.parametrize("intercepts", [0, 1])
def test_factor_of_a_singular_matrix_is_positive_definite(intercepts):
    a = rows(50, 6)
    a = torch.cat([a, a[:, :2] @ torch.ones(2, 1, dtype=a.dtype), 0 * a[:, :1], torch.ones(50, 1, dtype=a.dtype)], 1)
    factor = CholeskyPreconditioner(a.t() @ a, intercepts, 2.3e-16)
    assert not factor.exact
    inverse = torch.stack([factor.solve(e) for e in torch.eye(9, dtype=torch.float64)])
    assert torch.allclose(inverse, inverse.t(), rtol=1e-6, atol=1e-6 * float(inverse.abs().max()))
    assert float(torch.linalg.eigvalsh(0.5 * (inverse + inverse.t()))[0]) > 0.0
    # On the range it still inverts.
    r = a.t() @ a @ torch.arange(9, dtype=torch.float64)
    assert torch.allclose(a.t() @ (a @ factor.solve(r)), r, rtol=1e-6)


def test_factor_of_what_is_not_finite_is_harmless():
    factor = CholeskyPreconditioner(torch.full((3, 3), torch.inf, dtype=torch.float64), 1, 2.3e-16)
    assert not factor.exact
    assert torch.equal(factor.solve(torch.ones(3, dtype=torch.float64)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [7.0, 1e6 / 3.0])
def test_diagonal_of_a_constant_column_is_no_division_by_rounding(value):
    """What centring leaves of it is rounding; as a curvature that would make steps of 1e8 along nothing."""
    x = torch.cat([rows(1000, 2), torch.full((1000, 1), value, dtype=torch.float64)], 1)
    problem = objective(x, torch.zeros(1000, dtype=torch.float64), "squared")
    t = DiagonalPreconditioner(problem, problem.evaluate(problem.zeros()))
    unit = torch.eye(4, dtype=torch.float64)[2]
    assert 0.0 < float(t.solve(unit)[2]) <= 10.0 / (1000 * value**2)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sample_estimates_the_objective(weighted):
    x, g = rows(40_000, 3), torch.Generator().manual_seed(3)
    y = (torch.rand(40_000, generator=g) < 0.3).double()
    c = torch.rand(40_000, generator=g, dtype=torch.float64) if weighted else None
    total = float(c.sum()) if weighted else 40_000.0
    whole = Objective(x, y, "logistic", 1.0, c, 2.0, True, 0, total)
    part = whole.sample(8)
    assert part.rows == 5000
    assert part.x.data_ptr() == x.data_ptr()
    assert float(part.sample_weight.sum()) == pytest.approx(total, rel=1e-12)
    theta = torch.tensor([0.3, -0.2, 0.1, -0.5], dtype=torch.float64)
    full, estimate = whole.evaluate(theta), part.evaluate(theta)
    # 5000 rows of losses of deviation about 0.5 around 0.6: four standard errors are 5%.
    assert estimate.value == pytest.approx(full.value, rel=0.05)
    assert torch.allclose(part.gram(estimate), whole.gram(full), rtol=0.0, atol=0.06 * float(whole.gram(full).max()))
