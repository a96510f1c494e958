"""Sums, multiples, chains, transposes and damping of operators, against the same of dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvature_problems import data, dense, mlp
from secant.curvature import GGN, Hessian, LinearOperator
from secant.curvature._algebra import Chain, Sum

F64 = torch.float64
#: Every result is a sum of at most 30 products of numbers below 10, in float64.
BOUND = 30 * 100 * torch.finfo(F64).eps


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Rectangle(LinearOperator):
    """A dense matrix that counts its products."""

    def __init__(self, a: torch.Tensor, symmetric: bool = False) -> None:
        super().__init__(tuple(a.shape), a.dtype, a.device, symmetric=symmetric)
        self.a, self.count = a, 0

    def _rows(self, vectors):
        assert vectors.is_contiguous()
        self.count += len(vectors)
        return vectors @ self.a.T

    def _transposed_rows(self, vectors):
        assert vectors.is_contiguous()
        self.count += len(vectors)
        return vectors @ self.a


def _symmetric(n):
    a = torch.randn(n, n, dtype=F64)
    return Rectangle(a + a.T, True)


def _close(got, want):
    assert got.shape == want.shape
    assert float((got - want).abs().max()) < BOUND


def _is(operator, want):
    """Products from both sides, one vector and several, and the matrix itself."""
    (m, n), k = want.shape, 3
    assert operator.shape == want.shape
    assert operator.dtype is F64
    assert operator.device == torch.device("cpu")
    v, u = torch.randn(n, dtype=F64), torch.randn(m, dtype=F64)
    V, U = torch.randn(n, k, dtype=F64), torch.randn(m, k, dtype=F64)
    before = V.clone(), U.clone()
    _close(operator @ v, want @ v)
    _close(operator @ V, want @ V)
    _close(u @ operator, u @ want)
    _close(U.T @ operator, U.T @ want)
    _close(operator.rmatvec(u), want.T @ u)
    _close(operator.rmatmat(U), want.T @ U)
    for turned in (operator.T, operator.mT, operator.adjoint()):
        assert turned.shape == (n, m)
        _close(turned @ U, want.T @ U)
        assert turned.T is operator or isinstance(operator, Chain)
    _close(operator.to_dense(), want)
    _close(operator.T.to_dense(), want.T)
    assert torch.equal(V, before[0])  # what is added in place is never the argument
    assert torch.equal(U, before[1])


def test_rectangular_operators_and_their_transposes():
    a = torch.randn(4, 7, dtype=F64)
    A = Rectangle(a)
    assert not A.symmetric
    _is(A, a)
    A.count = 0
    A.to_dense()
    assert A.count == 4  # by its rows, which are fewer
    _close(A[1:3, [0, 6, 6]], a[1:3][:, [0, 6, 6]])
    _close(A[3], a[3])
    S = A.submatrix(slice(None), [5, 0])
    _is(S, a[:, [5, 0]])
    with pytest.raises(IndexError, match="rows: expected indices from -4 to 3, got 4"):
        A[4]
    with pytest.raises(ValueError, match=r"Rectangle.matvec: v: expected shape \(7,\), got shape \(4,\)"):
        A @ torch.zeros(4, dtype=F64)
    with pytest.raises(ValueError, match=r"Rectangle.T.matvec: v: expected shape \(4,\), got shape \(7,\)"):
        torch.zeros(7, dtype=F64) @ A
    assert (A @ torch.zeros(7, 0, dtype=F64)).shape == (4, 0)
    x = np.ones((7, 2))
    _close(torch.as_tensor(A.to_scipy() @ x), a @ torch.ones(7, 2, dtype=F64))
    _close(torch.as_tensor(A.to_scipy().T @ np.ones(4)), a.T @ torch.ones(4, dtype=F64))


def test_sums_differences_and_multiples():
    a, b, c = (torch.randn(4, 7, dtype=F64) for _ in range(3))
    A, B, C = map(Rectangle, (a, b, c))
    factor = torch.tensor([3.0], dtype=F64)
    cases = {
        A + B: a + b, A - B: a - b, -A: -a, 2.0 * A: 2 * a, A * 3: 3 * a, A / 4.0: a / 4, factor * A: 3 * a,
        A * factor: 3 * a, A / factor: a / 3, A + B - C: a + b - c, A - (B - 2.0 * C): a - b + 2 * c,
        (A - B).T.T + C: a - b + c, np.float64(2.0) * A: 2 * a, 0.5 * (A + B): (a + b) / 2, sum([B, C], A): a + b + c,
    }  # fmt: skip
    for operator, want in cases.items():
        _is(operator, want)
        assert not operator.symmetric
    assert len((A - (B - 2.0 * C)).terms) == 3  # one sum, not one within another
    factor.fill_(5.0)  # read at each product
    _close((factor * A).to_dense(), 5 * a)


def test_sums_of_symmetric_operators_are_symmetric():
    A, B = _symmetric(5), _symmetric(5)
    for operator, want in ((A + B, A.a + B.a), (A - B, A.a - B.a), (-A, -A.a), (2.0 * A, 2 * A.a)):
        assert operator.symmetric
        assert operator.T is operator
        _is(operator, want)
        _close(operator.diag(None).value, want.diagonal())
        assert operator.eigs(1, "SA").values[0] == pytest.approx(float(torch.linalg.eigvalsh(want)[0]), rel=1e-7)
    assert not (A + Rectangle(B.a)).symmetric


def test_damping_by_a_number_or_a_diagonal():
    A = _symmetric(5)
    d = torch.rand(5, dtype=F64)
    eye = torch.eye(5, dtype=F64)
    cases = [
        (A.damped(0.5), A.a + 0.5 * eye), (A + 0.5, A.a + 0.5 * eye), (0.5 + A, A.a + 0.5 * eye),
        (A - 0.5, A.a - 0.5 * eye), (0.5 - A, 0.5 * eye - A.a), (A.damped(torch.tensor(2.0)), A.a + 2 * eye),
        (A.damped(d), A.a + torch.diag(d)), (A - d, A.a - torch.diag(d)), (A + d + 1.0, A.a + torch.diag(d) + eye),
    ]  # fmt: skip
    for operator, want in cases:
        assert operator.symmetric
        _is(operator, want)
        _close(operator.diag(None).value, want.diagonal())
    damped = A.damped(d)
    d.mul_(3)
    _is(damped, A.a + torch.diag(d))
    square = Rectangle(torch.randn(5, 5, dtype=F64))
    _is(square.damped(d), square.a + torch.diag(d))
    definite = Rectangle(A.a @ A.a, True)
    solve = definite.inverse(damping=d, tol=1e-12)
    b = torch.randn(5, dtype=F64)
    assert torch.allclose((definite.a + torch.diag(d)) @ (solve @ b), b, rtol=1e-8, atol=1e-8)


def test_chains_apply_from_the_right_and_know_when_they_are_symmetric():
    j, h, a = torch.randn(4, 7, dtype=F64), torch.randn(7, 3, dtype=F64), _symmetric(4)
    a = Rectangle(a.a @ a.a / 10, True)  # definite, so that conjugate gradients solve with all of them
    J, H = Rectangle(j), Rectangle(h)
    _is(J @ H, j @ h)
    assert not (J @ H).symmetric
    for operator, want in (
        (J.T @ J, j.T @ j),
        (J @ J.T, j @ j.T),
        (J.T @ a @ J, j.T @ a.a @ j),
        (J.T @ (a @ J), j.T @ a.a @ j),
        ((J @ H).T @ (J @ H), h.T @ j.T @ j @ h),
        ((K := 2.0 * J).T @ K, 4 * j.T @ j),
    ):
        assert operator.symmetric, operator
        assert operator.T is operator
        n = len(want)
        v = torch.randn(n, dtype=F64)
        assert torch.allclose(operator @ v, want @ v, rtol=0, atol=1e-11)
        assert torch.allclose(operator.to_dense(), want, rtol=0, atol=1e-11)
        solved = operator.damped(1.0).inverse(tol=1e-13) @ v
        assert torch.allclose(solved, torch.linalg.solve(want + torch.eye(n, dtype=F64), v), rtol=1e-7, atol=1e-9)
    for operator in (J.T @ Rectangle(j), J.T @ a @ (2.0 * J), Rectangle(a.a) @ Rectangle(a.a)):
        assert not operator.symmetric
    G = J.T @ J
    J.count = 0
    G @ torch.ones(7, dtype=F64)
    assert J.count == 2


def test_what_is_square_or_symmetric_is_asked_of_those_alone():
    A, S = Rectangle(torch.randn(4, 7, dtype=F64)), Rectangle(torch.randn(5, 5, dtype=F64))
    for call, message in (
        (lambda: A.diag(3), r"Rectangle.diag: operator: expected a square matrix, got one of shape \(4, 7\)"),
        (lambda: A.trace(3), "Rectangle.trace: operator: expected a square matrix"),
        (lambda: A.eigs(1), "Rectangle.eigs: operator: expected a symmetric matrix, got one of shape"),
        (lambda: A.damped(1.0), "Rectangle.damped: operator: expected a square matrix"),
        (lambda: A.inverse(), "Inverse: operator: expected a symmetric matrix, got one of shape"),
        (lambda: S.eigs(1), "Rectangle.eigs: operator: expected a symmetric matrix, got one that is not known to be"),
        (lambda: S.spectrum(1), "Rectangle.spectrum: operator: expected a symmetric matrix"),
        (lambda: S.inverse(), "Inverse: operator: expected a symmetric matrix"),
        (lambda: (A @ A.T).T.eigs(9), "k: expected an int"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    # Estimates of a square matrix need no symmetry: all unit probes' mean is the diagonal itself.
    _close(S.diag(None).value, S.a.diagonal())
    rows = [0, 2]
    assert S.submatrix(rows, rows).symmetric is False
    whole = _symmetric(5)
    block = whole.submatrix(rows, rows)
    assert block.symmetric
    assert float(block.eigs(1).values) == pytest.approx(float(torch.linalg.eigvalsh(whole.a[rows][:, rows])[-1]))


def test_operands_that_do_not_fit_are_named():
    A, B = Rectangle(torch.randn(4, 7, dtype=F64)), Rectangle(torch.randn(4, 6, dtype=F64))
    single = Rectangle(torch.randn(4, 7))
    for call, error_type, message in (
        (
            lambda: A + B,
            ValueError,
            r"Rectangle \+ Rectangle: right operand: expected shape \(4, 7\), like the left, got shape \(4, 6\)",
        ),
        (
            lambda: A - A.T,
            ValueError,
            r"Rectangle - Rectangle.T: right operand: expected shape \(4, 7\), like the left",
        ),
        (
            lambda: A @ B,
            ValueError,
            r"right operand: expected shape \(7, k\), as the left has shape \(4, 7\), got shape",
        ),
        (
            lambda: A + single,
            TypeError,
            "right operand: expected dtype torch.float64, like the left, got torch.float32",
        ),
        (lambda: A.T @ single, TypeError, "right operand: expected dtype torch.float64"),
        (lambda: A * B, TypeError, r"Rectangle \* factor: factor: expected a number or a tensor of one element"),
        (lambda: A * True, TypeError, "factor: expected a number"),
        (lambda: A * torch.ones(2), TypeError, "factor: expected a number"),
        (lambda: A * float("inf"), ValueError, "factor: expected a finite number"),
        (lambda: A / 0.0, ValueError, "divisor: expected a number whose reciprocal is finite, got 0.0"),
        (lambda: A / "x", TypeError, "divisor: expected a number"),
        (lambda: (A.T @ A).damped(torch.ones(4)), ValueError, r"damping: expected .* per row \(7,\), got shape \(4,\)"),
        (lambda: (A.T @ A).damped(torch.ones(7, 7)), TypeError, "damping: expected a number"),
        (lambda: (A.T @ A) + None, TypeError, "damping: expected a number"),
    ):
        with pytest.raises(error_type, match=message):
            call()

    class OneWay(LinearOperator):
        def _rows(self, vectors):
            return vectors[:, :2].clone()

    one = OneWay((2, 3), F64, torch.device("cpu"))
    for operator in (one, one + one - one, 1.0 * one, one @ _one(3), one.submatrix([0, 1], slice(None))):
        assert torch.equal(operator.to_dense(), torch.eye(2, 3, dtype=F64))  # by its columns, which are more
    assert torch.equal(one[0], torch.tensor([1.0, 0.0, 0.0], dtype=F64))
    with pytest.raises(TypeError, match=r"OneWay.T: operator: expected one with products with its transpose"):
        one.T @ torch.ones(2, dtype=F64)


def _one(n):
    return Rectangle(torch.eye(n, dtype=F64))


def test_tensors_from_the_left_are_left_to_the_operator():
    A, d = _symmetric(4), torch.rand(4, dtype=F64)
    for operator, want in (
        (d + A, A.a + torch.diag(d)),
        (d - A, torch.diag(d) - A.a),
        (torch.tensor(2.0) - A, 2 * torch.eye(4, dtype=F64) - A.a),
        (torch.tensor(2.0) * A, 2 * A.a),
        (np.float32(2.0) * A, 2 * A.a),
    ):
        assert isinstance(operator, LinearOperator)
        _is(operator, want)


def test_curvature_operators_add_up_and_keep_the_shapes_of_the_parameters():
    net = mlp()
    x, y = data()
    params = list(net.parameters())
    H, G = Hessian.of(net, nn.CrossEntropyLoss(), x, y), GGN.of(net, nn.CrossEntropyLoss(), x, y)
    mixed = 0.25 * H + 0.75 * G
    assert isinstance(mixed, Sum)
    want = 0.25 * dense(H) + 0.75 * dense(G)
    _close(dense(mixed), want)
    parts = [torch.randn_like(p) for p in params]
    flat = torch.cat([p.reshape(-1) for p in parts])
    for operator, matrix in (
        (mixed, want),
        (mixed @ G, want @ dense(G)),
        (mixed.damped(1.0), want + torch.eye(len(want))),
    ):
        got = operator @ parts
        assert [p.shape for p in got] == [p.shape for p in params]
        _close(torch.cat([p.reshape(-1) for p in got]), matrix @ flat)
    _close(torch.cat([p.reshape(-1) for p in parts @ (mixed @ G)]), flat @ want @ dense(G))
