from __future__ import annotations

import functools
import math

import pytest
import torch
from secant.kernels.lbfgs import reference

from secant.benchmarks import peers
from secant.benchmarks.families import lbfgs
from secant.benchmarks.families.lbfgs import Case, Problem

CPU = torch.device("cpu")
FLAT, BATCH = Case("two_loop", 300, m=7, dtype=torch.float64), Case("two_loop", 20, m=7, batch=5, dtype=torch.float64)


def by_reference(p):
    g, s, y = (x if p.case.batch else x[None] for x in (p.g, p.s, p.y))
    out = torch.empty_like(g)
    reference.two_loop(g, s, y, None, out)
    return out if p.case.batch else out[0]


def remembered(p):
    sy, yy = (p.s * p.y).sum(-1), (p.y * p.y).sum(-1)
    return 1 / sy, sy[..., -1] / yy[..., -1]


def by_list(p):
    return peers.EagerHistory(p.s, p.y).direction(p.g)


def by_rows(p):
    return peers.two_loop_rows(p.g, p.s, p.y, *remembered(p))


def by_bmm(p):
    return peers.two_loop_bmm(p.g, p.s, p.y, *remembered(p))


def by_compact(p):
    return peers.compact_from_pairs(p.g, p.s, p.y)


@pytest.mark.parametrize(
    ("case", "peer"),
    [(FLAT, by_list), (FLAT, by_rows), (FLAT, by_compact), (BATCH, by_rows), (BATCH, by_bmm), (BATCH, by_compact)],
)
def test_peers_agree_with_the_reference(case, peer):
    p = Problem(case, CPU)
    want = by_reference(p)
    _, amplification = p.exact(torch.float64, stepped=False)
    # Both sides round, and both sum in float64: n u each at worst.
    bound = 2 * peers.tolerance(case.m, amplification, case.dtype, case.n * torch.finfo(case.dtype).eps / 2)
    got = peer(p)
    assert got.shape == want.shape
    assert float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max()) <= bound < 1e-9


@pytest.mark.parametrize("case", [FLAT, BATCH])
def test_exact_agrees_with_the_reference(case):
    p = Problem(case, CPU)
    want = by_reference(p)
    d, amplification = peers.exact(p.g, p.s.unbind(-2), p.y.unbind(-2))
    bound = 2 * peers.tolerance(case.m, amplification, case.dtype, case.n * torch.finfo(case.dtype).eps / 2)
    assert float(((d - want).norm(dim=-1) / want.norm(dim=-1)).max()) <= bound < 1e-9


def test_exact_without_pairs_is_steepest_descent():
    g = torch.randn(9)
    assert torch.equal(peers.exact(g, [], []).d, -g.double())


def test_exact_bounds_the_error_of_a_perturbed_recursion():
    # float32 arithmetic is the perturbation: what the bound is for. One pair of vectors at an angle makes it large.
    p = Problem(Case("two_loop", 50, m=3), CPU)
    p.y[1] = p.s[1] * 0.02 + torch.randn(50, generator=torch.Generator().manual_seed(1))
    p.y[1] *= torch.sign(p.y[1] @ p.s[1])
    d, amplification = peers.exact(p.g, p.s.unbind(), p.y.unbind())
    assert amplification > 20  # against about 5 without the angle: the bound sees it
    got = peers.EagerHistory(p.s, p.y).direction(p.g)
    bound = peers.tolerance(3, amplification, torch.float32, 50 * torch.finfo(torch.float32).eps / 2)
    assert float((got - d).norm() / d.norm()) <= bound


def test_eager_history_is_what_torch_does_bit_for_bit():
    torch.manual_seed(0)
    x = torch.randn(40, requires_grad=True)
    h = torch.linspace(1, 50, 40)
    optimizer = torch.optim.LBFGS([x], max_iter=9, history_size=4)

    def closure():
        optimizer.zero_grad()
        loss = (h * x * x).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[x]
    s, y = torch.stack(state["old_stps"]), torch.stack(state["old_dirs"])
    assert len(s) == 4
    assert torch.equal(peers.EagerHistory(s, y).direction(state["prev_flat_grad"]), state["d"])

    # One more iteration, from the state before it: the pair, its place, and the direction.
    history = peers.EagerHistory(s, y)
    prev, direction, t = state["prev_flat_grad"].clone(), state["d"].clone(), state["t"]
    closure()
    grad = x.grad.clone()
    ours = history.step(grad, prev, direction, t)
    optimizer.param_groups[0]["max_iter"] = 1
    optimizer.step(closure)
    assert torch.equal(ours, state["d"])
    assert torch.equal(prev, grad)
    assert all(torch.equal(a, b) for a, b in zip(history.s, state["old_stps"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(history.y, state["old_dirs"], strict=True))


def test_one_period_is_enough_for_the_exact_direction(monkeypatch):
    monkeypatch.setattr(lbfgs, "PERIOD", 64)
    p = Problem(Case("step", 64 * 3 + 17, m=4), CPU)
    assert torch.equal(p.s[:, :64], p.s[:, 128:192])
    s, y = list(p.s.unbind()), list(p.y.unbind())
    for stepped in (False, True):
        if stepped:
            s, y = [*s[1:], s[0]], [*y[1:], p.g - p.probe[0]]
        want = peers.exact(p.g, s, y, storage=torch.bfloat16)
        got = p.exact(torch.bfloat16, stepped=stepped)
        bound = 2 * peers.tolerance(4, want.amplification, torch.float64, 209 * torch.finfo(torch.float64).eps / 2)
        assert float((got.d - want.d).norm() / want.d.norm()) <= bound
        assert got.amplification == pytest.approx(want.amplification)


@pytest.mark.slow
def test_compiled_peer_agrees_and_does_not_break_the_graph():
    p = Problem(FLAT, CPU)
    compiled = torch.compile(peers.two_loop_rows, dynamic=False, fullgraph=True)
    got, want = compiled(p.g, p.s, p.y, *remembered(p)), by_reference(p)
    _, amplification = p.exact(torch.float64, stepped=False)
    bound = 2 * peers.tolerance(FLAT.m, amplification, torch.float64, FLAT.n * torch.finfo(torch.float64).eps / 2)
    assert float((got - want).norm() / want.norm()) <= bound


@functools.cache
def _float32_errors():
    p = Problem(Case("two_loop", 5000), CPU)
    want, amplification = p.exact(torch.float32, stepped=False)
    errors = {peer.__name__: float((peer(p) - want).norm() / want.norm()) for peer in (by_list, by_rows, by_compact)}
    return errors, amplification


@pytest.mark.parametrize("peer", ["by_list", "by_rows", "by_compact"])
def test_float32_peers_pass_the_check_of_the_benchmarks(peer):
    errors, amplification = _float32_errors()
    dots = math.sqrt(5000) * torch.finfo(torch.float32).eps / 2
    assert 0 < errors[peer] <= peers.tolerance(10, amplification, torch.float32, dots)
