from __future__ import annotations

import numpy as np
import pytest
import torch

LOSSES = ("squared", "logistic", "poisson", "huber", "multinomial")
SOLVERS = ("newton-cholesky", "newton-cg", "lbfgs")


@pytest.fixture(params=SOLVERS)
def solver(request):
    return request.param


def _problem(loss: str, n: int = 300, d: int = 7, seed: int = 0):
    """Correlated features of unequal scales and offsets, and targets of a model of this loss: float64 arrays."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)))
    x = (x + rng.standard_normal(d)) * np.exp(rng.standard_normal(d))
    z = (x - x.mean(0)) / x.std(0) @ rng.standard_normal(d) / np.sqrt(d)
    if loss == "logistic":
        y = (rng.random(n) < 1.0 / (1.0 + np.exp(-2.0 * z))).astype(float)
    elif loss == "poisson":
        y = rng.poisson(np.exp(z)).astype(float)
    elif loss == "multinomial":
        y = np.argmax(np.outer(z, [-1.0, 0.0, 2.0]) + rng.gumbel(size=(n, 3)), axis=1)
    else:
        y = z + 0.3 * rng.standard_normal(n)
        y[::9] += 20.0 * rng.standard_normal(len(y[::9]))
    return x, y


@pytest.fixture
def problem():
    return _problem


class Oracle:
    """Value and gradient of the objective from its definition, in numpy; theta is flat, intercepts last."""

    def __init__(self, x, y, loss, *, l2=0.0, weight=None, delta=1.0):
        self.x, self.y, self.loss, self.l2, self.delta = x, y, loss, l2, delta
        self.c = np.ones(len(y)) if weight is None else weight
        self.k = int(y.max()) + 1 if loss == "multinomial" else 1

    def __call__(self, theta):
        n, d = self.x.shape
        theta = theta.reshape(d + 1, self.k)
        w, b = theta[:-1], theta[-1]
        z = self.x @ w + b
        if self.loss == "multinomial":
            log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
            terms, r = -log_p[np.arange(n), self.y], np.exp(log_p)
            r[np.arange(n), self.y] -= 1.0
        else:
            z = z[:, 0]
            if self.loss == "logistic":
                terms, r = np.logaddexp(0.0, z) - self.y * z, 1.0 / (1.0 + np.exp(-z)) - self.y
            elif self.loss == "poisson":
                terms, r = np.exp(z) - self.y * z, np.exp(z) - self.y
            else:
                r = z - self.y
                terms = 0.5 * r * r
                if self.loss == "huber":
                    far = np.abs(r) > self.delta
                    terms = np.where(far, self.delta * (np.abs(r) - 0.5 * self.delta), terms)
                    r = np.clip(r, -self.delta, self.delta)
            r = r[:, None]
        r = r * self.c[:, None]
        grad = np.concatenate([self.x.T @ r + self.l2 * w, r.sum(0, keepdims=True)])
        return float(self.c @ terms) + 0.5 * self.l2 * float((w * w).sum()), grad.reshape(-1)


@pytest.fixture
def oracle():
    return Oracle


def _flat(result):
    """The coefficients of a `GLMResult` as the oracle takes them."""
    return torch.cat([result.coef, result.intercept[None]]).double().numpy().reshape(-1)


@pytest.fixture
def flat():
    return _flat
