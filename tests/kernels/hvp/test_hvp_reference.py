"""The reference of the `hvp` family against derivatives that autograd takes of the objectives, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hvp_oracle import F64, LOSSES, Problem, csr, shape_of
from secant.kernels.hvp import reference

CASES = [(40, 5, False), (40, 5, True), (1, 1, False), (3, 9, True)]


def objective(problem, loss, coef, weight, l2, delta=1.5):
    d = problem.d
    z = problem.x @ coef[:d] + (coef[d] if len(coef) > d else 0)
    t = problem.target(loss)
    terms = {
        "squared": lambda: F.mse_loss(z, t, reduction="none") / 2,
        "logistic": lambda: F.binary_cross_entropy_with_logits(z, t, reduction="none"),
        "poisson": lambda: F.poisson_nll_loss(z, t, log_input=True, reduction="none"),
        "huber": lambda: F.huber_loss(z, t, delta=delta, reduction="none"),
        "gamma": lambda: t / torch.exp(z) + z,
        # The power is delta: half the deviance of torch's mean, up to what does not depend on it.
        "tweedie": lambda: torch.exp(z) ** (2 - delta) / (2 - delta) - t * torch.exp(z) ** (1 - delta) / (1 - delta),
    }[loss]()
    return (weight * terms).sum() + l2 / 2 * (coef[:d] ** 2).sum()


def value_grad(problem, loss, coef, weight, l2):
    value, grad, curvature = torch.full((), math.nan, dtype=F64), torch.full_like(coef, math.nan), coef.new_empty(0)
    curvature = torch.full((problem.n,), math.nan, dtype=F64)
    reference.glm_value_grad(
        problem.x, problem.target(loss), coef, loss, 1.5, weight, l2, value, grad, curvature
    )  # fmt: skip
    return value, grad, curvature


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "d", "intercept"), CASES)
def test_value_gradient_and_product(n, d, intercept, loss):
    problem = Problem(n, d, F64, intercept=intercept)
    coef, weight = problem.v[:, 0].contiguous(), problem.sample_weight

    def f(c):
        return objective(problem, loss, c, weight, 0.3)

    value, grad, curvature = value_grad(problem, loss, coef, weight, 0.3)
    torch.testing.assert_close(value, f(coef))
    torch.testing.assert_close(grad, torch.func.grad(f)(coef))
    v = torch.randn(len(coef), 3, dtype=F64)
    out = torch.full_like(v, math.nan)
    reference.glm_hvp(problem.x, v, curvature, 0.3, out)
    at = coef.clone().requires_grad_()  # double backward: huber_loss of torch has no forward mode
    (g,) = torch.autograd.grad(f(at), at, create_graph=True)
    expected = [torch.autograd.grad(g, at, column, retain_graph=True)[0] for column in v.mT]
    torch.testing.assert_close(out, torch.stack(expected, 1))


@pytest.mark.parametrize(("n", "d", "intercept"), CASES)
def test_softmax(n, d, intercept):
    problem = Problem(n, d, F64, 4, intercept=intercept)

    def f(c):
        z = problem.x @ c[:d] + (c[d] if intercept else 0)
        losses = F.cross_entropy(z, problem.classes, reduction="none")
        return (problem.sample_weight * losses).sum() + 0.2 / 2 * (c[:d] ** 2).sum()

    value, grad, probs = torch.zeros((), dtype=F64), torch.empty_like(problem.v), torch.empty(n, 4, dtype=F64)
    reference.softmax_value_grad(
        problem.x, problem.classes, problem.v, problem.sample_weight, 0.2, value, grad, probs
    )  # fmt: skip
    torch.testing.assert_close(value, f(problem.v))
    torch.testing.assert_close(grad, torch.func.grad(f)(problem.v))
    v = torch.randn_like(problem.v)
    out = torch.empty_like(v)
    reference.softmax_hvp(problem.x, v, probs, problem.sample_weight, 0.2, out)
    torch.testing.assert_close(out, torch.func.jvp(torch.func.grad(f), (problem.v,), (v,))[1])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("intercept", [False, True])
def test_sparse_rows_are_those_of_the_dense_matrix(intercept, index):
    problem = Problem(40, 6, F64, 3, intercept=intercept)
    dense = torch.where(torch.arange(240).view(40, 6) % 7 < 3, problem.x, 0)
    dense[3], dense[:, 4] = 0, 0
    v, c, one = problem.v, problem.sample_weight, problem.v[:, 0].contiguous()
    calls = [
        (reference.glm_hvp, (v, problem.weight, 0.2), (v.shape,)),
        (reference.softmax_hvp, (v, problem.probs, c, 0.2), (v.shape,)),
        (reference.softmax_value_grad, (problem.classes, v, c, 0.2), ((), v.shape, (40, 3))),
    ] + [
        (
            reference.glm_value_grad,
            (problem.target(loss), one, loss, shape_of(loss, 0.8), c, 0.2),
            ((), one.shape, (40,)),
        )
        for loss in LOSSES
    ]
    for function, args, shapes in calls:
        results, expected = ([torch.full(shape, math.nan, dtype=F64) for shape in shapes] for _ in range(2))
        function(csr(dense, index), *args, *results)
        function(dense, *args, *expected)
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right)


@pytest.mark.parametrize("given", [True, False])
def test_cross_entropy(given):
    logits, u = torch.randn(3, 7, dtype=F64) * 4, torch.randn(3, 7, dtype=F64)
    out = torch.empty_like(u)
    reference.cross_entropy_hvp(logits, u, logits.logsumexp(-1) if given else None, out)
    for row, vector, result in zip(logits, u, out, strict=True):
        h = torch.func.hessian(lambda z: F.cross_entropy(z, torch.tensor(2)))(row)
        torch.testing.assert_close(result, h @ vector)


def test_rows_in_chunks(monkeypatch):
    problem = Problem(23, 3, F64, 2)
    whole, parts = torch.empty_like(problem.v), torch.empty_like(problem.v)
    reference.glm_hvp(problem.x, problem.v, problem.weight, 0.1, whole)
    monkeypatch.setattr(reference, "_CHUNK", 12)
    reference.glm_hvp(problem.x, problem.v, problem.weight, 0.1, parts)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_of_the_logistic_loss(size):
    z, t = torch.tensor([size], dtype=F64), torch.tensor([0.0], dtype=F64)
    value, first, second = reference.losses(z, t, "logistic", 1.0)
    assert (float(value), float(first), float(second)) == (max(size, 0.0), float(size > 0), 0.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_gram(monkeypatch, weighted):
    x, weight = torch.randn(23, 5, dtype=F64), torch.randn(23, dtype=F64) if weighted else None
    expected = sum((1 if weight is None else weight[i]) * torch.outer(row, row) for i, row in enumerate(x))
    before = torch.randn(5, 5, dtype=F64)
    for chunk in (reference._CHUNK, 12):
        monkeypatch.setattr(reference, "_CHUNK", chunk)
        out = torch.full((5, 5), math.nan, dtype=F64)
        reference.gram(x, weight, False, out)
        torch.testing.assert_close(out, expected)
        assert torch.equal(out, out.mT)
        out = before.clone()
        reference.gram(x, weight, True, out)
        torch.testing.assert_close(out, expected + before.tril() + before.tril(-1).mT)
        assert torch.equal(out, out.mT)


def test_paired_matmul():
    a, b, c, e = (torch.randn(s, dtype=F64) for s in ((4, 3), (3, 5), (4, 2), (2, 5)))
    bias, (scale, p, q) = torch.randn(5, dtype=F64), torch.randn(3, 4, 5, dtype=F64)
    out = torch.empty(4, 5, dtype=F64)
    reference.paired_matmul(a, b, c, e, bias, scale, p, q, out)
    torch.testing.assert_close(out, scale * (a @ b + c @ e + bias) + p * q)
    reference.paired_matmul(a, b, None, None, None, None, None, None, out)
    torch.testing.assert_close(out, a @ b)
