"""Strict saddle points: plain Newton steps end at them, everything that knows negative curvature leaves them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from secant import Status
from secant.benchmarks.saddles import NOISE, saddles
from secant.optim import CubicNewton, Newton, NewtonCG, SaddleFreeNewton, TrustRegion

SADDLES = {saddle.name: saddle for saddle in saddles()}
OPTIMIZERS = {
    "trust-region": (TrustRegion, {}),
    "trust-region-exact": (TrustRegion, {"subproblem": "exact"}),
    "cubic-newton": (CubicNewton, {}),
    "saddle-free-newton": (SaddleFreeNewton, {}),
    "newton-cg": (NewtonCG, {}),
    "newton-abs": (Newton, {}),
}
every_saddle = pytest.mark.parametrize("name", SADDLES)


def derivatives(saddle, x):
    sizes = [t.numel() for t in saddle.start]

    def loss(z):
        return saddle.loss([part.reshape(t.shape) for part, t in zip(z.split(sizes), saddle.start, strict=True)])

    g = torch.func.grad(loss)(x)
    return float(loss(x)), g, torch.func.hessian(loss)(x)


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@every_saddle
def test_plain_newton_stays(name):
    """x - H^+ g until nothing is left of the gradient: there the Hessian has a negative eigenvalue, which is strict."""
    saddle = SADDLES[name]
    x = flat(saddle.noisy_start())
    for _ in range(40):
        _, g, h = derivatives(saddle, x)
        x = x - torch.linalg.pinv(h, rtol=1e-10, hermitian=True) @ g
    value, g, h = derivatives(saddle, x)
    w = torch.linalg.eigvalsh(h)
    assert float(g.abs().max()) <= 1e-10
    assert float(w[0]) <= -1e-3 * (1 - 1e-6)
    assert value > saddle.minimum + 1e-5


@every_saddle
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_others_leave_and_reach_the_minimum(name, optimizer):
    saddle, (make, options) = SADDLES[name], OPTIMIZERS[optimizer]
    params = [x.requires_grad_() for x in saddle.noisy_start()]
    told = []
    run = make(params, max_iter=200, callback=told.append, **options)
    run.step(lambda: saddle.loss(params))
    value, g, h = derivatives(saddle, flat(params))
    # No tolerance (beside a saddle the gradient is as small as the noise): it ends where rounding is all there is.
    assert run.status in (Status.CONVERGED, Status.STALLED)
    assert float(g.abs().max()) <= 1e-7
    assert value <= saddle.minimum + 1e-12 * max(1.0, abs(saddle.minimum))
    assert float(torch.linalg.eigvalsh(h)[0]) >= -1e-9 * float(h.norm())
    # Rounding apart, it went down all the way.
    values = [iteration.value for iteration in told]
    assert all(b <= a + 1e-15 * max(1.0, abs(a)) for a, b in itertools.pairwise(values))


def test_steps_along_negative_curvature_are_long():
    """From 1e-8 beside the saddle, the radius, the reach and sigma lead away at once; |H| doubles the distance."""
    iterations = {}
    for name, (make, options) in OPTIMIZERS.items():
        x = torch.tensor([0.0, NOISE], dtype=torch.float64, requires_grad=True)
        run = make([x], max_iter=100, tolerance_grad=1e-9, **options)
        run.step(lambda x=x: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
        assert abs(float(x[1].detach())) == pytest.approx(1.0)
        iterations[name] = run.state[x]["n_iter"]
    doublings = math.log2(1.0 / NOISE)
    for name in ("saddle-free-newton", "newton-abs"):
        assert doublings - 2 <= iterations[name] <= doublings + 15
    for name in ("trust-region", "trust-region-exact", "cubic-newton", "newton-cg"):
        assert iterations[name] <= 10


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_saddle_exactly_is_an_end_that_the_status_tells(optimizer):
    """The gradient is zero: that is what CONVERGED says, and all that was looked at."""
    make, options = OPTIMIZERS[optimizer]
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    run = make([x], **options)
    run.step(lambda: x[0] ** 2 / 2 - x[1] ** 2 / 2 + x[1] ** 4 / 4)
    assert run.status is Status.CONVERGED
    assert torch.equal(x.detach(), torch.zeros(2, dtype=torch.float64))
    assert run.state[x]["func_evals"] == 1
