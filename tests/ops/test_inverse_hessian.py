"""`secant.InverseHessian`: learning, directions, state."""

import copy
import io
import re

import pytest
import torch

import secant
from secant import InverseHessian

F64 = torch.float64
EPS = torch.finfo(F64).eps
RULES = ["bfgs", "ssbfgs", "ssbroyden"]


def problem(n, seed=0):
    """A quadratic, and a source of vectors."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n, dtype=F64, generator=gen)
    return x @ x.T / n + 0.5 * torch.eye(n, dtype=F64), lambda: torch.randn(n, dtype=F64, generator=gen)


def taught(n, rule, pairs=5):
    """One that has learned from steps along its own directions; with the last pair, gradient and direction."""
    a, draw = problem(n)
    h, x = InverseHessian(n, rule=rule, dtype=F64), draw()
    g = a @ x
    previous, d = g.clone(), h.direction(g)
    for _ in range(pairs):
        s = 0.4 * d
        x = x + s
        g = a @ x
        y = g - previous
        h.step(g, previous, d, 0.4)
        assert h.stats.accepted == 1
    return h, s, y, g, d


@pytest.mark.parametrize("rule", RULES)
def test_what_every_member_of_the_class_has(rule):
    n = 12
    h, s, y, g, d = taught(n, rule)
    m = h.matrix()
    assert torch.equal(m, m.T)
    assert torch.linalg.eigvalsh(m)[0] > 0
    size = 100 * n * EPS * m.abs().max()  # entries are sums of some ten terms, over several updates
    assert (m @ y - s).abs().max() <= size * y.abs().sum()
    assert (m @ g + d).abs().max() <= size * g.abs().sum()
    assert torch.allclose(h.stats.gd, g @ d, rtol=1e-12, atol=0)
    assert h.count == 5
    assert (h.direction(g) - d).abs().max() <= size * g.abs().sum()
    assert (h.direction(y) + s).abs().max() <= size * y.abs().sum()


@pytest.mark.parametrize("rule", ["bfgs", "ssbroyden"])
def test_a_run_is_the_formula(rule):
    """H by itself, with the tau and phi that stats tell."""
    n = 9
    a, draw = problem(n)
    h, want, x = InverseHessian(n, rule=rule, dtype=F64), torch.eye(n, dtype=F64), draw()
    previous = a @ x
    d = h.direction(previous)
    assert torch.equal(d, -previous)
    seen = set()
    for k in range(12):
        t = 1.0 if k % 3 else 0.1
        s = t * d
        x = x + s
        g = a @ x
        y = g - previous
        h.step(g, previous, d, t)
        tau, phi = h.stats.tau, h.stats.phi
        seen.add((float(tau), float(phi)))
        sy, w = s @ y, want @ y
        q = y @ w
        v = q.sqrt() * (s / sy - w / q)
        gamma = sy / q if k == 0 else 1.0
        want = gamma / tau * (want - torch.outer(w, w) / q + phi * torch.outer(v, v)) + torch.outer(s, s) / sy
        assert torch.allclose(h.stats.yhy, q, rtol=1e-10, atol=0)
        assert (h.matrix() - want).abs().max() <= 1e-11 * want.abs().max()  # EPS, and what 12 updates make of it
    assert (len(seen) == 1) == (rule == "bfgs")


def test_an_appended_pair_makes_the_bfgs_update():
    n = 7
    a, draw = problem(n)
    one, other = InverseHessian(n, rule="ssbroyden", dtype=F64), InverseHessian(n, rule="bfgs", dtype=F64)
    for _ in range(4):
        s = draw()
        assert one.append(s, a @ s) == other.append(s, a @ s) == 1.0
    assert torch.equal(one.matrix(), other.matrix())
    before = one.matrix()
    assert one.append(s, -s) == 0.0
    assert (one.matrix() - before).abs().max() <= 4 * EPS * before.abs().max()  # the update that was due has been made
    one.reset()
    assert torch.equal(one.matrix(), torch.eye(n, dtype=F64))
    assert torch.equal(one.direction(s), -s)


def test_curvature_tol():
    s, y = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])  # cos = 0.707
    for tol, accepted in ((0.5, 1.0), (0.8, 0.0)):
        assert InverseHessian(2, curvature_tol=tol).append(s, y) == accepted


def test_state_dict_round_trip():
    one = taught(9, "ssbroyden")[0]
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two = InverseHessian(9, dtype=F64)
    two.load_state_dict(torch.load(buffer))
    a, draw = problem(9)
    for _ in range(3):
        s = draw()
        for h in (one, two):
            h.append(s, a @ s)
        assert torch.equal(one.direction(s), two.direction(s))
    assert torch.equal(one.matrix(), two.matrix())
    with pytest.raises(ValueError, match=r"state\['h'\]: expected a tensor of shape \(55,\)"):
        InverseHessian(10, dtype=F64).load_state_dict(one.state_dict())
    broken = {**one.state_dict(), "count": torch.tensor(-1, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"state\['count'\]: expected a number >= 0"):
        two.load_state_dict(broken)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_in_one_graph(rule):
    n = 8
    a, draw = problem(n)
    eager, compiled = InverseHessian(n, rule=rule, dtype=F64), InverseHessian(n, rule=rule, dtype=F64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def iterate(x, previous, direction):
        x = x + 0.3 * direction
        compiled.step(a @ x, previous, direction, 0.3)
        return x

    x = draw()
    one, two = [x, a @ x, -a @ x], [x, a @ x, -a @ x]
    for _ in range(4):
        one[0] = iterate(*one)
        two[0] = two[0] + 0.3 * two[2]
        eager.step(a @ two[0], two[1], two[2], 0.3)
        for mine, want in zip(one, two, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(eager.count, compiled.count)


def test_opcheck():
    h, g, d = InverseHessian(20), torch.randn(20), torch.randn(20)
    h.append(d, d)
    t, op = torch.ones(1, dtype=F64), torch.ops.secant.lbfgs_dense_update.default
    for rule in range(3):
        torch.library.opcheck(op, (*h._state, g, None, None, None, t, 1e-7, rule, torch.empty(20), None))
        torch.library.opcheck(op, (*h._state, None, d, g, None, t, 1e-7, rule, None, None))
        outputs = (torch.empty(20), torch.empty(20))
        torch.library.opcheck(op, (*h._state, g, d, g.clone(), d.clone(), t, 1e-7, rule, *outputs))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends_agree(backend):
    want = taught(11, "ssbroyden")[0].matrix()
    with secant.use_backend(backend):
        assert (taught(11, "ssbroyden")[0].matrix() - want).abs().max() <= 1e-12 * want.abs().max()


def test_an_update_tells_autograd():
    h = InverseHessian(3)
    versions = [x._version for x in h._state]
    h.append(torch.ones(3), torch.ones(3))
    assert all(x._version > v for x, v in zip(h._state, versions, strict=True))


def test_errors_name_the_argument():
    h, g = InverseHessian(5), torch.randn(5)
    for call, error, message in [
        (lambda: InverseHessian(0), ValueError, "InverseHessian: n: expected an integer, 1 or more, got 0"),
        (lambda: InverseHessian(2, rule="dfp"), ValueError, "InverseHessian: rule: expected one of ('bfgs', "),
        (lambda: InverseHessian(2, dtype=torch.bfloat16), TypeError, "dtype: expected torch.float32 or torch.float64"),
        (lambda: InverseHessian(2, curvature_tol=1.0), ValueError, "curvature_tol: expected a number in [0, 1)"),
        (lambda: InverseHessian(2, device="meta"), ValueError, "device: expected a device with memory, got meta"),
        (lambda: h.direction(torch.ones(4)), ValueError, "direction: grad: expected shape (5,), got shape (4,)"),
        (lambda: h.append(g.double(), g), TypeError, "append: s: expected dtype float32, got torch.float64"),
        (lambda: h.step(g, g, g.clone(), 1.0), ValueError, "step: prev_grad: expected no overlap"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            call()
    assert copy.deepcopy(h).matrix().equal(h.matrix())
