"""Products from either side, lists of tensors, blocks, exact diagonals, inverses, probes from two distributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secant
from curvature_problems import ROUNDING, Residual, Transformer, cnn, data, dense, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian, LinearOperator
from secant.result import Status

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Matrix(LinearOperator):
    """A dense symmetric matrix that counts its products."""

    def __init__(self, a: torch.Tensor) -> None:
        super().__init__(len(a), a.dtype, a.device)
        self.a, self.count = a, 0

    def _rows(self, vectors):
        self.count += len(vectors)
        return vectors @ self.a


def _symmetric(n: int, dtype=F64) -> torch.Tensor:
    a = torch.randn(n, n, dtype=F64)
    return (a + a.T).to(dtype)


def _hessian():
    net = mlp()
    x, y = data()
    return Hessian.of(net, nn.CrossEntropyLoss(), x, y), list(net.parameters())


def test_products_from_the_left():
    a = _symmetric(6)
    A = Matrix(a)
    v, V = torch.randn(6, dtype=F64), torch.randn(3, 6, dtype=F64)
    assert error(v @ A, v @ a) < ROUNDING
    assert error(V @ A, V @ a) < ROUNDING
    assert A.T is A
    assert A.adjoint() is A
    assert error(A.to_dense(), a) < ROUNDING
    with pytest.raises(ValueError, match=r"Matrix.matmat: v: expected shape \(6, k\), got shape \(6, 3\)|\(5, 3\)"):
        torch.randn(3, 5, dtype=F64) @ A
    for call in (lambda: v.numpy() @ A, lambda: A @ v.numpy(), lambda: 2.0 @ A):
        with pytest.raises(TypeError, match=r"Matrix.matvec: v: expected a torch.Tensor, got (ndarray|float)"):
            call()


def test_lists_of_tensors_in_and_out():
    H, params = _hessian()
    matrix = dense(H)
    parts = [torch.randn_like(p) for p in params]
    want = matrix @ torch.cat([p.reshape(-1) for p in parts])
    for operator, shift in ((H, 0.0), (H + 0.5, 0.5)):
        for got in (operator @ parts, parts @ operator, tuple(parts) @ operator, operator.T @ parts):
            assert isinstance(got, list)
            assert [x.shape for x in got] == [p.shape for p in params]
            flat = torch.cat([x.reshape(-1) for x in got])
            assert error(flat, want + shift * torch.cat([p.reshape(-1) for p in parts])) < ROUNDING
    columns = [torch.randn(*p.shape, 4, dtype=F64) for p in params]
    got = H @ columns
    assert [x.shape for x in got] == [x.shape for x in columns]
    want = matrix @ torch.cat([x.reshape(-1, 4) for x in columns])
    assert error(torch.cat([x.reshape(-1, 4) for x in got]), want) < ROUNDING
    rows = [x.movedim(-1, 0) for x in columns]
    got = rows @ H
    assert [x.shape for x in got] == [x.shape for x in rows]
    assert error(torch.cat([x.reshape(4, -1) for x in got], 1), want.T) < ROUNDING


def test_bad_lists_are_named():
    H, params = _hessian()
    parts = [torch.zeros_like(p) for p in params]
    k = [torch.zeros(*p.shape, 2, dtype=F64) for p in params]
    for v, error_type, message in (
        (parts[:-1], ValueError, "Hessian.matmul: v: expected 5 tensors, one per parameter, got 4"),
        ([*parts[:-1], parts[0]], ValueError, r"v\[4\]: expected shape \(3,\) or \(3, k\), got shape \(5, 4\)"),
        ([*parts[:-1], k[-1]], ValueError, "v: expected tensors of one number of vectors"),
        ([*parts[:-1], parts[-1].float()], TypeError, r"v\[4\]: expected dtype float64, got torch.float32"),
        ([*parts[:-1], 1.0], TypeError, r"v\[4\]: expected a torch.Tensor, got float"),
    ):
        with pytest.raises(error_type, match=message):
            H @ v
    with pytest.raises(ValueError, match=r"v\[0\]: expected shape \(5, 4\) or \(k, 5, 4\)"):
        k @ H
    with pytest.raises(TypeError, match="expected a tensor, got a list: this operator is over flat vectors"):
        Matrix(_symmetric(3)) @ [torch.ones(3, dtype=F64)]


CHOICES = [
    slice(2, 5), slice(None), slice(None, None, -2), slice(5, 2), [4, 0, 0, -1], range(3), torch.tensor([1, 5]),
    torch.arange(8) % 3 == 0, [], (2, 7),
]  # fmt: skip


def test_blocks_are_those_of_the_matrix():
    a = _symmetric(8)
    A = Matrix(a)
    for rows, columns in itertools.product(CHOICES, CHOICES):
        r, c = (
            torch.arange(8)[
                list(range(8))[x] if isinstance(x, slice) else x if isinstance(x, torch.Tensor) else list(x)
            ]
            for x in (rows, columns)
        )
        want = a[r][:, c]
        A.count = 0
        got = A[rows, columns]
        assert A.count == min(len(r), len(c))
        assert torch.equal(got, want)
        S = A.submatrix(rows, columns)
        assert S.shape == got.shape == (len(r), len(c))
        v, V = torch.randn(len(c), dtype=F64), torch.randn(len(c), 3, dtype=F64)
        u = torch.randn(len(r), dtype=F64)
        for left, right in ((S @ v, want @ v), (S @ V, want @ V), (u @ S, u @ want), (S.T @ u, want.T @ u)):
            assert left.shape == right.shape
            assert torch.allclose(left, right, rtol=ROUNDING, atol=ROUNDING)
        assert torch.equal(S.adjoint().to_dense(), want.T)
    assert torch.equal(A[3], a[3])
    assert torch.equal(A[-1, 2], a[-1, 2])
    assert torch.equal(A[:, 2], a[:, 2])
    assert torch.equal(A[torch.tensor(1), 2:4], a[1, 2:4])
    assert torch.equal(torch.stack(list(A)), a)


@pytest.mark.parametrize(
    ("key", "error_type", "message"),
    [
        (8, IndexError, r"Matrix\[\]: rows: expected indices from -8 to 7, got 8"),
        ((0, -9), IndexError, "columns: expected indices from -8 to 7, got -9"),
        ((0, 10**400), IndexError, "an int of more than 20 digits"),
        (True, TypeError, "rows: expected an index, a slice"),
        (1.0, TypeError, "rows: expected an index, a slice"),
        (torch.tensor([1.0]), TypeError, "rows: expected an index, a slice"),
        (torch.ones(7, dtype=torch.bool), TypeError, "a mask of 8"),
        (slice(0.5, 2), TypeError, "rows: expected an index, a slice"),
        (slice(0, 2, 0), TypeError, "rows: expected an index, a slice"),
        ((1, 2, 3), IndexError, "index: expected rows, or rows and columns, got 3 of them"),
        (None, TypeError, "rows: expected an index, a slice"),
    ],
)
def test_bad_indices_are_named(key, error_type, message):
    with pytest.raises(error_type, match=message):
        Matrix(_symmetric(8))[key]


# Exact diagonals ------------------------------------------------------------------------------------------------------


def _outputs(name):
    if name == "sequences":  # several rows of the layers for one prediction, and rows of another length
        net = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(-1, (2, 3)), nn.Linear(3, 2), nn.Flatten()
        ).double()
        x = torch.randn(5, 4, dtype=F64)
    elif name == "shared rows":  # the loss has rows that the layers have not
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Unflatten(-1, (2, 3)), nn.Flatten(0, 1))
        net, x = net.double(), torch.randn(4, 4, dtype=F64)
    elif name == "cnn":
        net, x = cnn(), torch.randn(3, 1, 5, 5, dtype=F64)
    elif name == "residual":
        net, x = Residual().double(), torch.randn(5, 4, dtype=F64)
    else:
        net, x = mlp(), data(6)[0]
    return net, x, list(net.parameters())


@pytest.mark.parametrize("loss", ["cross-entropy", "weighted", "squares", "negative", "coupled", "none"])
@pytest.mark.parametrize("name", ["mlp", "sequences", "shared rows", "cnn", "residual"])
def test_exact_diagonal_of_the_ggn(name, loss):
    net, x, params = _outputs(name)
    n, classes = net(x).shape
    y = torch.randint(0, classes, (n,))
    weight = torch.linspace(0.5, 2.0, classes, dtype=F64)

    def closure():
        outputs = net(x)
        return outputs, {
            "cross-entropy": lambda: F.cross_entropy(outputs, y),
            "weighted": lambda: (
                -2 * F.cross_entropy(outputs, y.where(y > 0, torch.tensor(-100)), weight, reduction="sum")
            ),
            "squares": lambda: F.mse_loss(outputs, torch.ones_like(outputs)),
            "negative": lambda: (torch.sin(outputs) * torch.sin(outputs.flip(1))).sum(),
            "coupled": lambda: outputs.mean(0).square().sum() + outputs.sum().sin(),
            "none": lambda: outputs.sum(),
        }[loss]()

    G = GGN(closure, params, keep_graphs=loss != "squares")
    found = G.diag()
    matrix = dense(G)
    assert (found.stderr == 0).all()
    largest = max(float(matrix.diagonal().abs().max()), 1e-300)
    assert float((found.value - matrix.diagonal()).abs().max()) < 10 * ROUNDING * largest
    assert float((G.diag(None).value - found.value).abs().max()) < ROUNDING * largest
    assert float(((G + 0.5).diag(None).value - 0.5 - matrix.diagonal()).abs().max()) < 10 * ROUNDING * max(largest, 1.0)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("name", ["mlp", "sequences", "residual"])
def test_exact_diagonal_of_the_fisher(name, likelihood):
    net, x, params = _outputs(name)
    operator = Fisher(lambda: net(x), params, likelihood=likelihood, samples=3, seed=5)
    assert error(operator.diag().value, dense(operator).diagonal()) < 10 * ROUNDING


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mlp", "sequences", "residual"])
def test_exact_diagonal_of_the_empirical_fisher(name, reduction):
    net, x, params = _outputs(name)
    net = nn.Sequential(net, nn.Unflatten(-1, (-1, 1)))

    def closure():
        outputs = net(x)
        return outputs, outputs.square().sum((1, 2))

    operator = EmpiricalFisher(closure, params, reduction=reduction)
    assert error(operator.diag().value, dense(operator).diagonal()) < 10 * ROUNDING


def test_exact_diagonal_adds_over_batches_and_takes_few_passes(monkeypatch):
    net, x, params = _outputs("mlp")
    y = data(6)[1]
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]

    def closure(batch):
        outputs = net(batch[0])
        return outputs, F.cross_entropy(outputs, batch[1])

    G = GGN(closure, params, batches=batches, weights=[1 / 3, 2 / 3])
    matrix = dense(G)

    def no_product(*_):
        raise AssertionError("a product was made")

    monkeypatch.setattr("secant.curvature._matrices.Sandwich.product", no_product)
    assert error(G.diag().value, matrix.diagonal()) < 10 * ROUNDING


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
def test_exact_diagonal_is_that_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    net, x, params = _outputs("mlp")
    y = data(6)[1]
    loss = nn.CrossEntropyLoss()
    theirs = curvlinops.GGNLinearOperator(net, loss, params, [(x, y)], check_deterministic=False)
    want = torch.as_tensor(theirs @ torch.eye(theirs.shape[0], dtype=F64)).diagonal()
    assert error(GGN.of(net, loss, x, y).diag().value, want) < 10 * ROUNDING


def test_exact_diagonal_of_any_operator():
    a = _symmetric(37)
    A = Matrix(a)
    assert torch.equal(A.diag(None).value, a.diagonal())
    assert A.count == 37
    H, _ = _hessian()
    assert error(H.diag(None).value, dense(H).diagonal()) < ROUNDING


def test_exact_diagonal_in_low_precision():
    net, x, _ = _outputs("mlp")
    y = data(6)[1]
    want = GGN.of(net, nn.CrossEntropyLoss(), x, y).diag().value
    single = net.float()
    got = GGN.of(single, nn.CrossEntropyLoss(), x.float(), y).diag().value
    assert got.dtype is torch.float32
    assert error(got.double(), want) < 50 * torch.finfo(torch.float32).eps
    half = net.to(torch.bfloat16)
    got = GGN.of(half, nn.CrossEntropyLoss(), x.to(torch.bfloat16), y).diag().value
    assert error(got.double(), want) < 30 * 2**-8


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
def test_exact_diagonal_where_products_are_fewer():
    net = Transformer().double()
    tokens = torch.randint(0, 11, (2, 5))
    params = [net.mlp[0].bias]

    def closure():
        logits = net(tokens)
        return logits, F.cross_entropy(logits.reshape(-1, 11), tokens.reshape(-1))

    G = GGN(closure, params, mode="double-backward")
    assert error(G.diag().value, dense(G).diagonal()) < 10 * ROUNDING


# Inverse --------------------------------------------------------------------------------------------------------------


def test_inverse_solves_and_tells_how():
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=F64))
    a = (q * torch.logspace(0, 2, 30, dtype=F64)) @ q.T
    A = Matrix((a + a.T) / 2)
    B = torch.randn(30, 2, dtype=F64)
    for solve, shift in ((A.inverse(tol=1e-10), 0.0), (secant.curvature.inverse(A, damping=0.7, tol=1e-10), 0.7)):
        x = solve @ B
        left = (a + shift * torch.eye(30, dtype=F64)) @ x - B
        assert (left.norm(dim=0) <= 2e-10 * B.norm(dim=0)).all()
        assert solve.converged
        assert solve.status.tolist() == [Status.CONVERGED] * 2
        assert (solve.residuals <= 1e-10).all()
        assert (solve.iterations > 5).all()
        assert torch.allclose(B.T @ solve, x.T, rtol=1e-8)
    jacobi = A.inverse(tol=1e-10, preconditioner=lambda r: r / a.diagonal())
    assert error(a @ (jacobi @ B), B) < 1e-8
    # 1/lambda on the other side: its largest eigenvalue is one over the smallest.
    assert float(A.inverse(tol=1e-12).eigs(1).values) == pytest.approx(1.0, rel=1e-6)


def test_inverse_of_lists_and_of_a_ggn():
    net, x, params = _outputs("mlp")
    G = GGN.of(net, nn.CrossEntropyLoss(), x, data(6)[1])
    parts = [torch.randn_like(p) for p in params]
    got = G.inverse(damping=0.1, tol=1e-12) @ parts
    flat = torch.cat([p.reshape(-1) for p in parts])
    want = torch.linalg.solve(dense(G) + 0.1 * torch.eye(len(flat), dtype=F64), flat)
    assert error(torch.cat([p.reshape(-1) for p in got]), want) < 1e-9


def test_what_an_inverse_does_not_reach_is_data():
    A = Matrix(torch.diag(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64)))
    short = A.inverse(max_iter=2, tol=1e-12)
    short @ torch.ones(4, dtype=F64)
    assert not short.converged
    assert short.status.tolist() == [Status.MAX_ITER]
    assert short.iterations.tolist() == [2]
    indefinite = Matrix(torch.diag(torch.tensor([1.0, -1.0], dtype=F64))).inverse()
    indefinite @ torch.tensor([0.0, 1.0], dtype=F64)
    assert indefinite.status.tolist() == [Status.FLAT]
    nan = Matrix(torch.full((2, 2), float("nan"), dtype=F64)).inverse()
    nan @ torch.ones(2, dtype=F64)
    assert nan.status.tolist() == [Status.NOT_FINITE]
    zero = A.inverse()
    assert (zero @ torch.zeros(4, dtype=F64) == 0).all()
    assert zero.converged


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"tol": 0.0}, ValueError, "Inverse: tol: expected a number between 0 and 1"),
        ({"tol": True}, ValueError, "tol: expected a number between 0 and 1"),
        ({"tol": 10**400}, ValueError, "tol: expected a number between 0 and 1, or None, got an int of more than 20"),
        ({"max_iter": 0}, ValueError, "max_iter: expected an int >= 1"),
        ({"max_iter": True}, TypeError, "max_iter: expected an int"),
        ({"damping": "x"}, TypeError, "damping: expected a number"),
        ({"damping": float("nan")}, ValueError, "damping: expected a finite number"),
        ({"preconditioner": 1}, TypeError, "preconditioner: expected a function"),
    ],
)
def test_bad_options_of_an_inverse_are_named(options, error_type, message):
    with pytest.raises(error_type, match=message):
        Matrix(_symmetric(3)).inverse(**options)
    with pytest.raises(TypeError, match="Inverse: operator: expected a LinearOperator"):
        secant.curvature.inverse(torch.eye(3))


# Probes ---------------------------------------------------------------------------------------------------------------


def test_all_signs_give_the_diagonal_and_the_trace_exactly(monkeypatch):
    """The expectation itself: the mean over every vector of signs."""
    n = 6
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=F64)
    a = _symmetric(n)
    stream = iter(signs)

    def every(k, n, dtype, device, generator):
        return torch.stack([next(stream) for _ in range(k)])

    monkeypatch.setattr("secant.curvature._estimators.rademacher", every)
    found = Matrix(a).diag(len(signs))
    assert error(found.value, a.diagonal()) < ROUNDING
    # (z_i (A z)_i) has the variance that the docstring gives.
    off = (a - torch.diag(a.diagonal())).square().sum(1)
    assert error(found.stderr.square() * (len(signs) - 1), off) < ROUNDING
    stream = iter(signs)
    assert Matrix(a).trace(len(signs)).value == pytest.approx(float(a.trace()), rel=1e-12)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_probes_of_both_distributions_are_unbiased(distribution):
    n, count = 20, 4000
    a = _symmetric(n)
    A = Matrix(a)
    normal = distribution == "normal"
    off = (a - torch.diag(a.diagonal())).square().sum(1)
    variance = off + (2 * a.diagonal().square() if normal else 0.0)
    found = A.diag(count, distribution=distribution, seed=3)
    # By the variance that is known, not that of the sample: 20 entries beyond 4.5 with odds of 20 * 7e-6.
    assert ((found.value - a.diagonal()).abs() < 4.5 * (variance / count).sqrt()).all()
    # A sample's variance of 4,000, of kurtosis below 15: within 4 sqrt(15 / 4000), a quarter.
    assert ((found.stderr.square() * count / variance - 1).abs() < 0.25).all()
    spread = 2 * (a.square().sum() - (0.0 if normal else a.diagonal().square().sum()))
    one = A.trace(count, distribution=distribution, seed=4)
    assert abs(one.value - float(a.trace())) < 4.5 * float(spread / count) ** 0.5
    runs = torch.tensor([A.trace(12, method="hutch++", distribution=distribution, seed=s).value for s in range(400)])
    assert abs(float(runs.mean() - a.trace())) < 4.5 * float(runs.std()) / 20
    assert A.diag(5, distribution=distribution, seed=1).value.equal(A.diag(5, distribution=distribution, seed=1).value)


def test_normal_probes_are_normal():
    z = secant.curvature._estimators.draw("normal", 500, F64, torch.device("cpu"), torch.Generator().manual_seed(0))(
        400
    )
    # Moments of 200,000: 4 / sqrt(200000) times the root of the variance of each power, 1, 2 and 96.
    for power, want, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)):
        assert abs(float((z**power).mean()) - want) < 4 * (variance / z.numel()) ** 0.5
    assert not np.isin(z.numpy(), [-1.0, 1.0]).any()


def test_bad_distributions_are_named():
    A = Matrix(_symmetric(3))
    for call in (A.diag, A.trace):
        for bad in ("uniform", None, True, 10**400):
            with pytest.raises(ValueError, match="distribution: expected 'rademacher' or 'normal'"):
                call(4, distribution=bad)
