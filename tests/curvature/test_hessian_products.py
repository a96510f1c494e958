"""Products with the Hessian against dense double backward in float64, and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvature_problems import ACTIVATIONS, ROUNDING, Residual, cnn, data, dense, dense_hessian, error, mlp
from secant.curvature import Hessian
from secant.curvature._layers import _slope_and_ratio


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _losses(net):
    x, y = data()
    inputs = x.flatten(1)
    params = list(net.parameters())
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    ignored = torch.where(torch.arange(7) < 2, -100, y)

    def penalty():
        return sum(p.square().sum() for p in params)

    return {
        "cross-entropy": lambda: F.cross_entropy(net(x), y),
        "summed": lambda: F.cross_entropy(net(x), y, reduction="sum"),
        "class weights": lambda: F.cross_entropy(net(x), y, weight=weight),
        "ignored labels": lambda: F.cross_entropy(net(x), ignored),
        "label smoothing": lambda: F.cross_entropy(net(x), y, label_smoothing=0.1),
        "squares": lambda: F.mse_loss(net(x), inputs[:, :3]),
        "binary": lambda: F.binary_cross_entropy_with_logits(net(x), inputs[:, 1:].sigmoid()),
        "huber of a sigmoid": lambda: F.huber_loss(torch.sigmoid(net(x)), inputs[:, 1:], delta=0.3),
        "by hand": lambda: (net(x).exp() - inputs[:, :3] * net(x)).mean(),
        "penalty": lambda: F.cross_entropy(net(x), y) + 0.05 * penalty(),
        "two evaluations": lambda: 0.3 * F.mse_loss(net(x), inputs[:, :3]) - F.cross_entropy(net(x[:3]), y[:3]) / 2,
        "one element": lambda: F.mse_loss(net(x), inputs[:, :3]).reshape(1),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_r_operator_is_double_backward(activation):
    net = mlp(ACTIVATIONS[activation])
    losses = _losses(net)
    for name in ("cross-entropy", "squares", "penalty"):
        H = Hessian(losses[name], net.parameters())
        assert error(dense(H), dense_hessian(losses[name](), list(net.parameters()))) < ROUNDING, name
        assert H.mode == "r-operator"


@pytest.mark.parametrize("name", _losses(mlp()))
def test_r_operator_under_every_loss(name):
    net = mlp()
    loss = _losses(net)[name]
    H = Hessian(loss, net.parameters(), mode="auto" if name == "by hand" else "r-operator")
    assert error(dense(H), dense_hessian(loss(), list(net.parameters()))) < ROUNDING


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "reverse-over-forward"])
@pytest.mark.parametrize("make", [mlp, lambda: Residual().double()])
def test_every_mode(mode, make):
    net = make()
    x, y = data()
    x = x.flatten(1)

    def loss():
        return F.cross_entropy(net(x), y)

    H = Hessian(loss, net.parameters(), mode=mode)
    assert error(dense(H), dense_hessian(loss(), list(net.parameters()))) < ROUNDING
    assert H.mode == mode


def test_convolutions_go_through_autograd_and_a_mode_is_measured():
    net, y = cnn(), torch.tensor([0, 2, 1, 1])
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    H = Hessian.of(net, nn.CrossEntropyLoss(), x, y)
    params = list(net.parameters())
    assert error(dense(H), dense_hessian(F.cross_entropy(net(x), y), params)) < ROUNDING
    seconds = {mode: value for mode, value in H.timings.items() if isinstance(value, float)}
    assert set(H.timings) == set(Hessian._MODES)
    assert H.mode == min(seconds, key=seconds.get)


def test_rows_of_three_dimensions_and_a_changed_row_length():
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Unflatten(-1, (2, 3)), nn.Linear(3, 2), nn.Flatten()).double()

    def loss():
        return F.mse_loss(net(x), torch.ones(3, 16, dtype=torch.float64)[:, : net(x).shape[1]])

    H = Hessian(loss, net.parameters())
    assert error(dense(H), dense_hessian(loss(), list(net.parameters()))) < ROUNDING
    assert H.mode == "r-operator"


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (3,), (0, 4), (1, 2), (4, 3)])
def test_any_choice_of_parameters(chosen):
    net = mlp()
    x, y = data()
    everything = list(net.parameters())
    params = [everything[i] for i in chosen]

    def loss():
        return F.cross_entropy(net(x), y)

    for frozen in (False, True):
        for p in everything:
            p.requires_grad_(not frozen or any(p is q for q in params))
        H = Hessian(loss, params)
        assert error(dense(H), dense_hessian(loss(), params)) < ROUNDING
        assert H.mode == "r-operator"


def test_unused_parameter_has_a_zero_row():
    net, spare = mlp(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    x, y = data()
    for mode in ("auto", "double-backward"):
        H = Hessian(lambda: F.cross_entropy(net(x), y), [spare, *net.parameters()], mode=mode)
        matrix = dense(H)
        assert (matrix[:2] == 0).all()
        assert (matrix[:, :2] == 0).all()
        assert matrix[2:, 2:].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_zero_of_a_slope_keeps_its_second_derivative(dtype):
    slope, second = torch.tensor([0.0, 0.0, 2.0], dtype=dtype), torch.tensor([3.0, 0.0, 5.0], dtype=dtype)
    divided, ratio = _slope_and_ratio(slope, second)
    assert (divided - slope).abs().max() < torch.finfo(dtype).eps ** 2
    assert torch.allclose(divided * ratio, second, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_linear_regression_is_its_closed_form():
    net = nn.Linear(4, 1, bias=False).double()
    x, t = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    H = Hessian(lambda: 0.5 * (net(x) - t).square().sum(), net.parameters())
    assert error(dense(H), x.T @ x) < ROUNDING


def test_logistic_regression_is_its_closed_form():
    net = nn.Linear(4, 1, bias=False).double()
    x, t = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 2, (9, 1)).double()
    H = Hessian(lambda: F.binary_cross_entropy_with_logits(net(x), t, reduction="sum"), net.parameters())
    p = torch.sigmoid(net(x).detach())
    assert error(dense(H), x.T @ (p * (1 - p) * x)) < ROUNDING


def test_softmax_regression_is_its_closed_form():
    net = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    H = Hessian(lambda: F.cross_entropy(net(x), y, reduction="sum"), net.parameters())
    p = torch.softmax(net(x).detach(), 1)
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    want = torch.einsum("ncd,ni,nj->cidj", middle, x, x).reshape(12, 12)
    assert error(dense(H), want) < ROUNDING


def test_a_loss_without_curvature_gives_zero():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    H = Hessian(lambda: (3 * w).sum(), [w])
    assert (dense(H) == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), width=st.integers(1, 9), rows=st.integers(1, 6), name=st.sampled_from(list(ACTIVATIONS))
)
def test_symmetry(seed, width, rows, name):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, width), ACTIVATIONS[name](), nn.Linear(width, 2)).double()
    H = Hessian.of(net, nn.MSELoss(), torch.randn(rows, 3).double(), torch.randn(rows, 2).double())
    u, v = torch.randn(2, H.shape[0], dtype=torch.float64)
    hu, hv = H @ u, H @ v
    # Each side rounds relative to the magnitudes that it sums.
    scale = (u.abs() @ hv.abs() + v.abs() @ hu.abs()).item()
    assert abs(float(u @ hv - v @ hu)) <= 1e-12 * scale + 1e-300


def test_float32_is_close_to_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 5))
    x, y = torch.randn(200, 20), torch.randint(0, 5, (200,))
    v = torch.randn(sum(p.numel() for p in net.parameters()))
    single = Hessian.of(net, nn.CrossEntropyLoss(), x, y) @ v
    double = Hessian.of(net.double(), nn.CrossEntropyLoss(), x.double(), y) @ v.double()
    # Sums of 200 rows through three layers: a few tens of roundings of each number, most of which cancel.
    assert float((single - double).norm() / double.norm()) < 50 * torch.finfo(torch.float32).eps
