"""Several vectors at once, and the choice of a mode as something that can be kept."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ACTIVATIONS, ROUNDING, Residual, Transformer, cnn, data, dense_hessian, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian, Jacobian, _columns, _curvature, _matrices

F64 = torch.float64
K = 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Transformer()

    def forward(self, tokens):
        return self.inner(tokens).reshape(-1, 11)


class Views(nn.Module):
    """Layers of different numbers of rows, one without a bias, one that is no parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 2, bias=False), nn.Linear(4, 3)
        self.fixed = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.fixed(torch.sin(self.a(x)).view(-1, 2, 3)))).flatten(1))


def _problem(name):
    x, y = data()
    x = x.flatten(1)
    if name == "cnn":
        return cnn(), torch.randn(4, 1, 5, 5, dtype=F64), y[:4]
    if name == "transformer":
        tokens = torch.randint(0, 11, (2, 5))
        return Tokens().double(), tokens, tokens.flip(1).reshape(-1)
    if name == "dropout":
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        return net.double(), x, y
    return {"mlp": mlp, "residual": lambda: Residual().double(), "views": lambda: Views().double()}[name](), x, y


def _operator(kind, net, x, y, mode, loss):
    params = [p for p in net.parameters() if p.requires_grad]
    losses = {
        "cross-entropy": lambda z: F.cross_entropy(z, y, reduction="none"),
        "sines": lambda z: torch.sin(z * z).sum(1),
        "linear": lambda z: z.sum(1),
    }

    def pair(reduce=torch.mean):
        z = net(x)
        return z, reduce(losses[loss](z))

    if kind == "Hessian":
        penalty = 0.1 if loss == "sines" else 0.0  # terms of the loss beside the network
        return Hessian(lambda: pair()[1] + (penalty * params[0].pow(4).sum() if penalty else 0), params, mode=mode)
    if kind == "GGN":
        return GGN(pair, params, mode=mode)
    if kind == "EmpiricalFisher":
        return EmpiricalFisher(lambda: pair(lambda each: each), params, mode=mode)
    if kind == "Fisher":
        return Fisher(lambda: net(x), params, mode=mode, samples=2)
    return Jacobian(lambda: net(x), params, mode=mode)


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        *itertools.product(["Hessian", "GGN", "EmpiricalFisher"], ["cross-entropy", "sines", "linear"]),
        ("Fisher", "none"),
        ("Jacobian", "none"),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "views", "residual", "cnn", "transformer", "dropout"])
def test_several_columns_at_once_are_those_one_by_one(name, kind, loss):
    net, x, y = _problem(name)
    layered = name in ("mlp", "views")
    modes = [*(["r-operator"] if layered else []), *(Hessian._MODES if kind == "Hessian" else GGN._MODES)]
    # Normalisations, convolutions and attention: some hundreds of roundings rather than some tens.
    tolerance = ROUNDING if layered or name == "residual" else 20 * ROUNDING
    for mode in modes:
        state = torch.get_rng_state()
        buffers = [b.clone() for b in net.buffers()]
        A = _operator(kind, net, x, y, mode, loss)
        V = torch.randn(A.shape[1], K, dtype=F64)
        want = torch.stack([A @ v for v in V.unbind(1)], 1)
        assert A.columns is None
        got = A @ V
        assert float((got - want).abs().max()) <= tolerance * max(float(want.abs().max()), 1e-300), mode
        alone = mode == "reverse-over-forward" or (name == "cnn" and mode == "double-backward")
        assert (A.columns == "together") is not alone, A.columns
        if alone:
            assert A.columns.startswith("one after the other: as fast in mode")
            assert torch.equal(got, want)
        if kind == "Jacobian":
            U = torch.randn(A.shape[0], K, dtype=F64)
            want = torch.stack([A.T @ u for u in U.unbind(1)], 1)
            assert error(A.T @ U, want) < tolerance
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
        torch.set_rng_state(state)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_columns_of_every_activation(activation):
    net = mlp(ACTIVATIONS[activation])
    x, y = data()
    H = Hessian.of(net, nn.CrossEntropyLoss(), x, y, mode="r-operator")
    got = H @ torch.eye(H.shape[0], dtype=F64)
    assert H.columns == "together"
    assert error(got, dense_hessian(F.cross_entropy(net(x), y), list(net.parameters()))) < ROUNDING


def test_all_columns_have_one_mask_and_one_evaluation():
    net, x, y = _problem("dropout")
    count = []

    def loss():
        count.append(1)
        return F.cross_entropy(net(x), y)

    H = Hessian(loss, net.parameters(), mode="forward-over-reverse")
    v = torch.randn(H.shape[0], K, dtype=F64)
    state = torch.get_rng_state()
    H @ v[:, 0]
    H @ v  # compares the first column once
    before = len(count)
    got = H @ v
    assert len(count) == before + 1
    torch.set_rng_state(state)
    want = dense_hessian(loss(), list(net.parameters()))
    assert error(got, want @ v) < 20 * ROUNDING
    assert torch.equal(got, H @ v)


def test_memory_is_bounded_by_taking_fewer_columns(monkeypatch):
    net, x, y = _problem("residual")
    H = Hessian.of(net, nn.CrossEntropyLoss(), x, y, mode="double-backward")
    V = torch.randn(H.shape[0], 7, dtype=F64)
    whole = H @ V
    sizes = []
    right = _matrices.DoubleBackward.products

    def products(self, vectors, out):
        sizes.append(len(vectors))
        right(self, vectors, out)

    monkeypatch.setattr(_matrices.DoubleBackward, "products", products)
    monkeypatch.setattr(_columns, "_BYTES", 3 * 4 * H._columns._values * 8)
    assert H._columns._values >= 7 * (4 + 4 + 3)  # at least what the layers put out
    assert error(H @ V, whole) < ROUNDING
    assert sizes == [3, 3, 1]
    monkeypatch.setattr(_columns, "_BYTES", 1)
    H @ V
    assert sizes == [3, 3, 1]
    monkeypatch.undo()
    monkeypatch.setattr(_columns, "_MOST", 2)
    monkeypatch.setattr(_matrices.DoubleBackward, "products", products)
    H @ V
    assert sizes[3:] == [2, 2, 2, 1]


class Peeking(torch.autograd.Function):
    """Looks at its values: cannot be done for several vectors at once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return Slope.apply(x, g)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        ctx.save_for_backward(x, g)
        return 3 * x**2 * g

    @staticmethod
    def backward(ctx, h):
        x, g = ctx.saved_tensors
        assert float(h.norm()) >= 0  # a number: torch raises where there are several
        return 6 * x * g * h, 3 * x**2 * h


def test_what_cannot_be_done_at_once_is_done_one_by_one():
    w = torch.randn(6, dtype=F64, requires_grad=True)
    H = Hessian(lambda: Peeking.apply(w).sum(), [w], mode="double-backward")
    got = H @ torch.eye(6, dtype=F64)
    assert error(got, torch.diag(6 * w.detach())) < ROUNDING
    assert H.columns.startswith("one after the other: Hessian: mode 'double-backward': ")
    assert error(H @ torch.eye(6, dtype=F64), torch.diag(6 * w.detach())) < ROUNDING
    assert torch._C._functorch._is_vmap_fallback_enabled()


def test_columns_that_disagree_are_made_again_one_by_one(monkeypatch):
    right = _matrices.DoubleBackward.products

    def wrong(self, vectors, out):
        right(self, vectors, out)
        out[0, 0] += 1e-4 * out[0].norm()

    monkeypatch.setattr(_matrices.DoubleBackward, "products", wrong)
    net, x, y = _problem("residual")
    H = Hessian.of(net, nn.CrossEntropyLoss(), x, y, mode="double-backward")
    V = torch.randn(H.shape[0], K, dtype=F64)
    assert error(H @ V, torch.stack([H @ v for v in V.unbind(1)], 1)) < ROUNDING
    assert "disagrees" in H.columns


def test_no_column_spoils_another():
    net, x, y = _problem("mlp")
    H = Hessian.of(net, nn.CrossEntropyLoss(), x, y)
    V = torch.randn(H.shape[0], K, dtype=F64)
    want = H @ V
    bad = V.clone()
    bad[3, 1] = float("nan")
    got = H @ bad
    rest = [0, 2, 3, 4]
    assert torch.equal(got[:, rest], want[:, rest])
    assert torch.isnan(got[:, 1]).any()


def test_batches_have_their_columns_at_once():
    net, x, y = _problem("residual")
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]

    def closure(batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    for keep in (True, False):
        H = Hessian(closure, net.parameters(), batches=batches, weights=[3 / 7, 4 / 7], keep_graphs=keep)
        got = H @ torch.eye(H.shape[0], dtype=F64)
        assert error(got, dense_hessian(F.cross_entropy(net(x), y), list(net.parameters()))) < ROUNDING


# A chosen mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fastest"),
    [
        *(("Hessian", mode) for mode in Hessian._MODES),
        *itertools.product(["GGN", "Jacobian"], GGN._MODES),
    ],
)
def test_a_mode_that_was_chosen_can_be_given_back(kind, fastest, monkeypatch):
    net, x, y = _problem("residual")
    modes = Hessian._MODES if kind == "Hessian" else GGN._MODES
    clock = iter(float(mode != fastest) for mode in modes for _ in range(_curvature._TRIALS))
    monkeypatch.setattr(
        _curvature.CurvatureOperator, "_timed", lambda self, m, v, out: m.product(v, out) or next(clock)
    )
    first = _operator(kind, net, x, y, "auto", "cross-entropy")
    assert first.chosen_mode is None
    n = first.params.n
    v, V = torch.randn(n, dtype=F64), torch.randn(n, K, dtype=F64)
    products = first @ v, first @ V
    assert first.chosen_mode == first.mode == fastest

    def never(*_):
        raise AssertionError("a mode was timed")

    monkeypatch.setattr(_curvature.CurvatureOperator, "_timed", never)
    resumed = _operator(kind, net, x, y, "auto", "cross-entropy")
    resumed.chosen_mode = first.chosen_mode
    assert resumed.mode == fastest
    assert torch.equal(resumed @ v, products[0])
    assert torch.equal(resumed @ V, products[1])
    assert resumed.timings == {}
    with torch.no_grad():
        next(net.parameters()).mul_(1.1)
    assert torch.equal(resumed @ v, first @ v)
    resumed.chosen_mode = None  # chooses again
    with pytest.raises(AssertionError, match="a mode was timed"):
        resumed @ v


def test_recognised_layers_are_no_choice():
    net, x, y = _problem("mlp")
    first = Hessian.of(net, nn.CrossEntropyLoss(), x, y)
    v = torch.randn(first.shape[0], dtype=F64)
    want = first @ v
    assert first.chosen_mode == "r-operator"
    resumed = Hessian.of(net, nn.CrossEntropyLoss(), x, y)
    resumed.chosen_mode = "r-operator"
    assert torch.equal(resumed @ v, want)
    assert resumed.mode == "r-operator"
    fixed = Hessian.of(net, nn.CrossEntropyLoss(), x, y, mode="double-backward")
    assert fixed.chosen_mode == "double-backward"
    fixed.chosen_mode = "double-backward"
    for operator, bad in ((fixed, "forward-over-reverse"), (fixed, "r-operator"), (first, "forward"), (first, 3)):
        with pytest.raises(ValueError, match="Hessian: chosen_mode: expected '"):
            operator.chosen_mode = bad


def test_no_warning_comes_of_columns():
    net, x, y = _problem("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("double-backward", "forward-over-reverse"):
            H = Hessian.of(net, nn.CrossEntropyLoss(), x, y, mode=mode)
            H @ torch.eye(H.shape[0], dtype=F64)
