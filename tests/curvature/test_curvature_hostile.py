"""Tensors and numbers that are none, NaN, transforms around a product, and the states that torch may be in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, Residual, data, dense, dense_hessian, dense_jacobian, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian
from secant.result import Status

F64 = torch.float64
HUGE, LONG = 10**400, 10**5000  # no float; and no string


def _name(x):
    return "long" if isinstance(x, int) and x > 10**1000 else None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _hessian(w=None):
    w = torch.randn(4, requires_grad=True) if w is None else w
    return Hessian(lambda: (w**4).sum(), [w])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [Hessian, GGN, Fisher, EmpiricalFisher])
def test_tensors_that_cannot_be_parameters_are_named(make):
    for bad, error_type, message in (
        (
            torch.empty(3, device="meta", requires_grad=True),
            ValueError,
            "expected a dense tensor with memory, got a meta",
        ),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True),
            ValueError,
            "expected a dense tensor with memory, got a nested",
        ),
        (torch.eye(3).to_sparse().requires_grad_(), ValueError, "expected a dense"),
        (torch.ones(3, dtype=torch.complex64, requires_grad=True), TypeError, "complex is not supported"),
        (torch.ones(3, dtype=torch.int64), TypeError, "expected dtype .* got torch.int64"),
        (torch.ones(3), ValueError, "expected a tensor that requires gradients"),
        (3.0, TypeError, "expected a torch.Tensor, got float"),
        (None, TypeError, "expected a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(error_type, match=rf"{make.__name__}: params\[0\]: .*{message}"):
            make(lambda: 0, [bad])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("v", "error_type", "message"),
    [
        (torch.ones(3), ValueError, r"expected shape \(4,\), got shape \(3,\)"),
        (torch.ones(4, dtype=F64), TypeError, "expected dtype float32, got torch.float64"),
        (torch.ones(4, dtype=torch.int64), TypeError, "expected dtype float32, got torch.int64"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "expected dtype float32, got torch.complex64"),
        (torch.ones(4, device="meta"), ValueError, "expected device cpu, .* got meta"),
        (torch.ones(4).to_sparse(), ValueError, "expected a dense"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(2)]), ValueError, "expected a dense .* nested"),
        (torch.tensor(1.0), ValueError, r"expected shape \(4,\), got shape \(\)"),
        (torch.ones(2, 4, 1), ValueError, r"expected shape \(4,\)"),
        (1.0, TypeError, "expected a torch.Tensor, got float"),
        (None, TypeError, "expected a torch.Tensor, got NoneType"),
        ("v", TypeError, "expected a torch.Tensor, got str"),
    ],
)
def test_vectors_that_do_not_fit_are_named(v, error_type, message):
    H = _hessian()
    for call in (H.matvec, lambda v: H @ v, lambda v: (H + 1.0) @ v, lambda v: v @ H):
        if call is not H.matvec and isinstance(v, torch.Tensor) and v.is_nested:
            continue  # torch asks a nested tensor for its shape before the operator does
        with pytest.raises(error_type, match=message):
            call(v)


@pytest.mark.parametrize("bad", [True, 0, -1, HUGE, LONG, 2.0, float("nan"), "3", torch.tensor(3)], ids=_name)
def test_counts_that_are_none_are_named(bad):
    H = _hessian()
    for name, call in (
        ("num_probes", lambda: H.diag(bad)),
        ("num_probes", lambda: H.trace(bad)),
        ("num_probes", lambda: H.spectrum(bad)),
        ("steps", lambda: H.spectrum(2, steps=bad)),
        ("k", lambda: H.eigs(bad)),
        ("max_iter", lambda: H.eigs(1, max_iter=bad)),
        ("max_iter", lambda: H.inverse(max_iter=bad)),
        ("samples", lambda: Fisher(lambda: 0, H.params.tensors, samples=bad)),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"{name}: expected an int"):
            call()


@pytest.mark.parametrize("bad", [True, HUGE, LONG, float("nan"), float("inf"), "x", None, 1j, torch.ones(2)], ids=_name)
def test_numbers_that_are_none_are_named(bad):
    H = _hessian()
    for name, call in (
        ("damping", lambda: H + bad),
        ("damping", lambda: H - bad),
        ("damping", lambda: H.inverse(damping=bad)),
        ("weights", lambda: Hessian(lambda b: 0, H.params.tensors, batches=[1], weights=[bad])),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"{name}: expected "):
            call()
    if bad is not None:
        with pytest.raises((TypeError, ValueError), match="tol: expected a number between 0 and 1, or None"):
            H.eigs(1, tol=bad)


@pytest.mark.parametrize("bad", [True, HUGE, LONG, -(2**63) - 1, 2**64, 1.5, None, "0"], ids=_name)
def test_seeds_that_are_none_are_named(bad):
    H = _hessian()
    for call in (H.diag, H.trace, H.eigs, H.spectrum):
        with pytest.raises((TypeError, ValueError), match="seed: expected an int"):
            call(2, seed=bad)
    with pytest.raises((TypeError, ValueError), match="seed: expected an int"):
        Fisher(lambda: 0, H.params.tensors, seed=bad)
    assert H.trace(2, seed=-1).num_probes == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["auto", *Hessian._MODES])
def test_a_loss_that_is_not_finite(value, mode):
    w = torch.randn(30, dtype=F64, requires_grad=True)
    factor = torch.tensor(value, dtype=F64)
    H = Hessian(lambda: (factor * w**4).sum(), [w], mode=mode)
    assert not torch.isfinite(H @ torch.ones(30, dtype=F64)).any()
    found = H.eigs(2)
    assert not found.converged
    assert torch.isnan(found.values).all()
    assert torch.isnan(found.residuals).all()
    assert found.vectors.shape == (30, 2)
    assert torch.isnan(found.vectors).all()
    trace = H.trace(10)
    assert torch.isnan(torch.tensor([trace.value, trace.stderr])).all() or trace.value == value
    assert not torch.isfinite(H.diag(10).value).any()
    with pytest.raises(RuntimeError, match=r"Hessian\.spectrum: expected finite products, got NaN or infinity"):
        H.spectrum(2)
    solve = H.inverse()
    solve @ torch.ones(30, dtype=F64)
    assert solve.status.tolist() == [Status.NOT_FINITE]
    # The point after it is as any other, and its mode is chosen there.
    factor.fill_(1.0)
    H.refresh()
    assert error(dense(H), torch.diag(12 * w.detach() ** 2)) < ROUNDING
    assert "disagrees" not in str(H.timings)


def test_nan_in_a_ggn():
    net = mlp()
    x, y = data()
    x[0, 0, 0] = float("nan")
    G = GGN.of(net, nn.CrossEntropyLoss(), x, y)
    assert not torch.isfinite(G @ torch.ones(G.shape[0], dtype=F64)).all()
    assert not torch.isfinite(G.diag().value).all()
    assert not G.eigs(1).converged
    squares = GGN.of(net, lambda f, _: (f**4).sum(), x, y)
    assert not torch.isfinite(squares.diag().value).all()


def _closures(net, x, y):
    return {
        Hessian: lambda: F.cross_entropy(net(x), y),
        GGN: lambda: (f := net(x), F.cross_entropy(f, y)),
        Fisher: lambda: net(x),
        EmpiricalFisher: lambda: (f := net(x), F.cross_entropy(f, y, reduction="none")),
    }


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic fill": lambda: _Deterministic(),
}


class _Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True)  # fills what is empty with NaN

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("make", [Hessian, GGN, Fisher, EmpiricalFisher])
@pytest.mark.parametrize("architecture", ["layers", "residual"])
@pytest.mark.parametrize("state", STATES)
def test_products_do_not_depend_on_the_state_of_the_caller(state, architecture, make):
    net = mlp() if architecture == "layers" else Residual().double()
    dtype = torch.float32 if state == "autocast" else F64  # which leaves float64 alone
    net, (x, y) = net.to(dtype), data()
    x = x.flatten(1).to(dtype)
    bound = ROUNDING if dtype is F64 else 50 * torch.finfo(dtype).eps
    for mode in ("auto", *make._MODES):
        if mode == "forward-over-reverse" and dtype is not F64:
            continue
        closure, params = _closures(net, x, y)[make], list(net.parameters())
        outside = make(closure, params, mode=mode)
        v = torch.randn(outside.shape[0], 2, dtype=dtype)
        want = outside @ v
        with STATES[state]():
            within = make(closure, params, mode=mode)
            got = within @ v
            pairs = within.eigs(1)
            diagonal = within.diag(2).value
        assert error(got, want) < bound
        assert not got.is_inference()
        assert pairs.converged
        assert error(diagonal, outside.diag(2).value) < 10 * bound
        assert error(within @ v, want) < bound  # from the graph that was made there
        if mode == "auto":
            with STATES[state]():
                assert error(within.inverse(damping=10.0) @ v, outside.inverse(damping=10.0) @ v) < 10 * bound
                diagonal = within.diag(None).value
            assert error(diagonal, outside.diag(None).value) < 10 * bound


def test_autocast_within_the_closure_is_the_closures():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(x), y)

    params = list(net.parameters())
    got, want = dense(Hessian(loss, params)), dense(Hessian(lambda: F.cross_entropy(net(x), y), params))
    assert error(got, want) < 30 * 2**-8
    assert error(got, want) > 1e-5
    ours = dense_hessian(loss(), params)
    assert error(got, ours) < 30 * 2**-8


@pytest.mark.parametrize("make", [Hessian, GGN, Fisher, EmpiricalFisher])
def test_transforms_around_a_product_are_refused(make):
    net = mlp()
    x, y = data()
    operator = make(_closures(net, x, y)[make], net.parameters())
    v = torch.ones(operator.shape[0], dtype=F64)
    operator @ v
    for call in (
        lambda: torch.func.grad(lambda u: u @ (operator @ u))(v),
        lambda: torch.func.jvp(lambda u: operator @ u, (v,), (v,)),
        lambda: torch.func.vmap(lambda u: operator @ u)(torch.stack([v, v])),
        lambda: torch.func.vjp(lambda u: operator.trace(2).value * u, v),
        lambda: torch.func.jacrev(lambda u: (operator + 1.0) @ u)(v),
        lambda: torch.func.grad(lambda u: u.sum() * operator.diag(None).value.sum())(v),
        lambda: torch.autograd.functional.jacobian(lambda u: operator @ u, v, vectorize=True, strategy="forward-mode"),
    ):
        with pytest.raises(
            RuntimeError, match=r"expected a product outside of torch\.func transforms and forward mode"
        ):
            call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, v)
        with pytest.raises(RuntimeError, match=r"outside of torch\.func transforms and forward mode"):
            operator @ dual
    assert not (operator @ v.requires_grad_()).requires_grad  # documented


def test_parameters_that_were_frozen_and_thawed():
    net = mlp()
    x, y = data()
    params = list(net.parameters())
    for p in params:
        p.requires_grad_(False)
    for make, closure in _closures(net, x, y).items():
        with pytest.raises(ValueError, match=r"params\[0\]: expected a tensor that requires gradients"):
            make(closure, params)
    for p in params[2:]:
        p.requires_grad_()
    H = Hessian(lambda: F.cross_entropy(net(x), y), params[2:])
    assert error(dense(H), dense_hessian(F.cross_entropy(net(x), y), params[2:])) < ROUNDING
    jacobian = dense_jacobian(net(x), params[2:])
    F_ = Fisher(lambda: net(x), params[2:], likelihood="gaussian", samples=1, seed=1)
    assert dense(F_).shape == (jacobian.shape[1],) * 2
