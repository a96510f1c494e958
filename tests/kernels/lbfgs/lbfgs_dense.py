"""Runs of a dense update that every backend is held to, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from secant.kernels.lbfgs import reference
from secant.kernels.lbfgs.contract import RULES, Dense, Pair
from torch import Tensor

F32, F64 = torch.float32, torch.float64
CPU = torch.device("cpu")


def a_state(n: int, dtype: torch.dtype, device: torch.device = CPU) -> Dense:
    """H = I that is still to be written: NaN everywhere else, as nothing of it may be read."""
    h = torch.full((n * (n + 1) // 2,), math.nan, dtype=dtype, device=device)
    pair = torch.full((2, n), math.nan, dtype=dtype, device=device)
    coefs = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=F64, device=device)
    stats = torch.full((len(reference.DENSE_STATS),), math.nan, dtype=F64, device=device)
    return Dense(h, pair, coefs, torch.zeros((), dtype=torch.int32, device=device), stats)


def copied(state: Dense, device: torch.device | None = None) -> Dense:
    return Dense(*(x.clone() if device is None else x.to(device, copy=True) for x in state))


def triangle(x: Tensor) -> Tensor:
    """The lower triangle of a matrix, row behind row."""
    return x[tuple(torch.tril_indices(*x.shape, device=x.device))]


def sums_of_products(h: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """How far |H v| may be off, for each row.

    Products in T are summed in T over at most 256, then in float64 over the n: (256 + 2) u of T and n u of float64,
    times sum |h_ij v_j|. In float64 this is (n + 258) u.
    """
    n = h.shape[0]
    return (258 * torch.finfo(dtype).eps + n * torch.finfo(F64).eps) * (h.abs() @ v.abs())


def check_call(
    call: Any, state: Dense, pair: Pair | None, grad: Tensor | None, rule: int, tol: float, device: torch.device
) -> tuple[Dense, Tensor | None]:
    """One call on a state against the reference; returns what the call left, on the CPU.

    The triangle: three products, two sums and the coefficients that are rounded to T, 8 u of the sum of the terms.
    Then H y and the direction, from the triangle that the call has left, so that errors do not add up over a run.
    """
    dtype, n = state.h.dtype, state.pair.shape[-1]
    u = torch.finfo(dtype).eps
    on, kept = copied(state, device), copied(state)
    wanted = grad is not None
    placed = None
    if pair is not None:
        t = pair.t.to(device) if isinstance(pair.t, Tensor) else pair.t
        placed = Pair(*(None if x is None else x.to(device, copy=True) for x in pair[:3]), t)
    g = None if grad is None else grad.to(device, copy=True)
    aliased = wanted and placed is not None and placed.y_prev is not None
    out = None if not wanted else placed.s if aliased else torch.full_like(g, math.nan)
    prev = placed.y_prev if aliased else None
    call(on, placed, g, tol, rule, out, prev)
    got = copied(on, CPU)

    want_h = reference.dense_matrix(kept)
    a, c_ss, c_sw, c_ww, delta = kept.coefs.tolist()
    if a == 0:
        terms = delta * torch.eye(n, dtype=F64)
    else:
        s, w = kept.pair.double().abs() if c_ss or c_sw or c_ww else torch.zeros(2, n, dtype=F64)
        old = torch.zeros(n, n, dtype=F64)
        old[tuple(torch.tril_indices(n, n))] = kept.h.double().abs()
        sw = torch.outer(s, w)
        terms = abs(a) * old + abs(c_ss) * torch.outer(s, s) + abs(c_sw) * (sw + sw.T) + abs(c_ww) * torch.outer(w, w)
    assert ((got.h.double() - triangle(want_h)).abs() <= 8 * u * triangle(terms)).all()
    if (a, c_ss, c_sw, c_ww, delta) == (1, 0, 0, 0, 0):
        assert torch.equal(got.h, kept.h)

    # From here on, from the triangle as it now is.
    want = Dense(got.h.clone(), kept.pair.clone(), torch.tensor([1.0, 0, 0, 0, 0], dtype=F64), kept.count, kept.stats)
    want_out = torch.empty(n, dtype=F64) if wanted else None
    reference.dense_update(want, pair, grad, tol, rule, want_out, None)
    h = torch.zeros(n, n, dtype=F64)
    h[tuple(torch.tril_indices(n, n))] = got.h.double()
    h = h + h.tril(-1).T
    assert got.count == want.count
    accepted = want.stats[6] == 1
    assert got.stats[6] == want.stats[6]
    off, s_unit, w_unit = torch.zeros(n, dtype=F64), 1.0, 1.0
    if pair is not None:
        y = (pair.y if pair.y_prev is None else pair.y - pair.y_prev).double()
        off = sums_of_products(h, y, dtype) + u * (h @ y).abs()  # of w
        if accepted:
            s, w = (pair.s * (pair.t.to(dtype) if isinstance(pair.t, Tensor) else pair.t)).double(), (h @ y).to(dtype)
            s_unit, w_unit = (float(reference.power_of_two(x @ x)) for x in (s, w.double()))
            assert torch.equal(got.pair[0].double() * s_unit, s)
            assert ((got.pair[1].double() * w_unit - w.double()).abs() <= off).all()
            assert 1 <= torch.linalg.vector_norm(got.pair[0].double()) <= 2
        else:
            assert torch.equal(got.pair.isnan(), kept.pair.isnan())
            assert torch.equal(got.pair.nan_to_num(), kept.pair.nan_to_num())
        assert torch.allclose(got.stats[3:6], want.stats[3:6], rtol=4 * n * torch.finfo(F64).eps, atol=0)
        # The relative error of y.Hy, by which every coefficient is off, times what the formulas make of it.
        relative = 1e3 * (float((y.abs() @ off) / want.stats[7].abs()) + n * torch.finfo(F64).eps)
    else:
        relative = n * torch.finfo(F64).eps
    if accepted or pair is None:
        scale = want.coefs.abs().clamp(min=torch.finfo(F64).tiny)
        assert ((got.coefs - want.coefs).abs() <= relative * scale).all(), (got.coefs, want.coefs)
    if wanted:
        gd = grad.double()
        s, w = want.pair.double().abs() if accepted else torch.zeros(2, n, dtype=F64)
        off = off / w_unit  # as is w
        _, c_ss, c_sw, c_ww, _ = want.coefs.abs().tolist()
        a = abs(float(want.coefs[0]))
        slack = a * (sums_of_products(h, gd, dtype) + relative * (h @ gd).abs())
        sg, wg = (s @ gd.abs()), (w @ gd.abs())
        slack = slack + (relative + 4 * u) * ((c_ss * sg + c_sw * wg) * s + (c_sw * sg + c_ww * wg) * w)
        slack = slack + (c_sw * sg + c_ww * wg) * off + (c_sw * s + c_ww * w) * (off @ gd.abs()) + u * want_out.abs()
        d = out.cpu().double()
        assert ((d - want_out).abs() <= slack).all(), float(((d - want_out).abs() / slack).max())
        size = float(slack @ gd.abs()) + 1e-12 * float(d.abs() @ gd.abs())
        assert abs(float(got.stats[0]) - float(want.stats[0])) <= size
        assert torch.allclose(got.stats[1], want.stats[1], rtol=n * torch.finfo(F64).eps, atol=0)
        assert got.stats[2] == want.stats[2]
        if prev is not None:
            assert torch.equal(prev.cpu(), grad)
    return got, None if out is None else out.cpu()


def check_run(call: Any, n: int, dtype: torch.dtype, rule: str, device: torch.device = CPU) -> None:
    """Steps on a quadratic from H = I: with a refused pair, a t on the device, pairs and directions by themselves."""
    draw = torch.Generator().manual_seed(n)
    a = torch.randn(n, n, dtype=F64, generator=draw)
    a = a @ a.T / n + 0.5 * torch.eye(n, dtype=F64)
    x = torch.randn(n, dtype=F64, generator=draw)
    state, tol, number = a_state(n, dtype), torch.finfo(dtype).eps, RULES.index(rule)
    g = (a @ x).to(dtype)
    state, d = check_call(call, state, None, g, number, tol, device)
    assert torch.equal(d, -g)
    for k in range(6):
        t: float | Tensor = torch.tensor([0.4], dtype=F64) if k == 1 else 0.3
        x = x + float(t) * d.double()
        new = (a @ x).to(dtype)
        pair = Pair(d, new, g, t) if k != 3 else Pair(d, 2 * g - new, g, t)  # y -> -y
        state, d = check_call(call, state, pair, new, number, tol, device)
        assert state.stats[6] == (k != 3)
        g = new
    assert state.count == 5
    s = torch.randn(n, dtype=F64, generator=draw).to(dtype)
    state, _ = check_call(call, state, Pair(s, (a @ s.double()).to(dtype), None, 1.0), None, number, tol, device)
    assert state.stats[6:].tolist()[0::2][1] == 1.0  # tau of a pair whose B s nobody knows
    check_call(call, state, None, g, number, tol, device)


def check_spoilt(call: Any, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """A H that does not descend gives way to gamma I; with a gradient that is not finite, or zero, it stays."""
    n = 70
    g = torch.linspace(-1, 2, n, dtype=dtype)
    for bad in (math.nan, -1.0):
        state = a_state(n, dtype, device)
        state.h.fill_(0.0)
        state.h[torch.arange(n) * (torch.arange(n) + 3) // 2] = bad
        state.coefs.copy_(torch.tensor([1.0, 0, 0, 0, 0], dtype=F64))
        state.count.fill_(7)
        d = torch.full((n,), math.nan, dtype=dtype, device=device)
        for grad in (torch.zeros_like(g), torch.full_like(g, math.inf), torch.full_like(g, math.nan)):
            call(state, None, grad.to(device), 1e-7, 2, d, None)
            assert state.coefs.tolist() == [1, 0, 0, 0, 0]
            assert state.count == 7
        call(state, None, g.to(device), 1e-7, 2, d, None)
        assert torch.equal(d.cpu(), -g)
        assert state.coefs.tolist() == [0, 0, 0, 0, 1]
        assert state.count == 0
        gg = float(g.double() @ g.double())
        assert abs(float(state.stats[0]) + gg) <= n * torch.finfo(F64).eps * gg
        call(state, None, 2 * g.to(device), 1e-7, 2, d, None)
        assert torch.equal(d.cpu(), -2 * g)
        assert torch.equal(state.h.cpu(), triangle(torch.eye(n, dtype=dtype)))


def check_refused(call: Any, dtype: torch.dtype, device: torch.device = CPU) -> None:
    """A pair with an entry that is not finite, of no curvature, or that would leave the range of T."""
    n = 35
    s, y = torch.linspace(1, 2, n, dtype=dtype), torch.linspace(2, 1, n, dtype=dtype)
    tiny, huge = torch.finfo(dtype).tiny, math.sqrt(torch.finfo(dtype).max)
    for a, b in ((s, -y), (0 * s, y), (s, 0 * y), (s * math.nan, y), (s, y * math.inf), (s * huge * 8, y * tiny)):
        state = a_state(n, dtype, device)
        call(state, Pair(a.to(device), b.to(device), None, 1.0), None, 1e-7, 2, None, None)
        assert state.stats[6] == 0
        assert state.count == 0
        d = torch.empty(n, dtype=dtype, device=device)
        call(state, None, y.to(device), 1e-7, 2, d, None)
        assert torch.equal(d.cpu(), -y)


def check_scales(call: Any, dtype: torch.dtype, rule: str, device: torch.device = CPU) -> None:
    """f times c, a power of two: gradients c g, and H / c to the last bit, as far from 1 as squares leave float32."""
    n, tol, number = 35, torch.finfo(dtype).eps, RULES.index(rule)
    draw = torch.Generator().manual_seed(n)
    a = torch.randn(n, n, dtype=F64, generator=draw)
    a = a @ a.T / n + 0.5 * torch.eye(n, dtype=F64)
    start = torch.randn(n, dtype=F64, generator=draw)

    def run(c: float) -> tuple[Dense, list[Tensor]]:
        state, x, found = a_state(n, dtype, device), start, []
        g = c * (a @ x).to(dtype)
        d, g = torch.empty_like(g, device=device), g.to(device)
        call(state, None, g, tol, number, d, None)
        for k in range(6):
            t = 0.3 if k else 0.3 / c
            x = x + t * d.cpu().double()
            new = (c * (a @ x).to(dtype)).to(device)
            call(state, Pair(d, new, g, t), new, tol, number, d, g)
            assert state.stats[6] == 1
            found.append(d.cpu().clone())
        assert state.count == 6
        return copied(state, CPU), found

    want, directions = run(1.0)
    for c in (2.0**-83, 2.0**83):  # 1e-25, 1e25
        got, found = run(c)
        assert all(map(torch.equal, found, directions))
        assert torch.equal(reference.dense_matrix(got) * c, reference.dense_matrix(want))
