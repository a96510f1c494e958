"""`secant.LBFGSHistory`: rings, gate, fused step, state."""

from __future__ import annotations

import io
import re

import pytest
import torch

import secant
from secant import LBFGSHistory
from secant.ops import two_loop


def quadratic(n: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    return eigenvalues.to(dtype), lambda: torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_direction_is_two_loop_of_the_last_pairs(m, backend):
    """At every offset of the ring: fewer pairs than m, exactly m, and around it twice."""
    n = 23
    hessian, draw = quadratic(n)
    with secant.use_backend(backend):
        history = LBFGSHistory(n, m, dtype=torch.float64)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(2 * m + 2):
            g = draw()
            s, y = (torch.stack(x) for x in zip(*kept, strict=True)) if kept else (torch.empty(0, n).double(),) * 2
            torch.testing.assert_close(history.direction(g), two_loop(g, s, y), rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(history.stats.gd, g @ two_loop(g, s, y), rtol=1e-11, atol=1e-13)
            assert history.count == len(kept)
            step = draw()
            assert history.append(step, hessian * step) == 1
            kept = [*kept, (step, hessian * step)][-m:]


def test_step_is_append_and_direction():
    n = 40
    hessian, draw = quadratic(n, torch.float32)
    fused, parts = LBFGSHistory(n, 3), LBFGSHistory(n, 3)
    x = draw()
    previous, direction = hessian * x, -hessian * x
    for k in range(8):
        t = 0.3 + 0.1 * k
        x = x + t * direction
        g = hessian * x
        accepted = parts.append(t * direction, g - previous)
        want = parts.direction(g)
        length = t if k % 2 else torch.tensor(t, dtype=torch.float64)
        stats = fused.step(g, previous, direction, length)
        torch.testing.assert_close(direction, want)
        assert torch.equal(previous, g)
        assert stats.accepted == accepted == 1
        torch.testing.assert_close(stats.gd, (g.double() @ want.double()), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(stats.g_norm, g.double().norm())
        assert stats.g_max == g.abs().max()


def test_negated_views_are_read_as_what_they_stand_for():
    hessian, draw = quadratic(12, torch.float32)
    plain, negated = LBFGSHistory(12, 2), LBFGSHistory(12, 2)
    step, g = draw(), draw()
    plain.append(step, hessian * step)
    negated.append(torch._neg_view(-step), torch._neg_view(-hessian * step))
    want = plain.direction(g)
    assert torch.equal(negated.direction(torch._neg_view(-g)), want)
    previous = [draw()] * 2
    directions = [want.clone(), want.clone()]
    plain.step(g, previous[0].clone(), directions[0], 0.5)
    negated.step(torch._neg_view(-g), previous[1].clone(), directions[1], 0.5)
    assert torch.equal(*directions)


def test_refused_pairs_change_nothing_and_say_so():
    n = 16
    hessian, draw = quadratic(n)
    history = LBFGSHistory(n, 2, dtype=torch.float64)
    for _ in range(3):
        s = draw()
        history.append(s, hessian * s)
    before = {k: v.clone() for k, v in history.state_dict().items()}
    s = draw()
    nan = s.clone()
    nan[3] = torch.nan
    for pair in ((s, -s), (s, 0 * s), (0 * s, s), (nan, s), (s, nan), (s * torch.inf, s)):
        assert history.append(*pair) == 0
        for key, value in history.state_dict().items():
            assert torch.equal(value, before[key]), key
    history.reset()
    assert torch.equal(history.direction(s), -s)


def test_curvature_tol():
    s = torch.tensor([1.0, 0.0])
    for tol, accepted in ((0.5, 1), (0.8, 0)):
        assert LBFGSHistory(2, 1, curvature_tol=tol).append(s, torch.tensor([1.0, 1.0])) == accepted  # cos = 0.707


@pytest.mark.parametrize("batch", [1, 4])
def test_batches_are_independent(batch):
    n, m = 12, 3
    hessian, draw = quadratic(n)
    together = LBFGSHistory(n, m, batch=batch, dtype=torch.float64)
    apart = [LBFGSHistory(n, m, dtype=torch.float64) for _ in range(batch)]
    for k in range(5):
        s = torch.stack([draw() for _ in range(batch)])
        y = hessian * s
        y[k % batch] *= -1 if k % 2 else 1  # refused in one problem only
        accepted = together.append(s, y)
        assert accepted.tolist() == [float(h.append(*p)) for h, p in zip(apart, zip(s, y, strict=True), strict=True)]
        g = torch.stack([draw() for _ in range(batch)])
        each = torch.stack([h.direction(x) for h, x in zip(apart, g, strict=True)])
        torch.testing.assert_close(together.direction(g), each, rtol=1e-13, atol=1e-14)
    assert together.count.tolist() == [int(h.count) for h in apart]


def test_bfloat16_storage_keeps_the_pairs_consistent():
    """The Gram matrices are those of the rounded pairs, so the secant equation holds for them as for any others."""
    n = 500
    hessian, draw = quadratic(n, torch.float32)
    history = LBFGSHistory(n, 4, storage_dtype=torch.bfloat16)
    for _ in range(6):
        s = draw()
        history.append(s, hessian * s)
    newest = (int(history.head) - 1) % 4
    s, y = history.s[newest].float(), history.y[newest].float()
    assert history.s.dtype is torch.bfloat16
    d = history.direction(y)
    assert (d + s).norm() <= 20 * torch.finfo(torch.float32).eps * s.norm()


def test_state_dict_round_trip():
    n = 9
    hessian, draw = quadratic(n)
    one = LBFGSHistory(n, 3, dtype=torch.float64)
    for _ in range(4):
        s = draw()
        one.append(s, hessian * s)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two = LBFGSHistory(n, 3, dtype=torch.float64)
    two.load_state_dict(torch.load(buffer))
    for _ in range(3):
        s, g = draw(), draw()
        one.append(s, hessian * s)
        two.append(s, hessian * s)
        assert torch.equal(one.direction(g), two.direction(g))
    with pytest.raises(ValueError, match=r"state\['s'\]: expected a tensor of shape \(4, 9\)"):
        LBFGSHistory(n, 4, dtype=torch.float64).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="state: expected keys"):
        one.load_state_dict({})


def test_compiles_in_one_graph():
    n = 30
    hessian, draw = quadratic(n, torch.float32)
    eager, compiled = LBFGSHistory(n, 3), LBFGSHistory(n, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def iterate(x, previous, direction):
        x = x + direction
        compiled.step(hessian * x, previous, direction, 1.0)
        return x

    x = draw()
    a, b = [x, hessian * x, -hessian * x], [x, hessian * x, -hessian * x]
    for _ in range(5):
        a[0] = iterate(*a)
        b[0] = b[0] + b[2]
        eager.step(hessian * b[0], b[1], b[2], 1.0)
        for mine, want in zip(a, b, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-6)


def test_opcheck():
    h = LBFGSHistory(20, 3)
    g, d = torch.randn(20), torch.randn(20)
    h.append(d, d)
    t = torch.ones(1, dtype=torch.float64)
    op = torch.ops.secant.lbfgs_update.default
    torch.library.opcheck(op, (*h._state, g, None, None, None, t, 1e-7, torch.empty(20), None))
    torch.library.opcheck(op, (*h._state, g, d, g.clone(), None, t, 1e-7, torch.empty(20), torch.empty(20)))


def bad_calls():
    def make(**options):
        return lambda: LBFGSHistory(**{"n": 5, "history_size": 2} | options)

    h, g, d = LBFGSHistory(5, 2), torch.randn(5), torch.randn(5)
    yield "n", make(n=0), ValueError, "n: expected an integer, 1 or more, got 0"
    yield "m", make(history_size=257), ValueError, "history_size: expected an integer, 1 to 256"
    yield "m float", make(history_size=2.0), ValueError, "history_size: expected an integer"
    yield "batch", make(batch=0), ValueError, "batch: expected an integer, 1 or more"
    yield "dtype", make(dtype=torch.bfloat16), TypeError, "dtype: expected torch.float32 or torch.float64"
    yield (
        "storage",
        make(storage_dtype=torch.float16),
        TypeError,
        "storage_dtype: expected float32, float64 or bfloat16",
    )
    yield "tol", make(curvature_tol=1.0), ValueError, "curvature_tol: expected a number in [0, 1)"
    yield (
        "length",
        lambda: h.direction(torch.ones(4)),
        ValueError,
        "direction: grad: expected shape (5,), got shape (4,)",
    )
    yield "kind", lambda: h.append(g.double(), g), TypeError, "append: s: expected dtype float32, got torch.float64"
    yield "none", lambda: h.append(None, g), TypeError, "append: s: expected a torch.Tensor, got NoneType"
    yield "overlap", lambda: h.step(g, g, d, 1.0), ValueError, "step: prev_grad: expected no overlap"
    yield "same", lambda: h.step(g, d, d, 1.0), ValueError, "step: direction: expected no overlap"
    yield (
        "strided",
        lambda: h.step(g, torch.ones(10)[::2], d, 1.0),
        ValueError,
        "prev_grad: expected a contiguous tensor",
    )
    yield (
        "t",
        lambda: h.step(g, g.clone(), d, torch.tensor(1.0)),
        ValueError,
        "t: expected a number or a float64 tensor",
    )
    yield "out", lambda: h.direction(g, out=torch.ones(10)[::2]), ValueError, "out: expected a contiguous tensor"
    negated = torch._neg_view(torch.ones(5))
    yield "negated", lambda: h.direction(g, out=negated), ValueError, "got a negated view"


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
