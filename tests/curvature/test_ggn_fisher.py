"""GGN, Fisher and empirical Fisher against J^T M J with a dense Jacobian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, Residual, Transformer, data, dense, dense_jacobian, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian, _losses

MODES = ["auto", "double-backward", "forward"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _problem(make):
    net = make()
    x, y = data()
    return net, x.flatten(1), y, list(net.parameters())


NETS = {"layers": mlp, "residual": lambda: Residual().double()}


def _softmax_blocks(outputs):
    p = torch.softmax(outputs.detach(), 1)
    return torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_ggn_of_cross_entropy(net, mode):
    net, x, y, params = _problem(NETS[net])

    def closure():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y) + params[0].square().sum()  # the penalty has no part in it

    G = GGN(closure, params, mode=mode)
    jacobian = dense_jacobian(net(x), params)
    got = dense(G)
    assert error(got, jacobian.T @ _softmax_blocks(net(x)) @ jacobian / len(x)) < ROUNDING
    assert torch.linalg.eigvalsh(got).min() > -ROUNDING * torch.linalg.eigvalsh(got).max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_ggn_of_another_loss_need_not_be_definite(net, mode):
    net, x, _, params = _problem(NETS[net])

    def closure():
        outputs = net(x)
        return outputs, (torch.sin(outputs) - 1).square().mean()

    s = net(x).detach().reshape(-1)
    middle = torch.diag(2 / s.numel() * (torch.cos(s) ** 2 - (torch.sin(s) - 1) * torch.sin(s)))
    jacobian = dense_jacobian(net(x), params)
    assert error(dense(GGN(closure, params, mode=mode)), jacobian.T @ middle @ jacobian) < ROUNDING


def test_ggn_is_the_hessian_where_the_outputs_are_linear():
    net = nn.Linear(4, 3).double()
    x, y = data()
    x = x.flatten(1)
    H, G = (cls.of(net, nn.CrossEntropyLoss(), x, y) for cls in (Hessian, GGN))
    assert error(dense(G), dense(H)) < ROUNDING


def test_ggn_with_an_activation_on_the_outputs_and_views_below_the_loss():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (6,))
    net = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3), nn.Tanh()).double()
    params = list(net.parameters())

    def closure():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs.view(6, 3), y)

    G = GGN(closure, params)
    jacobian = dense_jacobian(net(x), params)
    want = jacobian.T @ _softmax_blocks(net(x).view(6, 3)) @ jacobian / 6
    assert error(dense(G), want) < ROUNDING
    assert G.mode == "r-operator"


@pytest.mark.filterwarnings("ignore::secant.SecantWarning")
def test_ggn_of_a_language_model_reads_the_log_probabilities(monkeypatch):
    net = Transformer().double()
    tokens = torch.randint(0, 11, (2, 5))
    params = list(net.parameters())
    calls = []
    once = _losses.dispatch.call
    monkeypatch.setattr(_losses.dispatch, "call", lambda name, *a: calls.append(name) or once(name, *a))

    def closure():
        logits = net(tokens)
        return logits, F.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))

    def closure_of_views():
        logits = net(tokens)
        return logits, F.cross_entropy(logits.view(-1, 11), tokens.reshape(-1))

    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    for c, recognised in ((closure, False), (closure_of_views, True)):
        calls.clear()
        got = GGN(c, params, mode="double-backward") @ v
        assert calls == (["cross_entropy_hvp"] if recognised else [])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs, loss = c()
            jacobian = dense_jacobian(outputs, params)
            gradient = torch.autograd.grad(loss, outputs, create_graph=True)[0].reshape(-1)
            middle = torch.stack([torch.autograd.grad(g, outputs, retain_graph=True)[0].reshape(-1) for g in gradient])
        want = jacobian.T @ (middle @ (jacobian @ v))
        # LayerNorm and attention divide and exponentiate: some hundreds of roundings rather than some tens.
        assert error(got, want) < 10 * ROUNDING


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_empirical_fisher(net, mode):
    net, x, y, params = _problem(NETS[net])

    def closure():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y, reduction="none")

    gradients = dense_jacobian(closure()[1], params)
    E = EmpiricalFisher(closure, params, mode=mode)
    assert error(dense(E), gradients.T @ gradients / len(x)) < ROUNDING
    summed = EmpiricalFisher(closure, params, mode=mode, reduction="sum")
    assert error(dense(summed), gradients.T @ gradients) < ROUNDING


def _expected(likelihood, outputs):
    f = outputs.detach().reshape(-1)
    if likelihood == "categorical":
        return _softmax_blocks(outputs) / len(outputs)
    return torch.diag(torch.ones_like(f) if likelihood == "gaussian" else torch.sigmoid(f) * torch.sigmoid(-f)) / len(f)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_fisher_is_the_ggn_in_expectation(likelihood):
    net, x, _, params = _problem(mlp)
    jacobian = dense_jacobian(net(x), params)
    want = jacobian.T @ _expected(likelihood, net(x)) @ jacobian
    v = torch.randn(len(want), dtype=torch.float64)
    F_ = Fisher.of(net, x, likelihood=likelihood)
    draws = []
    for seed in range(500):
        F_.resample(seed)
        draws.append(v @ (F_ @ v))
    draws = torch.stack(draws)
    assert abs(float(draws.mean() - v @ want @ v)) < 4 * float(draws.std()) / len(draws) ** 0.5


def test_fisher_is_one_matrix_per_seed():
    net, x, y, params = _problem(mlp)

    def closure():
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y)

    first, again = Fisher(closure, params, seed=3), Fisher(lambda: net(x), params, seed=3)
    matrix = dense(first)
    assert (matrix == dense(first)).all()
    assert (matrix == dense(again)).all()
    assert error(matrix.T, matrix) < ROUNDING
    first.resample(4)
    assert error(dense(first), matrix) > 0.01
    assert (
        Fisher(closure, params, seed=3, reduction="sum") @ torch.ones(len(matrix)).double() - 7 * matrix.sum(1)
    ).abs().max() < 1e-12
