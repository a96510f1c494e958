"""The recurrence, its quadrature, and eigenpairs where the start sees too little."""

from __future__ import annotations

import pytest
import torch

from secant.solvers.lanczos import Lanczos, eigenpairs


def _symmetric(eigenvalues, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return (q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ q.T).to(dtype)


def _start(p, n, dtype=torch.float64):
    return torch.randn(p, n, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relation_and_orthogonality(dtype):
    n, m, eps = 80, 50, torch.finfo(dtype).eps
    a = _symmetric(torch.logspace(-6, 0, n), dtype)
    run = Lanczos(lambda v: v @ a, _start(3, n, dtype), m)
    run.advance(20)
    run.advance(30)
    for i in range(3):
        q = run.basis[i, :m].double()
        # Twice is enough: to a small multiple of the rounding of a sum of n products.
        assert (q @ q.T - torch.eye(m)).abs().max() < 10 * n**0.5 * eps
        t = torch.diag(run.alpha[i]) + torch.diag(run.beta[i, :-1], 1) + torch.diag(run.beta[i, :-1], -1)
        rest = a.double() @ q.T - q.T @ t
        rest[:, -1] -= run.beta[i, -1] * run.basis[i, m].double()
        assert rest.abs().max() < 10 * n**0.5 * eps


def test_quadrature_is_exact_to_degree_2m_minus_1():
    n, m = 30, 5
    a = _symmetric(torch.linspace(-1, 2, n))
    start = _start(1, n)
    run = Lanczos(lambda v: v @ a, start, m)
    run.advance(m)
    values, vectors = (x[0] for x in run.ritz())
    v = (start / start.norm())[0]
    power = v
    for degree in range(2 * m + 1):
        got, want = float((vectors[0] ** 2 * values**degree).sum()), float(v @ power)
        if degree < 2 * m:
            assert got == pytest.approx(want, abs=1e-12 * 2**degree)
        else:
            assert abs(got - want) > 1e-6
        power = a @ power


def test_a_step_beyond_the_subspace_leaves_zeros():
    a = _symmetric([1.0] * 5 + [2.0] * 5)
    run = Lanczos(lambda v: v @ a, _start(2, 10), 6)
    run.advance(6)
    assert (run.beta[:, 0] > 0.1).all()
    assert (run.beta[:, 1:] == 0).all()
    assert (run.alpha[:, 2:] == 0).all()
    values, vectors = run.ritz()
    weights = vectors[:, 0] ** 2
    carried = [values[i][weights[i] > 1e-12].tolist() for i in range(2)]
    assert carried == [pytest.approx([1.0, 2.0])] * 2


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        [1.0] * 12,
        [0.0] * 12,
        [0.0] * 40 + [5.0],
        [5.0, 5.0, 5.0] + [0.0] * 30 + [-7.0, -7.0],
        [3.0] * 10 + [-2.0] * 10,
        [1e-8, 2e-8, 3e-8, 4e-8],
    ],
    ids=["identity", "zero", "rank one", "low rank, repeated", "two values", "tiny"],
)
def test_repeated_eigenvalues_are_found(eigenvalues, which):
    a = _symmetric(eigenvalues)
    n, k = len(eigenvalues), 3
    found = eigenpairs(lambda v: v @ a, _start(1, n), k, which, tol=1e-8, max_iter=n)
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    order = {"LA": values.argsort()[-k:], "SA": values.argsort()[:k], "LM": values.abs().argsort()[-k:]}[which]
    assert found.converged
    largest = max(float(values.abs().max()), 1e-300)
    # Of eigenvalues alike in magnitude either may be taken: compare magnitudes then.
    got, want = found.values, values[order].sort().values
    if which == "LM":
        got, want = got.abs().sort().values, want.abs().sort().values
    assert (got - want).abs().max() <= 1e-8 * largest
    assert (a @ found.vectors - found.vectors * found.values).abs().max() <= 1e-7 * largest
    assert (found.vectors.T @ found.vectors - torch.eye(k)).abs().max() < 1e-7


def test_ends_early_where_it_can():
    a = _symmetric([*torch.linspace(0, 1, 300).tolist(), 50.0, 70.0])
    found = eigenpairs(lambda v: v @ a, _start(1, 302), 2, "LA", tol=1e-6, max_iter=302)
    assert found.converged
    assert found.iterations <= 30
    low_rank = _symmetric([*([0.0] * 300), 50.0, 70.0])
    assert eigenpairs(lambda v: v @ low_rank, _start(1, 302), 2, "LA", tol=1e-6, max_iter=302).iterations <= 10
