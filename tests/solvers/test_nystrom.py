"""Nystrom approximation: exact on low rank, never above the matrix, and a preconditioner that pays."""

from __future__ import annotations

import math

import pytest
import torch

from secant import Status
from secant.solvers import cg, nystrom

F64 = torch.float64


def spd(values, seed=0):
    gen = torch.Generator().manual_seed(seed)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, generator=gen, dtype=F64)).Q
    return (q * values) @ q.T


def test_a_matrix_of_lower_rank_is_found_exactly():
    values = torch.zeros(30, dtype=F64)
    values[:4] = torch.tensor([1e3, 10.0, 1.0, 0.1])
    a = spd(values)
    found = nystrom(lambda v: a @ v, 30, 6, dtype=F64)
    assert torch.allclose(found.values[:4], values[:4], rtol=1e-9)
    # Below the rounding of the sketch, sqrt(n) eps |A|, is nothing.
    assert float(found.values[4:].max()) <= 1e-9
    approximation = (found.vectors * found.values) @ found.vectors.T
    assert float((approximation - a).norm()) <= 1e-9 * float(a.norm())
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(6, dtype=F64), atol=1e-12)


def test_it_is_never_above_the_matrix():
    values, r = torch.logspace(3, -3, 40, dtype=F64), 10
    a = spd(values)
    found = nystrom(lambda v: a @ v, 40, r, dtype=F64, seed=3)
    rest = torch.linalg.eigvalsh(a - (found.vectors * found.values) @ found.vectors.T)
    assert float(rest[0]) >= -1e-12 * 1e3
    # Proposition 2.2 of Frangella, Tropp and Udell: the expected error, for the best p.
    bound = min(
        (1 + 2 * p / (r - p - 1)) * float(values[p]) + 2 * math.e**2 * r / ((r - p) ** 2 - 1) * float(values[p:].sum())
        for p in range(r - 1)
    )
    assert float(rest[-1]) <= bound


def test_the_negative_part_is_left_out():
    values = torch.cat([torch.tensor([5.0, 3.0], dtype=F64), torch.zeros(17, dtype=F64), torch.tensor([-4.0]).double()])
    a = spd(values)
    found = nystrom(lambda v: a @ v, 20, 5, dtype=F64)
    assert float(found.values.min()) >= 0.0
    assert torch.isfinite(found.vectors).all()
    solve = found.preconditioner()
    p = torch.stack([solve(e) for e in torch.eye(20, dtype=F64)])
    assert float(torch.linalg.eigvalsh(0.5 * (p + p.T))[0]) > 0.0


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_it_saves_iterations(damping):
    """20 large eigenvalues over a tail of condition 10: CG sees little but the tail."""
    values = torch.cat([torch.logspace(6, 2, 20, dtype=F64), torch.linspace(1.0, 0.1, 180, dtype=F64)])
    a = spd(values)
    b = torch.randn(200, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = nystrom(lambda v: a @ v, 200, 25, dtype=F64)

    def product(v):
        return a @ v + damping * v

    plain = cg(product, b, rtol=1e-6, max_iter=1000)
    helped = cg(product, b, rtol=1e-6, max_iter=1000, preconditioner=found.preconditioner(damping))
    assert int(helped.status) == Status.CONVERGED
    assert 4 * int(helped.iterations) <= int(plain.iterations)
    # |r|_2 <= sqrt(largest of P) |r| in the norm of P^-1, in which it stops.
    mu = damping or float(found.values[-1])
    bound = ((found.values[0] + mu) / (found.values[-1] + mu)) ** 0.5 * b.dot(found.preconditioner(damping)(b)) ** 0.5
    assert float((a @ helped.x + damping * helped.x - b).norm()) <= 1.001e-6 * float(bound)


def test_formula_of_the_preconditioner():
    a = spd(torch.logspace(2, -2, 10, dtype=F64))
    u, values = found = nystrom(lambda v: a @ v, 10, 3, dtype=F64)
    mu = 0.5
    want = (values[-1] + mu) * (u / (values + mu)) @ u.T + torch.eye(10, dtype=F64) - u @ u.T
    r = torch.randn(10, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(found.preconditioner(mu)(r), want @ r, rtol=1e-12)


def test_the_seed_is_all_the_randomness():
    a = spd(torch.logspace(2, -2, 10, dtype=F64))
    state = torch.get_rng_state()
    first, again, other = (nystrom(lambda v: a @ v, 10, 3, dtype=F64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 11}, "rank: expected an integer, 1 to 10"),
        ({"n": 0}, "n: expected an integer, 1 or more"),
        ({"matmat": lambda v: v[:1]}, "matmat: expected a function that keeps the shape"),
    ],
)
def test_invalid_arguments(change, message):
    given = {"matmat": lambda v: v, "n": 10, "rank": 2} | change
    with pytest.raises(ValueError, match=f"nystrom: {message}"):
        nystrom(**given)
    with pytest.raises(ValueError, match=r"Nystrom\.preconditioner: damping: expected"):
        nystrom(lambda v: v, 4, 2).preconditioner(-1.0)
