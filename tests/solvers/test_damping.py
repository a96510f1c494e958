"""Nielsen's damping: its formula, and Levenberg and Marquardt's method with it."""

from __future__ import annotations

import math

import pytest
import torch

from secant.solvers import NielsenDamping


@pytest.mark.parametrize(
    ("gain", "factor"),
    [(1.0, 1 / 3), (2.0, 1 / 3), (0.5, 1.0), (0.75, 0.875), (0.25, 1.125), (1e-9, 2.0)],
)
def test_a_step_that_lowers_the_objective_is_taken(gain, factor):
    damping = NielsenDamping(0.6, growth=8.0)
    assert damping.update(decrease=3.0 * gain, predicted=3.0)
    # 1 - (2 gain - 1)^3, but not below 1/3.
    assert damping.value == pytest.approx(0.6 * factor, rel=1e-8)
    assert damping.growth == 2.0


def test_refused_steps_damp_ever_more():
    damping = NielsenDamping(1.0)
    for k, decrease in enumerate((0.0, -1.0, math.nan, -math.inf), start=1):
        assert not damping.update(decrease, predicted=1.0)
        # 2, 2 4, 2 4 8, ...
        assert damping.value == 2.0 ** (k * (k + 1) // 2)
    assert not damping.update(1.0, predicted=0.0)
    assert not damping.update(1.0, predicted=-1.0)
    assert damping.update(1.0, predicted=2.0)
    assert damping.value == 2.0**21
    assert damping.growth == 2.0


def test_levenberg_and_marquardt_with_it_reaches_the_minimum():
    """Rosenbrock's residuals 10 (y - x^2), 1 - x from the usual start; the minimum is (1, 1)."""
    x, damping, refused = torch.tensor([-1.2, 1.0], dtype=torch.float64), NielsenDamping(1e-3), 0

    def residual(x):
        return torch.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])

    for _ in range(100):
        r, j = residual(x), torch.func.jacfwd(residual)(x)
        step = torch.linalg.solve(j.T @ j + damping.value * torch.eye(2, dtype=x.dtype), -j.T @ r)
        predicted = float(0.5 * (damping.value * step @ step - step @ (j.T @ r)))
        if predicted < 1e-28:
            break
        taken = damping.update(float(0.5 * (r @ r - residual(x + step) @ residual(x + step))), predicted)
        x, refused = (x + step, refused) if taken else (x, refused + 1)
    assert refused > 0
    # The smallest eigenvalue of the Hessian is 0.2 there: a decrease of 1e-28 is one of 1e-13.
    assert float((x - 1.0).abs().max()) <= 1e-12


@pytest.mark.parametrize(("options", "name"), [({"value": 0.0}, "value"), ({"value": 1.0, "growth": 1.0}, "growth")])
def test_invalid_arguments(options, name):
    with pytest.raises(ValueError, match=f"NielsenDamping: {name}: expected a finite number >"):
        NielsenDamping(**options)
