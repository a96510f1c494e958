"""The Jacobian as a rectangular operator, against torch.func.jacrev and row-by-row backward."""

from __future__ import annotations

import pytest
import scipy.sparse.linalg
import torch
from torch import nn

from curvature_problems import ROUNDING, Residual, Transformer, cnn, data, dense, dense_jacobian, error, mlp
from secant.curvature import GGN, Fisher, Jacobian

F64 = torch.float64
MODES = ["auto", "double-backward", "forward"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _net(name):
    if name == "cnn":
        return cnn(), torch.randn(3, 1, 5, 5, dtype=F64)
    net = mlp() if name == "mlp" else Residual().double()
    return net, data()[0].flatten(1)


def _jacrev(net, f):
    """(m, n) by torch.func.jacrev of f(outputs)."""
    params = dict(net.named_parameters())

    def outputs(*values):
        return f(lambda x: torch.func.functional_call(net, dict(zip(params, values, strict=True)), (x,))).reshape(-1)

    blocks = torch.func.jacrev(outputs, argnums=tuple(range(len(params))))(*(p.detach() for p in params.values()))
    return torch.cat([block.flatten(1) for block in blocks], 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual"])
def test_the_matrix_is_that_of_jacrev(name, mode):
    net, x = _net(name)
    params = list(net.parameters())
    t = torch.randn_like(net(x))
    J = Jacobian(lambda: (net(x) - t) / 3, params, mode=mode)
    want = _jacrev(net, lambda model: (model(x) - t) / 3)
    m, n = want.shape
    assert J.shape == (m, n)
    assert not J.symmetric
    assert J.T.shape == J.mT.shape == (n, m)
    assert J.T.T is J
    v, V = torch.randn(n, dtype=F64), torch.randn(n, 5, dtype=F64)
    u, U = torch.randn(m, dtype=F64), torch.randn(m, 5, dtype=F64)
    for got, right in (
        (J @ v, want @ v), (J.matvec(v), want @ v), (J @ V, want @ V), (J.matmat(V), want @ V), (J.T @ u, want.T @ u),
        (J.mT @ U, want.T @ U), (J.rmatvec(u), want.T @ u), (J.rmatmat(U), want.T @ U), (u @ J, u @ want),
        (U.T @ J, U.T @ want), (J.to_dense(), want), (J.T.to_dense(), want.T), (J[:, [3, 0]], want[:, [3, 0]]),
        (J[2], want[2]), (J @ params, want @ torch.cat([p.detach().reshape(-1) for p in params])),
    ):  # fmt: skip
        assert got.shape == right.shape
        assert not got.requires_grad
        assert error(got, right) < ROUNDING
    if name == "mlp" and mode == "auto":
        assert J.mode == "r-operator"  # outputs less a constant, times another
    if mode != "auto":
        assert J.mode == mode


@pytest.mark.parametrize("mode", MODES)
def test_several_tensors_are_joined_in_their_order(mode):
    net, x = _net("mlp")
    params = list(net.parameters())
    extra = torch.randn(3, 2, dtype=F64, requires_grad=True)
    unused = torch.ones(4, dtype=F64, requires_grad=True)
    free = torch.randn(2, dtype=F64)

    def closure():
        return net(x) - 1, params[0].sum(), 0.5 * extra.T, free

    all_of_them = [params[0], unused, *params[1:], extra]
    J = Jacobian(closure, all_of_them, mode=mode)
    joined = torch.cat([r.reshape(-1) for r in closure()])
    want = torch.cat([dense_jacobian(joined[:-2], all_of_them), torch.zeros(2, J.shape[1], dtype=F64)])
    assert error(J.to_dense(), want) < ROUNDING
    assert error(J @ torch.eye(J.shape[1], dtype=F64), want) < ROUNDING
    columns = slice(params[0].numel(), params[0].numel() + 4)
    assert (J[:, columns] == 0).all()
    assert (J[-2:] == 0).all()
    assert error(Jacobian(lambda: list(closure()), all_of_them, mode=mode).to_dense(), want) < ROUNDING


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mode", ["auto", "forward"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_batches_are_rows_behind_each_other(name, mode, keep):
    net, x = _net(name)
    params = list(net.parameters())
    batches, count = [x[:2], x[2:3], x[3:]], []

    def closure(batch):
        count.append(1)
        return net(batch)

    J = Jacobian(closure, params, batches=batches, mode="double-backward" if mode == "auto" else mode, keep_graphs=keep)
    want = dense_jacobian(net(x), params)
    m, n = want.shape
    assert J.shape == (m, n)
    V, U = torch.randn(n, 3, dtype=F64), torch.randn(m, 3, dtype=F64)
    assert error(J @ V, want @ V) < ROUNDING
    assert error(J.T @ U, want.T @ U) < ROUNDING
    assert error(dense(J.T @ J), want.T @ want) < ROUNDING
    if mode == "auto":
        assert len(count) == 3 if keep else len(count) > 3
    with torch.no_grad():
        params[0].mul_(1.5)
    assert error(J @ V, dense_jacobian(net(x), params) @ V) < ROUNDING
    with pytest.raises(ValueError, match="Jacobian: batches: expected at least one, got none"):
        _ = Jacobian(closure, params, batches=[]).shape


def test_one_evaluation_serves_the_shape_and_all_products():
    net, x = _net("mlp")
    count = []
    J = Jacobian(lambda: count.append(1) or net(x), net.parameters())
    m, n = J.shape
    J @ torch.ones(n, dtype=F64)
    J.T @ torch.ones(m, 2, dtype=F64)
    (J.T @ J).damped(1.0).inverse() @ torch.ones(n, dtype=F64)
    assert len(count) == 1
    rows = [x]
    K = Jacobian(lambda: net(rows[0]), net.parameters())
    assert K.shape[0] == m
    rows[0] = x[:2]
    with torch.no_grad():
        next(net.parameters()).mul_(1.5)
    assert K.shape[0] == 6  # another point has rows of its own


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_gauss_newton_of_half_the_squared_sum(name, mode):
    net, x = _net(name)
    params = list(net.parameters())
    t = torch.randn(7, 3, dtype=F64)

    def pair():
        r = net(x) - t
        return r, 0.5 * r.square().sum()

    J, G = Jacobian(lambda: net(x) - t, params, mode=mode), GGN(pair, params)
    product = J.T @ J
    assert product.symmetric
    assert error(dense(product), dense(G)) < ROUNDING
    assert error(product.diag(None).value, G.diag().value) < 10 * ROUNDING
    assert error(product.eigs(1).values, G.eigs(1).values) < 1e-7
    b = torch.randn(len(dense(G)), dtype=F64)
    got = product.damped(0.1).inverse(tol=1e-13) @ b
    assert error(got, torch.linalg.solve(dense(G) + 0.1 * torch.eye(len(b), dtype=F64), b)) < 1e-9
    residual = (net(x) - t).detach().reshape(-1)
    found = scipy.sparse.linalg.lsmr(J.to_scipy(), residual.numpy(), damp=0.1, atol=1e-14, btol=1e-14, maxiter=1000)
    want = torch.linalg.solve(dense(G) + 0.01 * torch.eye(len(b), dtype=F64), J.T @ residual)
    assert error(torch.as_tensor(found[0]), want) < 1e-7


def test_not_a_number_stays_in_its_rows():
    for name in ("mlp", "residual"):
        net, x = _net(name)
        params = list(net.parameters())
        want = dense_jacobian(net(x), params)
        bad = x.clone()
        bad[2, 1] = float("nan")
        for mode in ("double-backward", "forward", *(["r-operator"] if name == "mlp" else [])):
            J = Jacobian(lambda net=net, bad=bad: net(bad), params, mode=mode)
            for V in (torch.randn(J.shape[1], dtype=F64), torch.randn(J.shape[1], 4, dtype=F64)):
                got = J @ V
                assert torch.isnan(got[6:9]).any()
                good = [i for i in range(21) if not 6 <= i < 9]
                assert error(got[good], (want @ V)[good]) < ROUNDING
            # Half the weights of the first layer meet the NaN only by its row of the outputs.
            assert torch.isnan(J.T @ torch.ones(21, dtype=F64)).any()


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
def test_any_model_and_low_precision():
    net = Transformer().double()
    tokens = torch.randint(0, 11, (2, 3))
    params = [net.qkv.weight, net.norm.weight, net.mlp[0].bias]
    J = Jacobian(lambda: net(tokens), params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = dense_jacobian(net(tokens), params)
    # LayerNorm and attention divide and exponentiate: some hundreds of roundings rather than some tens.
    assert error(J.to_dense(), want) < 10 * ROUNDING
    assert error(J @ torch.eye(J.shape[1], dtype=F64), want) < 10 * ROUNDING
    single, x = mlp(), data()[0]
    want = dense_jacobian(single(x), list(single.parameters()))
    for dtype, eps in ((torch.float32, 2**-23), (torch.bfloat16, 2**-7)):
        low = single.to(dtype)
        K = Jacobian(lambda low=low, dtype=dtype: low(x.to(dtype)).float(), low.parameters())
        assert K.to_dense().dtype is dtype
        assert error(K.to_dense().double(), want) < 20 * eps  # three layers, each rounded a few times


def test_dropout_keeps_its_mask():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x = data()[0].flatten(1)
    for mode in ("double-backward", "forward"):
        J = Jacobian(lambda: net(x), net.parameters(), mode=mode)
        state = torch.get_rng_state()
        first = J @ torch.eye(J.shape[1], dtype=F64)
        torch.rand(5)
        assert error(J.to_dense(), first) < ROUNDING
        torch.set_rng_state(state)
        assert error(first, dense_jacobian(net(x), list(net.parameters()))) < ROUNDING


def test_the_diagonal_of_a_square_jacobian():
    w = torch.rand(5, dtype=F64, requires_grad=True)
    a = torch.randn(5, 5, dtype=F64)
    J = Jacobian(lambda: a @ w.square(), [w])
    want = a * 2 * w.detach()
    assert error(J.diag().value, want.diagonal()) < ROUNDING
    assert error((J + 0.5).to_dense(), want + 0.5 * torch.eye(5, dtype=F64)) < ROUNDING
    assert abs(J.trace(4000).value - float(want.trace())) < 5 * J.trace(4000).stderr


def _w():
    return torch.ones(3, requires_grad=True)


W = _w()


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda: Jacobian(1, [W]), TypeError, "Jacobian: closure: expected a function"),
        (lambda: Jacobian(lambda: W, [W], mode="forward-over-reverse"), ValueError, "mode: expected 'auto'"),
        (lambda: Jacobian(lambda: 1.0, [W]) @ W, TypeError, r"expected residuals \(a tensor or several\), got float"),
        (lambda: Jacobian(lambda: (W, 1.0), [W]) @ W, TypeError, "got Tensor, float"),
        (lambda: Jacobian(lambda: (), [W]) @ W, TypeError, r"expected residuals \(a tensor or several\), got tuple"),
        (lambda: Jacobian(lambda: W.to(torch.complex64), [W]) @ W, ValueError, "closure: expected a dense real tensor"),
        (lambda: Jacobian(lambda: (W, W.long()), [W]) @ W, ValueError, r"residuals\[1\]: expected a dense real tensor"),
        (lambda: Jacobian(lambda: W.detach(), [W]) @ W, ValueError, "expected outputs with their graph"),
        (lambda: Jacobian(lambda: W * W, [_w()]) @ W, ValueError, "params: expected tensors that the closure uses"),
        (
            lambda: Jacobian(lambda: W * W, [W]) @ torch.ones(4),
            ValueError,
            r"Jacobian.matvec: v: expected shape \(3,\)",
        ),
        (lambda: Jacobian(lambda: W[:2] * 2, [W]).T @ W, ValueError, r"Jacobian.T.matvec: v: expected shape \(2,\)"),
        (lambda: Jacobian(lambda: W[:2] * 2, [W]).eigs(1), ValueError, "operator: expected a symmetric matrix"),
        (lambda: Jacobian(lambda: W[:2] * 2, [W]).diag(), ValueError, "operator: expected a square matrix"),
        (lambda: Jacobian(lambda: W[:2] * 2, [W]).inverse(), ValueError, "operator: expected a symmetric matrix"),
        (lambda: Jacobian.of(abs, 1), TypeError, "Jacobian.of: model: expected an nn.Module"),
    ],
)
def test_bad_arguments_are_named(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


def test_rows_that_change_without_a_change_of_the_point_are_named():
    x = torch.ones(4)
    rows = [3]
    J = Jacobian(lambda: (W * W).sum() * x[: rows[0]], [W], keep_graphs=False)
    assert J.shape == (3, 3)
    rows[0] = 4
    J.refresh()
    with pytest.raises(ValueError, match="Jacobian: closure: expected 3 residuals, as before, got 4 or more"):
        J.T @ torch.ones(3)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_the_other_operators_see_the_same_outputs(name):
    """F with gaussian likelihood has the expectation J^T J: with many samples it comes close."""
    net, x = _net(name)
    params = list(net.parameters())
    fisher = Fisher(lambda: net(x), params, likelihood="gaussian", samples=4000, reduction="sum")
    J = Jacobian.of(net, x)
    want = dense(J.T @ J)
    # Entries are means of 4,000 products of normals; 4 deviations of each, and their scale by that of the whole.
    assert float((dense(fisher) - want).norm() / want.norm()) < 4 * (J.shape[0] / 4000) ** 0.5


def test_shifts_are_read_only_above_the_last_layer():
    net, x = _net("mlp")
    params = list(net.parameters())
    t = torch.randn(7, 3, dtype=F64)
    wide = torch.randn(2, 7, 3, dtype=F64)
    cases = {
        "r-operator": [
            lambda: net(x) - t, lambda: t - net(x), lambda: torch.add(t, net(x), alpha=-2.0), lambda: net(x) + 1.5,
            lambda: 1.5 - net(x), lambda: torch.tanh(2 * (net(x) - t[0])) + t,
            lambda: torch.sub(net(x), t, alpha=3.0),
        ],
        "double-backward": [lambda: net(x) - wide, lambda: net(x) - net(x) ** 2],
    }  # fmt: skip
    for mode, closures in cases.items():
        for closure in closures:
            J = Jacobian(closure, params, mode="auto" if mode == "r-operator" else mode)
            want = dense_jacobian(closure(), params)
            assert error(J.to_dense(), want) < ROUNDING
            assert error(J @ torch.eye(J.shape[1], dtype=F64), want) < ROUNDING
            assert J.mode == mode
            if mode != "r-operator":
                with pytest.raises(ValueError, match="'r-operator', not for"):
                    Jacobian(closure, params, mode="r-operator") @ torch.ones(J.shape[1], dtype=F64)
