"""Krylov models, and the cubic subproblem in them: optimality conditions against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from secant import Status
from secant.solvers import KrylovModel, cubic

F64 = torch.float64


def indefinite(n: int, seed: int):
    gen = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=gen, dtype=F64)
    return (a + a.T) * 10.0 ** float(torch.randn((), generator=gen)), torch.randn(n, generator=gen, dtype=F64)


@pytest.mark.parametrize("seed", range(20))
def test_the_global_minimum_of_the_cubic_model(seed):
    n, sigma = 1 + seed % 9, 10.0 ** (seed % 5 - 2)
    a, g = indefinite(n, seed)
    step = cubic(lambda v: a @ v, g, sigma=sigma, max_iter=n)
    norm = float(a.norm())
    # (A + lambda I) x = -g, lambda = sigma |x|, A + lambda I >= 0: what characterises the minimum among all x.
    left = a @ step.x + g + step.multiplier * step.x
    assert float(left.norm()) <= 1e-12 * n * (norm + step.multiplier) * step.size
    assert step.multiplier == pytest.approx(sigma * step.size)
    assert float(torch.linalg.eigvalsh(a)[0]) + step.multiplier >= -1e-12 * norm
    assert step.status is Status.CONVERGED
    assert step.iterations == n
    assert step.decrease == pytest.approx(-float(g.dot(step.x) + 0.5 * step.x.dot(a @ step.x)))


def test_it_stops_where_the_gradient_of_the_model_is_small():
    a, g = indefinite(80, 3)
    for rtol in (0.3, 1e-3):
        step = cubic(lambda v: a @ v, g, sigma=1.0, rtol=rtol)
        left = float((a @ step.x + g + step.multiplier * step.x).norm() / g.norm())
        assert left <= rtol * (1 + 1e-9)
        before = cubic(lambda v: a @ v, g, sigma=1.0, max_iter=step.iterations - 1)
        assert before.status is Status.MAX_ITER
        left = float((a @ before.x + g + before.multiplier * before.x).norm() / g.norm())
        assert left > rtol


def test_another_sigma_takes_no_product():
    a, g = indefinite(7, 1)
    count = []

    def product(v):
        count.append(1)
        return a @ v

    step = cubic(product, g, sigma=1.0, rtol=0.0)
    for sigma in (10.0, 1e3, 0.1):
        other = step.again(sigma)
        assert torch.equal(other.x, cubic(lambda v: a @ v, g, sigma=sigma, rtol=0.0).x)
        assert other.iterations == 7
    assert len(count) == 7
    assert step.again(1e3).size < step.size


def test_the_hard_case_is_made_up_along_the_lowest_direction():
    """What the gradient lacks along e_2 is at most rounding: |x| = 2 / sigma all the same."""
    values = torch.tensor([1.0, -2.0], dtype=F64)
    for tiny in (1e-3, 1e-15, 1e-100):
        step = cubic(lambda v: values * v, torch.tensor([0.0, tiny], dtype=F64), sigma=1.0)
        assert step.size == pytest.approx(2.0, rel=max(1e-9, tiny))
        assert float(step.x[1]) < 0.0
    mixed = cubic(lambda v: values * v, torch.tensor([1.0, 1e-12], dtype=F64), sigma=1.0, rtol=0.0)
    assert mixed.size == pytest.approx(2.0, rel=1e-6)
    assert float(mixed.x[0]) == pytest.approx(-1.0 / 3.0, rel=1e-6)


def test_a_product_that_is_not_finite():
    step = cubic(lambda v: v * math.nan, torch.ones(3), sigma=1.0)
    assert step.status is Status.NOT_FINITE
    assert torch.equal(step.x, torch.zeros(3))
    assert step.again(2.0) is step


def test_coordinates_in_which_the_model_is_separable():
    a, g = indefinite(12, 5)
    model = KrylovModel(lambda v: a @ v, g, max_iter=6)
    while model.grow():
        pass
    assert (model.iterations, model.complete) == (6, False)
    u = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(1))
    s = model.combine(u)
    assert float(s.norm()) == pytest.approx(float(u.norm()))
    assert model.decrease(u) == pytest.approx(-float(g.dot(s) + 0.5 * s.dot(a @ s)))
    basis = torch.stack([model.combine(e) for e in torch.eye(6, dtype=F64)])
    outside = a @ s - basis.T @ (basis @ (a @ s))
    assert model.residual(u) == pytest.approx(float(outside.norm()))


def test_an_invariant_space_ends_it():
    values = torch.tensor([1.0, 1.0, 3.0, 3.0, -2.0])
    model = KrylovModel(lambda v: values * v, torch.ones(5), max_iter=5)
    model.grow(5)
    assert model.complete
    assert torch.allclose(model.values, torch.tensor([-2.0, 1.0, 3.0], dtype=F64), atol=1e-6)
    assert not model.grow()
    step = model.combine(-model.slopes / model.values.abs())
    assert torch.allclose(step, -1.0 / values.abs(), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cubic(lambda v: v, torch.ones(2), sigma=0.0), "cubic: sigma: expected a finite number > 0"),
        (lambda: cubic(lambda v: v, torch.ones(2), sigma=1.0, rtol=-1), "cubic: rtol: expected"),
        (lambda: cubic(lambda v: v, torch.zeros(2), sigma=1.0), "grad: expected a finite vector that is not zero"),
        (lambda: cubic(lambda v: v[:1], torch.ones(2), sigma=1.0), "matvec: expected a function that keeps the shape"),
        (lambda: KrylovModel(lambda v: v, torch.ones(2, 2), max_iter=1), r"KrylovModel: grad: expected shape \(n,\)"),
        (lambda: KrylovModel(lambda v: v, torch.ones(2), max_iter=0), "KrylovModel: max_iter: expected an integer"),
    ],
)
def test_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
