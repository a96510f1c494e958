"""Rows of a Jacobian by one backward pass, against a backward pass for each."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from curvature_problems import ACTIVATIONS, ROUNDING, dense_jacobian, error, flat
from secant.curvature import EvaluatedPoint, Jacobian, _row_sources, _row_uses, _rows, per_sample_gradients
from secant.curvature._row_layouts import Layout
from secant.curvature.jacobian import joined

F64 = torch.float64
ONE = "one backward pass"
N = 17  # more than the numbers that get a backward pass each, and no width of a layer


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _inputs(n=N, width=3):
    return torch.randn(n, width, dtype=F64)


def _dense_net(activation=nn.Tanh, out=2):
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, out)).double()


def _all_rows(closure, params):
    """(m, n), by a backward pass for each row."""
    return dense_jacobian(joined("test", closure(), params[0].dtype), params)


def _slope(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def _passes(monkeypatch):
    """Count the backward passes for gradients at uses."""
    count, inner = [], _rows.Rows._gradients
    monkeypatch.setattr(_rows.Rows, "_gradients", lambda self, parts: count.append(1) or inner(self, parts))
    return count


def _case_of_layers(make, x):
    net = make().double()
    net(x)
    return lambda: net(x), list(net.parameters())


def _images(n=11):
    return torch.randn(n, 2, 6, 6, dtype=F64)


LAYERS = {
    **{
        name: lambda make=make: _case_of_layers(lambda: _dense_net(make), _inputs())
        for name, make in ACTIVATIONS.items()
    },
    **{
        make.__name__: lambda make=make: _case_of_layers(lambda: _dense_net(make), _inputs())
        for make in (nn.ELU, nn.LeakyReLU, nn.Mish, nn.Hardtanh, nn.LogSigmoid, nn.PReLU)
    },
    "softmax": lambda: _case_of_layers(lambda: nn.Sequential(_dense_net(), nn.Softmax(1)), _inputs()),
    "without bias": lambda: _case_of_layers(lambda: nn.Linear(3, 2, bias=False), _inputs()),
    "tokens": lambda: _case_of_layers(lambda: _dense_net(out=1), torch.randn(N, 4, 3, dtype=F64)),
    "layer norm": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.Linear(3, 6), _uneven(nn.LayerNorm(6)), nn.Tanh(), nn.Linear(6, 2)), _inputs()
    ),
    "rms norm": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.Linear(3, 6), _uneven(nn.RMSNorm(6)), nn.Linear(6, 2)), _inputs()
    ),
    "batch norm": lambda: _case_of_layers(
        lambda: _trained(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))), _inputs()
    ),
    "convolutions": lambda: _case_of_layers(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2), _uneven(nn.GroupNorm(2, 4)), nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2),
        ),
        _images(),
    ),
    "transposed convolution": lambda: _case_of_layers(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1),
            _uneven(nn.InstanceNorm2d(4, affine=True)), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 2),
        ),
        _images(),
    ),
    "convolution of sequences": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        torch.randn(N, 3, 9, dtype=F64),
    ),
    "embedding": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)),
        torch.randint(0, 7, (N, 6)),
    ),
    "tokens of an embedding": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randint(0, 7, (5, 3))
    ),
    "lstm": lambda: _case_of_layers(lambda: _Last(nn.LSTM(3, 4, batch_first=True)), torch.randn(N, 5, 3, dtype=F64)),
    "gru": lambda: _case_of_layers(lambda: _Last(nn.GRU(3, 4, batch_first=True)), torch.randn(N, 5, 3, dtype=F64)),
    "encoder": lambda: _case_of_layers(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 1)
        ),
        torch.randn(N, 3, 4, dtype=F64),
    ),
    "weight norm": lambda: _case_of_layers(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1)),
        _inputs(),
    ),
}  # fmt: skip


def _uneven(norm):
    nn.init.normal_(norm.weight)
    return norm


def _trained(net):
    net.double()(_inputs())
    return net.eval()


class _Last(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0][:, -1]


def _same_rows(closure, params, tolerance=ROUNDING):
    """Rows, twice, and products after them, are those of a backward pass each."""
    want = _all_rows(closure, params)
    J = Jacobian(closure, params)
    assert error(J.rows(), want) < tolerance
    assert J.rows_by == ONE
    assert not J.rows().requires_grad
    assert error(J.to_dense(), want) < tolerance
    v, u = torch.randn(want.shape[1], dtype=want.dtype), torch.randn(want.shape[0], dtype=want.dtype)
    assert error(J @ v, want @ v) < tolerance
    assert error(J.T @ u, want.T @ u) < tolerance
    assert error(J.rows(), want) < tolerance
    return J


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name):
    # Normalisations and attention divide and exponentiate: some hundreds of roundings rather than some tens.
    _same_rows(*LAYERS[name](), tolerance=10 * ROUNDING)


DERIVATIVES = {
    "u_x": lambda u, x: _slope(u, x)[:, 0],
    "all of u_x": lambda u, x: _slope(u, x),
    "u_xx": lambda u, x: _slope(_slope(u, x)[:, 0], x)[:, 0],
    "laplacian": lambda u, x: sum(_slope(_slope(u, x)[:, i], x)[:, i] for i in range(3)) - 3 * u,
    "mixed": lambda u, x: u * _slope(_slope(u, x)[:, 0], x)[:, 1] - _slope(u, x)[:, 2] ** 2,
    "third": lambda u, x: _slope(_slope(_slope(u, x)[:, 0], x)[:, 1], x)[:, 2],
    "one by one": lambda u, x: torch.stack([_slope(u, x)[:, i] for i in range(3)], 1).square().sum(1),
}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, "tanh") for name in DERIVATIVES),
        *itertools.product(["laplacian", "mixed"], ["gelu", "gelu-tanh", "silu", "sigmoid", "softplus-3", "sin-30"]),
    ],
)
def test_derivatives_by_the_inputs(name, activation, monkeypatch):
    net, x = _dense_net(ACTIVATIONS[activation], out=1), _inputs().requires_grad_()
    count = _passes(monkeypatch)

    def closure():
        return DERIVATIVES[name](net(x)[:, 0], x)

    # Third derivatives of a composition have some hundred terms.
    J = _same_rows(closure, list(net.parameters()), 10 * ROUNDING)
    outputs = J.shape[0] // N
    # Twice for J.rows(), once for to_dense(), once again; once for the check.
    assert len(count) == 5 * outputs


def test_derivatives_of_a_norm_by_the_inputs():
    net, x = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double(), _inputs()
    x.requires_grad_()
    closure = lambda: _slope(net(x), x)[:, 0]  # noqa: E731
    J = Jacobian(closure, net.parameters())
    parts = Jacobian(closure, net.parameters(), mode="double-backward")
    want = parts @ torch.eye(parts.shape[1], dtype=F64)  # torch's own third derivatives are wrong here
    assert error(J.rows(), want) < 10 * ROUNDING
    assert J.rows_by == ONE


def _plain(*values):
    return [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]


T, Y = torch.linspace(0.1, 1, N, dtype=F64), torch.rand(N, dtype=F64)


def _scalars(f):
    a, b, c = _plain(1.3, -0.7, 0.4)
    return lambda: f(a, b, c), [a, b, c]


def _vector(f, width=3):
    p = torch.rand(width, dtype=F64).add_(0.5).requires_grad_()
    return lambda: f(p), [p]


def _matrix(f, rows=4, columns=3):
    W, x = torch.randn(rows, columns, dtype=F64, requires_grad=True), _inputs()
    return lambda: f(W, x), [W]


PLAIN = {
    "exponential": lambda: _scalars(lambda a, b, c: a * torch.exp(b * T) + c - Y),
    "differences": lambda: _scalars(lambda a, b, c: (Y - a) - torch.sub(T, b, alpha=3.0) * torch.add(c, T, alpha=2.0)),
    "quotients": lambda: _scalars(lambda a, b, c: a / (T + b.square()) + (T - Y) / c - T / a),
    "powers": lambda: _scalars(lambda a, b, c: T**a + (T + 1) ** b + 2.0 ** (c * T) + a**3),
    "chosen": lambda: _scalars(lambda a, b, c: torch.where(T > 0.5, a, b * T) + torch.where(T > Y, T * c, c)),
    "expanded": lambda: _scalars(lambda a, b, c: a.expand(N) * T + b.reshape(1).expand(N) - c.expand_as(T).exp()),
    "entries": lambda: _vector(lambda p: p[0] * torch.exp(-p[1] * T) + p[2] - Y),
    "unbound": lambda: _vector(lambda p: (lambda a, b, c: a * torch.sin(b * T + c) - Y)(*p.unbind())),
    "functions of parameters": lambda: _vector(lambda p: F.softplus(p[0]) * T + p.exp().sum() * T**2 + p.norm() - Y),
    "matrix times vector": lambda: _vector(lambda p: _X @ p - Y),
    "added matrix times vector": lambda: _vector(lambda p: torch.addmv(Y, _X, p, alpha=2.0)),
    "dot products by broadcasting": lambda: _vector(lambda p: (_X * p).sum(1)),
    "left factor": lambda: _matrix(lambda W, x: torch.tanh(W @ x.T).sum(0)),
    "turned left factor": lambda: _matrix(lambda W, x: torch.tanh(W.T @ x.T).mean(0), 3, 4),
    "right factor": lambda: _matrix(lambda W, x: (x @ W).prod(1), 3, 4),
    "doubly turned": lambda: _matrix(lambda W, x: (x @ W.T.t().mT @ W.permute(1, 0).transpose(0, 1)).sum(1)),
    "addmm of all kinds": lambda: _matrix(
        lambda W, x: torch.addmm(W[:, 0], x, W.T, beta=2.0, alpha=3.0).square().sum(1)
        + torch.addmm(W[:, :1], W, x.T, beta=2.0, alpha=3.0).exp().sum(0)
    ),
    "masked": lambda: _matrix(lambda W, x: (x @ (W * _MASK).T).square().sum(1)),
    "seen as another shape": lambda: _matrix(lambda W, x: (x @ W.view(3, 4)).square().sum(1)),
    "stacked": lambda: _matrix(lambda W, x: torch.einsum("ni,aij,nj->n", x, W.view(1, 4, 3)[:, :3], x)),
    "stacked right": lambda: _matrix(lambda W, x: torch.bmm(_X3, W.view(2, 3, 2)).square().sum((0, 2))),
    "stacked left": lambda: _matrix(lambda W, x: torch.bmm(W.view(2, 2, 3), _X3.mT).square().sum((0, 1))),
    "looked up": lambda: _matrix(lambda W, x: (W[_INDEX] * x).sum(1) + (W.index_select(0, _INDEX) ** 2).sum(1)),
    "own rows": lambda: _vector(lambda p: 0.3 * p.square() - Y, N),
    "own rows and others": lambda: _vector(lambda p: [0.1 * p, _X.repeat(1, 4) @ p], 12),
    "own rows of a matrix": lambda: _matrix(lambda W, x: (0.1 * W.T, (x @ W[:3].T).sum(1)), 12, 3),
}  # fmt: skip
_X = torch.randn(N, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
_X3 = torch.randn(2, N, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
_MASK = torch.tensor([[1.0, 0.0, 1.0]] * 4, dtype=F64)
_INDEX = torch.arange(N) * 3 % 4


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_as_parameters(name):
    _same_rows(*PLAIN[name]())


def test_a_layer_that_is_used_several_times():
    net, x = nn.Linear(3, 3).double(), _inputs()
    closure = lambda: net(torch.tanh(net(torch.sin(net(x)))) * net(x))  # noqa: E731
    _same_rows(closure, list(net.parameters()))


def _parts_cases():
    net, x = _dense_net(out=1), _inputs()
    free = torch.randn(3, dtype=F64)
    p = list(net.parameters())
    u = lambda some: net(some)[:, 0]  # noqa: E731

    def shared():
        v = u(x)
        return [v, v**2, v[:12].exp(), v.sum()]

    return {
        "several": (lambda: (u(x), free, u(x[:10]) * 2, x), p, 1),
        "of one value": (shared, p, 3),
        "concatenated": (lambda: torch.cat([u(x) - 1, free, 2 * u(x[:10])]) / 3, p, 1),
        "columns": (lambda: torch.cat([net(x), net(x) ** 2], 1), p, 1),
        "stacked": (lambda: torch.stack([u(x), u(x) ** 2], 1), p, 2),
        "behind": (lambda: torch.cat([u(x)[:, None], u(2 * x)[:, None]], 0).reshape(-1), p, 1),
        "concatenated below": (lambda: torch.cat([u(x), u(x[:10]).exp()]) * torch.cat([u(2 * x), u(3 * x[:10])]), p, 1),
        "sliced": (lambda: (lambda v: [v[:9] * 2, v[9:] ** 2])(u(x)), p, 2),
        "split": (lambda: (lambda a, b: [a * 2, b**2])(*u(x[:16]).split(9)[:2]), p, 2),
        "turned": (lambda: torch.tanh(net(x)).T - 1, p, 1),
        "penalties": (lambda: [u(x), *(0.1 * q for q in p)], p, None),
        "scalar": (lambda: net(x).square().mean(), p, 0),
        "a mean of the others": (lambda: (lambda v: [v, u(x[:12]) - v.mean()])(u(x)), p, 2),
        "unused": (lambda: u(x), [*p, torch.ones(4, dtype=F64, requires_grad=True)], 1),
    }


@pytest.mark.parametrize("name", _parts_cases())
def test_several_residuals(name, monkeypatch):
    closure, params, passes = _parts_cases()[name]
    count = _passes(monkeypatch)
    J = Jacobian(closure, params)
    assert error(J.rows(), _all_rows(closure, params)) < ROUNDING
    assert J.rows_by == ONE
    if passes is not None:
        assert len(count) == 2 * passes  # once for the check
    monkeypatch.undo()
    _same_rows(closure, params)


def test_computed_parameters_and_low_precision():
    net, x = _dense_net(), _inputs()
    middle = net[:2](x)
    _same_rows(lambda: net[2:](middle) + middle[:, :2], [middle, *net[2:].parameters()])
    want = _all_rows(lambda: net(x), list(net.parameters()))
    single = net.float()
    J = Jacobian(lambda: single(x.float()), single.parameters())
    got = J.rows()
    assert (got.dtype, J.rows_by) == (torch.float32, ONE)
    assert error(got.double(), want) < 20 * 2**-23  # three layers, each rounded a few times
    half = Jacobian(lambda: single(x.float()).double(), single.parameters())
    assert error(half.rows().double(), want) < 20 * 2**-23


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.square()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g[:, None] * w.square(), 2 * w * (x.T @ g)


def _dependent_cases():
    net, x, p = _dense_net(out=1), _inputs(), torch.rand(12, dtype=F64, requires_grad=True)
    normed = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    bilinear = nn.Bilinear(3, 3, 2).double()
    u = lambda: net(x)[:, 0]  # noqa: E731
    params = list(net.parameters())
    return {
        "mean": (lambda: u() - u().mean() + (lambda v: v - v.mean())(u()), params, "all of them use one MeanBackward0"),
        "cumulative sum": (lambda: u().cumsum(0), params, "rows depend on each other: J"),
        "softmax": (lambda: u().softmax(0), params, "rows depend on each other: J"),
        "reversed": (lambda: u() + u().flip(0) * u()[0], params, "rows depend on each other"),
        "neighbours": (lambda: (lambda v: v[:-1] - v[1:])(u()), params, "SliceBackward0 moves them against others"),
        "batch norm": (lambda: normed(x), list(normed.parameters()), "statistics of the batch"),
        "own and all": (lambda: p * (_X.repeat(1, 4)[:12] @ p), [p], "row by row, and by all rows"),
        "unknown layer": (lambda: bilinear(x, x), list(bilinear.parameters()), "TrilinearBackward0"),
        "custom": (lambda: _Squared.apply(_X, p[:3] * 2), [p], "where _SquaredBackward takes"),
        "broken up": (lambda: u()[:16].view(4, 4).T.reshape(16).exp(), params, "takes the rows apart"),
    }


@pytest.mark.parametrize("name", _dependent_cases())
def test_what_is_not_understood_is_named_and_right(name):
    closure, params, reason = _dependent_cases()[name]
    J, want = Jacobian(closure, params), _all_rows(closure, params)
    for _ in range(2):
        assert error(J.rows(), want) < ROUNDING
        assert J.rows_by.startswith("backward passes: ")
        assert reason in J.rows_by
        J.refresh()
    assert error(J.gram(), want.T @ want) < ROUNDING
    assert error(J.gram(max_bytes=1000), want.T @ want) < ROUNDING
    assert error(J.outer(max_bytes=1000), want @ want.T) < ROUNDING


@pytest.mark.parametrize("broken", ["MmBackward0", "AddmmBackward0", "MulBackward0"])
def test_a_wrong_row_is_seen(broken, monkeypatch):
    right = _row_uses._MAKERS[broken]

    def wrong(*args):
        use = right(*args)
        inner = use.rows
        if isinstance(use, _row_uses.Product):
            use.scale *= 1 + 1e-9
        else:
            use.rows = lambda *given: inner(*given) * (1 + 1e-9)
        return use

    monkeypatch.setitem(_row_uses._MAKERS, broken, wrong)
    net, x = _dense_net(out=1), _inputs().requires_grad_()
    a = torch.tensor(1.5, dtype=F64, requires_grad=True)
    closure = lambda: a * _slope(net(x), x)[:, 0] + net(x)[:, 0]  # noqa: E731
    params = [a, *net.parameters()]
    J = Jacobian(closure, params)
    assert error(J.rows(), _all_rows(closure, params)) < ROUNDING
    assert J.rows_by.startswith("backward passes: rows depend on each other: J^T w differs")


def test_rows_that_a_zero_hides_are_seen_when_it_is_gone():
    net, last, x = _dense_net(out=3), nn.Linear(3, 1).double(), _inputs()
    nn.init.zeros_(last.weight)
    params = [*net.parameters(), *last.parameters()]
    closure = lambda: last(net(x).cumsum(0))[:, 0]  # noqa: E731
    point = None
    for _ in range(2):
        point = EvaluatedPoint(closure, params, "residuals", like=point)
        assert error(point.jacobian().rows(), _all_rows(closure, params)) < ROUNDING
        assert point.jacobian().rows_by == ONE  # nothing to see
        with torch.no_grad():
            last.bias.add_(1.0)
    nn.init.normal_(last.weight)
    point = EvaluatedPoint(closure, params, "residuals", like=point)
    assert error(point.jacobian().rows(), _all_rows(closure, params)) < ROUNDING
    assert "rows depend on each other" in point.jacobian().rows_by


def test_the_check_is_remembered(monkeypatch):
    checks, inner = [], _rows.Rows.check
    monkeypatch.setattr(_rows.Rows, "check", lambda self, *args: checks.append(number) or inner(self, *args))
    net, x = _dense_net(), _inputs()
    params, point, number = list(net.parameters()), None, 0
    while number < 9:
        number += 1
        with torch.no_grad():
            params[0].mul_(1.01)
        point = EvaluatedPoint(lambda: net(x), params, "residuals", like=point)
        for _ in range(2):
            assert error(point.jacobian().rows(), _all_rows(lambda: net(x), params)) < ROUNDING
    assert checks == [1, 2, 4, 8]
    for some in (x[:12], x[:12]):
        number = len(some)
        point = EvaluatedPoint(lambda some=some: net(some), params, "residuals", like=point)
        point.jacobian().rows()
    assert checks[4:] == [12, 12]  # another computation has its own


def test_a_point_is_evaluated_once():
    net, x, count = _dense_net(), _inputs(), []
    params = list(net.parameters())
    closure = lambda: count.append(1) or (net(x) ** 2, net(x).exp())  # noqa: E731
    want = _all_rows(closure, params)
    count.clear()
    point = EvaluatedPoint(closure, params, "residuals")
    J = point.jacobian()
    r = point.residuals()
    gram, gradient = J.gram_and_gradient(r)
    assert len(count) == 1
    assert error(gram, want.T @ want) < ROUNDING
    assert error(gradient, point.gradient()) < ROUNDING
    v = torch.randn(want.shape[1], dtype=F64)
    assert error(J @ v, want @ v) < ROUNDING
    K = Jacobian(closure, params, mode="double-backward")
    count.clear()
    assert error(K.T @ r, want.T @ r) < ROUNDING
    assert error(K.rows(), want) < ROUNDING
    assert error(K @ v, want @ v) < ROUNDING
    assert len(count) == 1
    with torch.no_grad():
        params[0].mul_(2.0)
    assert error(K.rows(), _all_rows(closure, params)) < ROUNDING
    with pytest.raises(RuntimeError, match="written since"):
        J.rows()


@pytest.mark.parametrize("max_bytes", [1, 3 * 56 * 8, 2**29])
def test_products_of_rows_in_blocks(max_bytes, monkeypatch):
    net, x = _dense_net(), _inputs()
    params = list(net.parameters())
    closure = lambda: (net(x) ** 2, torch.ones(3, dtype=F64), net(x).mean())  # noqa: E731
    J, want = Jacobian(closure, params), _all_rows(lambda: (net(x) ** 2, net(x).mean()), params)
    want = torch.cat([want[:-1], torch.zeros(3, want.shape[1], dtype=F64), want[-1:]])
    m, n = want.shape
    taken, inner = [], _row_sources.Facts.room
    monkeypatch.setattr(
        _row_sources.Facts, "room", lambda self, rows, *a: taken.append(rows * n * 8) or inner(self, rows, *a)
    )
    out = torch.full((n, n), torch.nan, dtype=F64)
    assert J.gram(out=out, max_bytes=max_bytes) is out
    assert error(out, want.T @ want) < ROUNDING
    r = torch.randn(m, dtype=F64)
    gram, gradient = J.gram_and_gradient(r, max_bytes=max_bytes)
    assert error(gram, want.T @ want) < ROUNDING
    assert error(gradient, want.T @ r) < ROUNDING
    outer = torch.full((m, m), torch.nan, dtype=F64)
    assert J.outer(out=outer, max_bytes=max_bytes) is outer
    assert error(outer, want @ want.T) < ROUNDING
    rows = torch.zeros(m, n, dtype=F64)
    for where, block in J.row_blocks(max_bytes):
        assert torch.equal(rows[where], torch.zeros_like(block))
        rows[where] = block
    assert error(rows, want) < ROUNDING
    assert max(taken) <= max(max_bytes, 2 * n * 8)
    dense = torch.full((m, n), torch.nan, dtype=F64)
    assert J.rows(out=dense) is dense
    assert error(dense, want) < ROUNDING


@pytest.mark.parametrize("keep", [True, False])
def test_rows_of_batches_follow_each_other(keep):
    net, x = _dense_net(), _inputs(40)
    params = list(net.parameters())
    J = Jacobian(lambda batch: net(batch), params, batches=[x[:17], x[17:20], x[20:]], keep_graphs=keep)
    want = _all_rows(lambda: net(x), params)
    assert error(J.rows(), want) < ROUNDING
    assert error(J.gram(max_bytes=2000), want.T @ want) < ROUNDING
    assert error(J.outer(max_bytes=2000), want @ want.T) < ROUNDING
    assert error(J @ want[0], want @ want[0]) < ROUNDING
    mixed = Jacobian(
        lambda batch: net(batch).cumsum(0) if len(batch) == 20 else net(batch), params, batches=[x[:17], x[20:]],
        keep_graphs=keep,
    )  # fmt: skip
    want = torch.cat([_all_rows(lambda: net(x[:17]), params), _all_rows(lambda: net(x[20:]).cumsum(0), params)])
    assert error(mixed.rows(), want) < ROUNDING
    assert "rows depend on each other" in mixed.rows_by


def test_a_row_that_is_not_finite():
    net, x = _dense_net(), _inputs()
    params = list(net.parameters())
    want = _all_rows(lambda: net(x), params)
    J = Jacobian(lambda: net(x), params)
    assert error(J.rows(), want) < ROUNDING
    x[4, 1] = torch.nan
    J.refresh()
    got = J.rows()
    good = [i for i in range(2 * N) if i not in (8, 9)]
    assert error(got[good], want[good]) < ROUNDING
    assert torch.isnan(got[8:10]).any(1).all()
    assert J.rows_by == ONE
    first = Jacobian(lambda: net(x), params)
    assert torch.isnan(first.rows()[8:10]).any(1).all()
    assert "not finite" in first.rows_by


class _Floor(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.floor = nn.Linear(3, width), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return torch.maximum(self.linear(x), self.floor)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_function_of_one_sample_where_rows_are_not_understood(several, named):
    net, x, calls = _Floor(2 if several else 1).double(), _inputs(40), []
    y = torch.randn(40, dtype=F64)
    params = dict(net.named_parameters())

    def row(p, sample, target):
        calls.append(1)
        p = p if named else dict(zip(params, p, strict=True))
        out = torch.func.functional_call(net, p, (sample,)) - target
        return out if several else out[0]

    given = params if named else list(params.values())
    closure = lambda: net(x) - y[:, None]  # noqa: E731
    for samples in ((x, y), lambda: [x, y]):
        J, want = Jacobian(closure, given, row=row, samples=samples), _all_rows(closure, list(params.values()))
        assert error(J.rows(), want) < ROUNDING
        assert J.rows_by.startswith("row: ")
        assert "a use of a parameter by MaximumBackward0" in J.rows_by
        assert error(J.gram(max_bytes=1000), want.T @ want) < ROUNDING
        with torch.no_grad():
            params["linear.weight"].mul_(1.5)
    assert calls
    point = EvaluatedPoint(closure, list(params.values()), "residuals")
    if not named:
        at = point.jacobian(row=row, samples=(x, y))
        assert error(at.gram(), point.jacobian().gram()) < ROUNDING
        assert (at.rows_by[:5], point.jacobian().rows_by[:5]) == ("row: ", "backw")
    with pytest.raises(ValueError, match=r"Jacobian: row: expected the \d+ residuals of the closure"):
        Jacobian(closure, given, row=row, samples=(x, y + 1)).rows()
    dense, calls[:] = _dense_net(), []
    K = Jacobian(lambda: dense(x), dense.parameters(), row=lambda p, x: calls.append(1), samples=x)
    K.rows()
    assert (K.rows_by, calls) == (ONE, [])


@pytest.mark.parametrize("independent", [True, False])
def test_gradients_of_samples(independent):
    net, x, y = _dense_net(), _inputs(), torch.randint(0, 2, (N,))

    def losses():
        outputs = net(x)
        outputs = outputs if independent else outputs - outputs.mean(0)
        return F.cross_entropy(outputs, y, reduction="none")

    params = list(net.parameters())
    got = per_sample_gradients(losses, params)
    assert [g.shape for g in got] == [(N, *p.shape) for p in params]
    values = losses()
    for i in range(N):
        one = torch.autograd.grad(values[i], params, retain_graph=True)
        assert error(flat([g[i] for g in got], params), flat(one, params)) < ROUNDING


def test_a_checkpoint_and_what_was_changed_in_place():
    net, x = _dense_net(), _inputs()
    _same_rows(lambda: torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False), list(net.parameters()))
    kept = x.clone()
    J = Jacobian(lambda: net(kept), net.parameters())
    J.rows()
    kept += 1.0
    with pytest.raises(RuntimeError, match="changed in place: call refresh"):
        J.rows()
    J.refresh()
    assert error(J.rows(), _all_rows(lambda: net(x + 1.0), list(net.parameters()))) < ROUNDING


def test_what_a_node_does_not_keep_is_named(monkeypatch):
    def without(node, *rest):
        return node._saved_nothing

    monkeypatch.setitem(_row_uses._MAKERS, "AddmmBackward0", without)
    net, x = _dense_net(), _inputs()
    J = Jacobian(lambda: net(x), net.parameters())
    assert error(J.rows(), _all_rows(lambda: net(x), list(net.parameters()))) < ROUNDING
    assert "AddmmBackward0 does not keep what is read of it" in J.rows_by


def test_labels_chosen_by_index():
    net, x, y = _dense_net(), _inputs(), torch.randint(0, 2, (N,))
    _same_rows(lambda: net(x).log_softmax(1)[torch.arange(N), y], list(net.parameters()))
    _same_rows(lambda: net(x).log_softmax(1).gather(1, y[:, None]), list(net.parameters()))


def test_layouts_take_the_places_of_each_row():
    x = torch.arange(3 * 24 * 2.0).view(3, 24, 2)
    for first, width, repeats in itertools.product((0, 2), (1, 2), (1, 2)):
        layout = Layout(1, first, 4, width, 5, repeats)
        got = layout.take(x, 6, 8)
        span = 24 // repeats
        for i, row in enumerate((6, 7)):
            start = first + (row - 5) * width
            places = [r * span + start + j for r in range(repeats) for j in range(width)]
            assert torch.equal(got[i], x[:, places].movedim(1, 0))


A = torch.ones(3, dtype=F64, requires_grad=True)


def _bad(**options):
    return Jacobian(lambda: _X @ A, [A], **options)


@pytest.mark.parametrize(
    ("call", "error_type", "message"),
    [
        (lambda: _bad(row=1, samples=_X), TypeError, "Jacobian: row: expected a function, got int"),
        (lambda: _bad(samples=_X), TypeError, "Jacobian: row: expected a function, got None"),
        (
            lambda: _bad(row=abs, samples=None),
            ValueError,
            "Jacobian: samples: expected tensors with one first dimension",
        ),
        (lambda: _bad(row=abs, samples=(_X, _X[:3])), ValueError, "Jacobian: samples: expected tensors"),
        (lambda: _bad(row=abs, samples=_X, batches=[1]), ValueError, "Jacobian: row: expected None with batches"),
        (lambda: _bad().gram(max_bytes=0), ValueError, "Jacobian.gram: max_bytes: expected an integer, 1 or more"),
        (lambda: _bad().outer(max_bytes=1.5), ValueError, "Jacobian.outer: max_bytes: expected"),
        (lambda: next(_bad().row_blocks(0)), ValueError, "Jacobian.row_blocks: max_bytes: expected"),
        (lambda: _bad().gram(out=_X), ValueError, r"Jacobian.gram: out: expected shape \(3, 3\)"),
        (lambda: _bad().outer(out=_X), ValueError, r"Jacobian.outer: out: expected shape \(17, 17\)"),
        (lambda: _bad().rows(out=_X.float()), TypeError, "Jacobian.rows: out: expected dtype"),
        (lambda: _bad().gram_and_gradient(A.detach()), ValueError, r"residuals: expected shape \(17,\)"),
        (lambda: torch.vmap(lambda x: x * _bad().rows().sum())(_X), RuntimeError, "outside of torch.func transforms"),
    ],
)
def test_bad_arguments_of_rows_are_named(call, error_type, message):
    with pytest.raises(error_type, match=message):
        call()


def test_rows_of_a_wrong_function_are_named():
    mean = functools.partial(torch.mean, keepdim=True, dim=0)
    J = Jacobian(lambda: (lambda u: u - mean(u))(_X @ A), [A], row=lambda p, x: 1.0, samples=_X)
    with pytest.raises(TypeError, match="row: expected residuals of one sample, got float"):
        J.rows()
    # The values agree and their derivatives do not: rows of samples that are not alone.
    centre = mean((_X @ A).detach())
    K = Jacobian(lambda: (lambda u: u - mean(u))(_X @ A), [A], row=lambda p, x: x @ p[0] - centre[0], samples=_X)
    with pytest.raises(ValueError, match="row: expected the derivatives of the closure"):
        K.rows()


@pytest.mark.parametrize("m", [300, 20_000, 100_000])
def test_many_rows_in_float32_that_depend_on_each_other_are_seen(m):
    w, x = torch.randn(3, requires_grad=True), torch.randn(m, 3)

    def residuals(share):
        u = x @ w
        return u + share * torch.roll(u, 1)

    rows = _rows_of(lambda: residuals(0.01), [w])
    reason, _ = rows.check(torch.randn(m), torch.finfo(torch.float32).eps)
    assert reason is not None
    assert "J^T w differs" in reason


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("m", [50, 20_000])
def test_right_rows_are_never_refused(m, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)
        x = (3 * torch.rand(m, 1, dtype=dtype)).requires_grad_()

        def residuals(net=net, x=x):
            u = net(x)
            return (_slope(_slope(u, x), x) + 10 * u.sin() - 1)[:, 0]

        params = list(net.parameters())
        rows = _rows_of(residuals, params)
        reason, telling = rows.check(torch.randn(m, dtype=dtype), torch.finfo(dtype).eps / 8)  # with a margin
        assert reason is None
        assert telling


def _rows_of(closure, params):
    J = Jacobian(closure, params)
    return _rows.Rows([closure()], J.params, J.params.locate())


@pytest.mark.parametrize("cast", ["to", "autocast"])
def test_where_rounding_hides_what_is_guessed_nothing_is_guessed(cast):
    w, x = torch.randn(3, requires_grad=True), torch.randn(40, 3)

    def product():
        if cast == "to":
            return (x.bfloat16() @ w.bfloat16()).float()
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w[:, None])[:, 0].float()

    def residuals():
        u = product()
        return u + 0.5 * torch.roll(u, 1)

    J = Jacobian(residuals, [w])
    torch.testing.assert_close(J.rows(), _all_rows(residuals, [w]), rtol=0.05, atol=0.05)
    assert "that RollBackward0 keeps rows apart cannot be checked at this precision" in J.rows_by
    exact = Jacobian(product, [w])
    torch.testing.assert_close(exact.rows(), x, rtol=0.01, atol=0)
    assert exact.rows_by == ONE


def _gate(x, w, point):
    u = x @ w
    return u + torch.relu(torch.roll(u, 1) + (100.0 if point >= 7 else -100.0))


def _sorted(x, w, point):
    u = x @ w
    u = u if point >= 7 else u + 1e4 * torch.arange(N, dtype=F64)
    return u.sort()[0]


def _gathered(x, w, point):
    return (x @ w).gather(0, torch.arange(N).roll(int(point >= 7)))


def _chosen(x, w, point):
    u = torch.outer(x @ w, torch.ones(2, dtype=F64))
    return u[torch.arange(N).roll(int(point >= 7)), torch.zeros(N, dtype=torch.long)]


@pytest.mark.parametrize("make", [_gate, _sorted, _gathered, _chosen])
def test_rows_that_meet_later_are_seen_at_once(make):
    w, x = torch.randn(3, dtype=F64, requires_grad=True), _inputs()
    point, seen = None, []
    for k in range(1, 9):
        closure = functools.partial(make, x, w, k)
        point = EvaluatedPoint(closure, [w], "residuals", like=point)
        J = point.jacobian()
        assert error(J.rows(), _all_rows(closure, [w])) < ROUNDING
        seen.append(J.rows_by == ONE)
    assert seen == [True] * 6 + [False] * 2


def test_each_batch_is_checked_where_its_rows_may_be_others():
    w, x = torch.randn(3, dtype=F64, requires_grad=True), _inputs()
    shifts = [0, 0, 1]

    def residuals(shift):
        return (x @ w).gather(0, torch.arange(N).roll(shift))

    J = Jacobian(residuals, [w], batches=shifts)
    want = torch.cat([_all_rows(functools.partial(residuals, s), [w]) for s in shifts])
    assert error(J.rows(), want) < ROUNDING


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_known_operations_are_no_guess(name):
    net = _dense_net(ACTIVATIONS[name], 1)
    x = _inputs().requires_grad_()

    def residuals():
        u = net(x)
        return _slope(_slope(u, x).sum(1), x)[:, 0] + u[:, 0].square() - 1

    assert _rows_of(lambda: net(x), list(net.parameters())).guessed is None
    assert _rows_of(residuals, list(net.parameters())).guessed is None


def test_labels_of_each_row_are_no_guess():
    net, labels = _dense_net(out=4), torch.randint(4, (N,))
    x = _inputs()
    for closure in (
        lambda: F.cross_entropy(net(x), labels, reduction="none"),
        lambda: net(x).log_softmax(1)[torch.arange(N), labels],
        lambda: net(x).softmax(-1).gather(1, labels[:, None]),
    ):
        assert _rows_of(closure, list(net.parameters())).guessed is None


@pytest.mark.parametrize("width", [7, 2])
def test_fewer_lookups_than_columns(width):
    table = nn.Embedding(5, width).double()
    _same_rows(lambda: table(torch.tensor([2, 2, 4])) - 1, [table.weight])


def test_a_parameter_in_a_computed_value_that_a_zero_hides_is_not_checked_yet():
    w, v = (torch.randn(3, dtype=F64, requires_grad=True) for _ in range(2))
    x, q = _inputs(), torch.zeros((), dtype=F64)
    u = torch.randn(N, dtype=F64)
    for expected in (False, True):
        rows = _rows_of(lambda q=q: x @ w + q * (x @ v.exp()), [w, v])
        assert rows.check(u, torch.finfo(F64).eps) == (None, expected)
        q = q + 1


def test_blocks_of_rows_are_those_of_one_generator():
    w, x = torch.randn(3, dtype=F64, requires_grad=True), _inputs()
    J = Jacobian(lambda: (x @ w).tanh(), [w])
    want = _all_rows(lambda: (x @ w).tanh(), [w])
    J.outer()
    others = J.row_blocks(2 * 3 * 8)
    for rows, block in J.row_blocks(2 * 3 * 8):
        J.outer()
        next(others)
        assert error(block, want[rows]) < ROUNDING


def _of_samples(x):
    """Residuals in fours whose graph is not understood, their parameters, and the function of one sample."""
    net = nn.Linear(3, 4).double()
    params = dict(net.named_parameters())

    def residuals():
        u = net(x).tanh()
        v = u.T.reshape(len(x), 4)
        return u + (v - v)

    return residuals, params, lambda p, sample: torch.func.functional_call(net, p, (sample,)).tanh()


@pytest.mark.parametrize("max_bytes", [1, 200, 500])
def test_a_block_has_room_for_one_sample(max_bytes):
    x = _inputs(9)
    residuals, params, row = _of_samples(x)
    J, want = Jacobian(residuals, params, row=row, samples=x), _all_rows(residuals, list(params.values()))
    assert error(J.gram(max_bytes=max_bytes), want.T @ want) < ROUNDING
    assert J.rows_by.startswith("row: ")
    assert error(J.outer(max_bytes=max_bytes), want @ want.T) < ROUNDING
    for rows, block in J.row_blocks(max_bytes):
        assert error(block, want[rows]) < ROUNDING


def test_residuals_of_samples_that_are_not_finite():
    x = _inputs(9)
    x[0, 0] = torch.nan
    net = _Floor(4).double()
    params = dict(net.named_parameters())

    def residuals():
        return net(x)

    def row(p, sample):
        return torch.func.functional_call(net, p, (sample,))

    J = Jacobian(residuals, params, row=row, samples=x)
    assert J.rows().isnan().any(1).tolist() == [True] * 4 + [False] * 32
    assert J.rows_by.startswith("row: ")
    other = Jacobian(residuals, params, row=lambda p, s: row(p, s.nan_to_num()), samples=x)
    with pytest.raises(ValueError, match="row: expected the 36 residuals of the closure"):
        other.rows()


def test_a_function_of_one_sample_is_checked_at_the_first_point_that_tells():
    a, x = torch.zeros(2, dtype=F64, requires_grad=True), torch.rand(6, 2, dtype=F64)

    def residuals():
        u = (x * a).abs().sum(1).sqrt()
        v = torch.stack([u, u], 1)
        return v + v.T.reshape(6, 2) - v.T.reshape(6, 2)

    def wrong(p, sample):
        u = (sample * p[0]).abs().sum().sqrt()
        return torch.stack([2 * u - u.detach()] * 2)

    J = Jacobian(residuals, [a], row=wrong, samples=x)
    J.rows()
    with torch.no_grad():
        a.fill_(1)
    with pytest.raises(ValueError, match="row: expected the derivatives of the closure"):
        J.rows()


def test_no_residuals():
    net, x = _dense_net(), _inputs()
    J = Jacobian(lambda: net(x)[:0], net.parameters())
    assert J.rows().shape == (0, J.params.n)
    assert torch.equal(J.gram(), torch.zeros(J.params.n, J.params.n, dtype=F64))
    _same_rows(lambda: [net(x), net(x)[:0]], list(net.parameters()))
