"""On a GPU: the fit of the CPU, with tensors that stay there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import secant
from secant.result import Status

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("rows", [300, 40_000])
@pytest.mark.parametrize("loss", ["squared", "logistic", "poisson", "huber", "multinomial"])
def test_the_fit_of_the_cpu(problem, solver, loss, rows):
    x, y = problem(loss, n=rows)
    want = secant.glm.fit(x, y, loss=loss, l2=1.0, tol=1e-10, solver=solver)
    got = secant.glm.fit(
        torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda(), loss=loss, l2=1.0, tol=1e-10, solver=solver
    )
    assert got.status == want.status == Status.CONVERGED
    assert got.coef.is_cuda
    # |w - w*| <= |g| / l2 for both.
    assert float((got.coef.cpu() - want.coef).abs().max()) <= 2 * np.sqrt(want.coef.numel()) * 1e-10 * rows


def test_float32(problem, solver):
    x, y = problem("logistic", n=5000)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    result = secant.glm.fit(torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda(), l2=1.0, solver=solver)
    assert result.status == Status.CONVERGED
    assert result.grad_norm <= 1e-6


def test_same_input_same_bits(problem, solver):
    x, y = (torch.from_numpy(part).cuda() for part in problem("logistic", n=40_000))
    first, second = (secant.glm.fit(x, y, l2=1.0, solver=solver) for _ in range(2))
    assert torch.equal(first.coef, second.coef)


def test_targets_elsewhere_are_refused(problem):
    x, y = problem("logistic")
    with pytest.raises(ValueError, match=r"glm\.fit: y: expected device cuda"):
        secant.glm.fit(torch.from_numpy(x).cuda(), y)
