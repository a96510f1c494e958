"""The dense update on the CPU: closed forms of the reference, and the SIMD kernels against it."""

from __future__ import annotations

import math

import pytest
import torch
from secant.kernels.lbfgs import cpu, reference
from secant.kernels.lbfgs.contract import RULES, Dense, Pair

import lbfgs_dense as dense

F32, F64 = torch.float32, torch.float64
EPS = torch.finfo(F64).eps
dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


def spd(n: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x @ x.T / n + 0.3 * torch.eye(n, dtype=F64)


def formula(h, s, y, tau, phi):
    """The self-scaled Broyden class as it is written down."""
    sy, hy = s @ y, h @ y
    yhy = y @ hy
    v = yhy.sqrt() * (s / sy - hy / yhy)
    return (h - torch.outer(hy, hy) / yhy + phi * torch.outer(v, v)) / tau + torch.outer(s, s) / sy


def updated(h, s, y, tau, phi):
    w = h @ y
    one = torch.ones((), dtype=F64)
    a, c_ss, c_sw, c_ww = reference.broyden(s @ y, y @ w, tau * one, phi * one, one)
    sw = torch.outer(s, w)
    return a * h + c_ss * torch.outer(s, s) + c_sw * (sw + sw.T) + c_ww * torch.outer(w, w)


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0, 1.7])
def test_coefficients_are_those_of_the_class(tau, phi):
    n = 7
    h, s = spd(n), torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = spd(n, 2) @ s
    got, want = updated(h, s, y, tau, phi), formula(h, s, y, tau, phi)
    size = 100 * EPS * want.abs().max()  # some ten terms of cancelling size, each rounded
    assert (got - want).abs().max() <= size
    assert (got @ y - s).abs().max() <= 10 * n * size * y.abs().max()  # the secant equation
    assert torch.linalg.eigvalsh(got)[0] > 0


def test_bfgs_and_dfp_are_special_cases():
    n = 6
    h, s = spd(n), torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = spd(n, 2) @ s
    rho, eye, hy = 1 / (s @ y), torch.eye(n, dtype=F64), h @ y
    left = eye - rho * torch.outer(s, y)
    bfgs = left @ h @ left.T + rho * torch.outer(s, s)  # Nocedal and Wright, eq. 6.17
    dfp = h - torch.outer(hy, hy) / (y @ hy) + rho * torch.outer(s, s)  # eq. 6.15
    for phi, want in ((1.0, bfgs), (0.0, dfp)):
        assert (updated(h, s, y, 1.0, phi) - want).abs().max() <= 100 * EPS * want.abs().max()


def scaling(b, h, n, rule, first=False):
    x = [torch.tensor(v, dtype=F64) for v in (1.0, b, h)]
    return tuple(float(v) for v in reference.scaling(*x, torch.tensor(first), n, RULES.index(rule)))


def test_scaling_by_hand():
    assert scaling(3.0, 2.0, 9, "bfgs") == (1.0, 1.0)
    assert scaling(4.0, 2.0, 9, "ssbfgs") == (0.25, 1.0)
    assert scaling(0.5, 3.0, 9, "ssbfgs") == (1.0, 1.0)
    for rule in RULES:  # nothing known of B s, or the first pair
        assert scaling(0.0, 2.0, 9, rule) == (1.0, 1.0)
        assert scaling(math.nan, 2.0, 9, rule) == (1.0, 1.0)
        assert scaling(4.0, 2.0, 9, rule, first=True) == (1.0, 1.0)
    # b = 1/4, h = 12: a = 2, c = (2/3)^(1/2), rho = min(1, 12 (1 - c)) = 1, theta = min(1, 3) = 1, sigma = 3: DFP.
    tau, phi = scaling(0.25, 12.0, 3, "ssbroyden")
    assert abs(phi) <= EPS
    assert abs(tau - 3**-0.5) <= 4 * EPS
    # b = 4, h = 2: a = 7, 1 - c = .0646, rho = .1292, theta- = -.1244, (1 - b)/b = -.75, theta = theta-, sigma = rho.
    tau, phi = scaling(4.0, 2.0, 3, "ssbroyden")
    rho = 2 * (1 - math.sqrt(7 / 8))
    theta = (rho - 1) / 7
    assert abs(phi - (1 - theta) / rho) <= 100 * EPS * phi
    assert abs(tau - min(0.25 * rho**-0.5, rho)) <= 100 * EPS


@pytest.mark.parametrize("rule", RULES)
def test_exact_line_searches_end_a_quadratic_in_n_steps(rule):
    """Every member of the class has the directions of conjugate gradients then (Dixon); BFGS also has the Hessian."""
    n = 6
    a = spd(n)
    state, d = dense.a_state(n, F64), torch.empty(n, dtype=F64)
    x = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(3))
    g = a @ x
    start, prev = g.norm(), g.clone()
    reference.dense_update(state, None, g, EPS, RULES.index(rule), d, None)
    for _ in range(n):
        t = float(-(g @ d) / (d @ a @ d))
        x = x + t * d
        g = a @ x
        reference.dense_update(state, Pair(d, g, prev, t), g, EPS, RULES.index(rule), d, prev)
    # n steps of exact arithmetic; rounding grows with the condition number, 40 here.
    assert g.norm() <= 1e-10 * start
    if rule == "bfgs":
        got = reference.dense_matrix(state)
        want = torch.linalg.inv(a)
        assert (got - want).abs().max() <= 1e-8 * want.abs().max()


@dtypes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 65, 130, 259])
@pytest.mark.parametrize("threads", [1, 2])
def test_cpu_follows_the_reference(n, rule, threads, dtype):
    dense.check_run(lambda *args: cpu.dense_update(*args, threads=threads), n, dtype, rule)


@pytest.mark.parametrize("backend", [reference, cpu])
@dtypes
def test_a_spoilt_matrix_gives_way(backend, dtype):
    dense.check_spoilt(backend.dense_update, dtype)


@pytest.mark.parametrize("backend", [reference, cpu])
@dtypes
def test_pairs_that_are_refused(backend, dtype):
    dense.check_refused(backend.dense_update, dtype)


@pytest.mark.parametrize("backend", [reference, cpu])
@pytest.mark.parametrize("rule", RULES)
@dtypes
def test_scales_far_from_one(backend, rule, dtype):
    dense.check_scales(backend.dense_update, dtype, rule)


def test_it_repeats_bit_for_bit():
    """Whatever the threads do; also those that a large triangle gets by itself."""
    n = 1100
    g = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(0))
    s = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(3):
        state, d = dense.a_state(n, F64), s.clone()
        cpu.dense_update(state, Pair(d, 2 * s + 0.1 * s.roll(1), None, 1.0), g, EPS, 2, d, None, threads=2)
        cpu.dense_update(state, None, g, EPS, 2, d, None, threads=2)
        found.append((*state, d))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    want = Dense(*(x.clone() for x in found[0][:5]))
    out = torch.empty_like(d)
    reference.dense_update(want, None, g, EPS, 2, out, None)
    assert torch.allclose(out, d, rtol=0, atol=1e-12 * float(d.abs().max()))
