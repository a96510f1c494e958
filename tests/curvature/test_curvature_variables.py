"""What may be a parameter: leaves, hidden values, views, tied and parametrised weights; what is said of the others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from curvature_problems import ROUNDING, data, dense, dense_hessian, dense_jacobian, error, mlp
from secant.curvature import GGN, EmpiricalFisher, Fisher, Hessian

MODES = ["auto", *Hessian._MODES]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Hidden:
    """A network whose first layers ran before: the closure starts from the tensor h that they made."""

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.x, self.y = torch.randn(5, 4, dtype=F64), torch.randint(0, 2, (5,))
        self.h = self.net[1](self.net[0](self.x))

    def outputs(self):
        return self.net[2:](self.h)

    def loss(self):
        return F.cross_entropy(self.outputs(), self.y)

    def params(self, name):
        w, b = self.net[2].weight, self.net[4].bias
        return {"alone": [self.h], "first": [self.h, w, b], "last": [b, w, self.h]}[name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("choice", ["alone", "first", "last"])
def test_hessian_of_a_hidden_tensor(choice, mode):
    problem = Hidden()
    params = problem.params(choice)
    H = Hessian(problem.loss, params, mode=mode)
    assert error(dense(H), dense_hessian(problem.loss(), params)) < ROUNDING


def test_hidden_tensor_that_a_matrix_product_made():
    """The reader of layers stops at a parameter, not at the layer that made it."""
    problem = Hidden()
    z = problem.net[0](problem.x)

    def loss():
        return F.cross_entropy(problem.net[1:](z), problem.y)

    assert error(dense(Hessian(loss, [z])), dense_hessian(loss(), [z])) < ROUNDING


@pytest.mark.parametrize("mode", ["auto", "double-backward", "forward"])
@pytest.mark.parametrize("choice", ["alone", "first", "last"])
def test_ggn_and_fishers_of_a_hidden_tensor(choice, mode):
    problem = Hidden()
    params = problem.params(choice)
    jacobian = dense_jacobian(problem.outputs(), params)
    p = torch.softmax(problem.outputs().detach(), 1)
    blocks = torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p]) / 5
    G = GGN(lambda: (f := problem.outputs(), F.cross_entropy(f, problem.y)), params, mode=mode)
    assert error(dense(G), jacobian.T @ blocks @ jacobian) < ROUNDING

    def losses():
        outputs = problem.outputs()
        return outputs, F.cross_entropy(outputs, problem.y, reduction="none")

    gradients = dense_jacobian(losses()[1], params)
    E = EmpiricalFisher(losses, params, mode=mode)
    assert error(dense(E), gradients.T @ gradients / 5) < ROUNDING
    fisher = dense(Fisher(problem.outputs, params, likelihood="gaussian", samples=400, mode=mode))
    noise = torch.linalg.matrix_norm(jacobian) ** 2 / 10  # entries of the mean of r r^T have a variance of at most 2
    assert torch.linalg.matrix_norm(fisher - jacobian.T @ jacobian / 10) < 4 * noise * (2 / 400) ** 0.5


def test_outputs_that_are_a_parameter():
    problem = Hidden()
    leaf = torch.randn(5, 3, dtype=F64, requires_grad=True)
    for h in (problem.h, leaf):
        G = GGN(lambda h=h: (h, (h**4).sum()), [h])
        assert error(dense(G), torch.diag(12 * h.detach().reshape(-1) ** 2)) < ROUNDING


def test_views_of_a_parameter():
    w = torch.randn(4, 4, dtype=F64, requires_grad=True)
    x = torch.randn(5, 4, dtype=F64)
    rows, flat, turned = w[:2], w.view(-1), w.t()
    for view, loss in (
        (rows, lambda: (rows**3).sum() + (rows[0] * rows[1]).prod()),
        (flat, lambda: (torch.tanh(F.linear(x, flat.view(4, 4))) ** 3).sum()),
        (turned, lambda: (torch.tanh(F.linear(x, turned)) ** 3).sum()),
        (turned, lambda: (torch.tanh(F.linear(x, turned.t())) ** 3).sum()),
    ):
        assert error(dense(Hessian(loss, [view])), dense_hessian(loss(), [view])) < ROUNDING
    parts = [w[:2], w[2:]]

    def both():
        return (parts[0] * parts[1]).square().sum()

    assert error(dense(Hessian(both, parts)), dense_hessian(both(), parts)) < ROUNDING
    a, b = w.unbind()[:2]  # two outputs of one node
    assert error(dense(Hessian(lambda: (a * a * b).sum(), [a, b])), dense_hessian((a * a * b).sum(), [a, b])) < ROUNDING


@pytest.mark.parametrize("turned", [False, True])
def test_tied_weights(turned):
    layer, x = nn.Linear(4, 4).double(), torch.randn(5, 4, dtype=F64)
    last = (lambda h: F.linear(h, layer.weight.t())) if turned else layer

    def loss():
        return F.mse_loss(last(torch.tanh(layer(x))), x)

    assert error(dense(Hessian(loss, layer.parameters())), dense_hessian(loss(), list(layer.parameters()))) < ROUNDING


def test_parametrised_weights():
    layer, x = nn.Linear(4, 4).double(), torch.randn(5, 4, dtype=F64)
    torch.nn.utils.parametrizations.orthogonal(layer)

    def loss():
        return F.mse_loss(torch.tanh(layer(x)), x)

    params = list(layer.parameters())
    # The exponential of a matrix: some hundreds of roundings rather than some tens.
    assert error(dense(Hessian(loss, params)), dense_hessian(loss(), params)) < 10 * ROUNDING
    computed = Hessian(loss, [layer.weight])
    with pytest.raises(ValueError, match=r"params\[0\]: expected a tensor that the closure uses, .* computed again"):
        computed @ torch.ones(16, dtype=F64)
    with parametrize.cached():
        params = [layer.weight, layer.bias]
        assert error(dense(Hessian(loss, params)), dense_hessian(loss(), params)) < ROUNDING


def test_order_of_the_parameters_is_that_of_the_vector():
    net = mlp()
    x, y = data()
    params = list(net.parameters())[::-1]

    def loss():
        return F.cross_entropy(net(x), y)

    H = Hessian(loss, params)
    assert error(dense(H), dense_hessian(loss(), params)) < ROUNDING
    assert H.mode == "r-operator"


def test_a_hidden_tensor_changed_in_place():
    problem = Hidden()
    h = problem.h * 1.0
    h.mul_(2.0)
    H = Hessian(lambda: (h**3).sum(), [h])
    ones = torch.ones(15, dtype=F64)
    first = H @ ones
    assert error(first, 6 * h.detach().reshape(-1)) < ROUNDING
    with torch.no_grad():
        h.mul_(2.0)
    assert error(H @ ones, 2 * first) < ROUNDING

    def loss():
        h.mul_(1.1)
        return (h**3).sum()

    with pytest.raises(ValueError, match="closure: expected parameters left as they are, got one changed in place"):
        Hessian(loss, [h]) @ ones


def test_retained_gradients_are_left_alone():
    problem = Hidden()
    h = problem.h
    h.retain_grad()
    h.grad = torch.full_like(h, 7.0)
    kept = h.grad
    for mode in MODES:
        H = Hessian(problem.loss, [h], mode=mode)
        assert error(dense(H), dense_hessian(problem.loss(), [h])) < ROUNDING
        h.grad = kept
        H @ torch.ones(15, dtype=F64)
        assert h.grad is kept
        assert (kept == 7.0).all()


class Cube(torch.autograd.Function):
    """Hides its argument from function overrides."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize("leaf", [True, False])
def test_hidden_uses_are_right_or_refused(leaf):
    w = torch.randn(6, dtype=F64, requires_grad=True)
    w = w if leaf else w * 1.0
    before = w * 2.0
    for loss, curvature in ((lambda: Cube.apply(w).sum(), 6 * w), (lambda: (before**3).sum(), 48 * w)):
        for mode in ("auto", "double-backward"):
            assert error(dense(Hessian(loss, [w], mode=mode)), torch.diag(curvature.detach())) < ROUNDING
        for mode in ("forward-over-reverse", "reverse-over-forward"):
            with pytest.raises(RuntimeError, match=r"a use of params\[0\] is hidden"):
                Hessian(loss, [w], mode=mode) @ torch.ones(6, dtype=F64)
        G = GGN(lambda loss=loss: (f := loss(), f**2), [w], mode="forward")
        with pytest.raises(RuntimeError, match=r"a use of params\[0\] is hidden"):
            G @ torch.ones(6, dtype=F64)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_closure_does_not_use(mode):
    problem = Hidden()
    again = Hessian(lambda: F.cross_entropy(problem.net(problem.x), problem.y), [problem.h], mode=mode)
    with pytest.raises(ValueError, match=r"params\[0\]: expected a tensor that the closure uses"):
        again @ torch.ones(15, dtype=F64)
    spare = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="params: expected tensors that the closure uses, got none"):
        Hessian(problem.loss, [spare], mode=mode) @ torch.ones(2, dtype=F64)
    matrix = dense(Hessian(problem.loss, [spare, problem.h], mode=mode))  # beside others, a leaf has a zero row
    assert (matrix[:2] == 0).all()
    assert error(matrix[2:, 2:], dense_hessian(problem.loss(), [problem.h])) < ROUNDING
    for make in (GGN, EmpiricalFisher, Fisher):
        operator = make(lambda: (problem.net(problem.x), torch.ones(5, dtype=F64)), [problem.h])
        with pytest.raises(ValueError, match=r"params\[0\]: expected a tensor that the closure uses"):
            operator @ torch.ones(15, dtype=F64)


def test_parameters_that_are_computed_from_each_other_are_refused():
    problem = Hidden()
    w = problem.net[0].weight
    for params in ([problem.h, w], [w, problem.h], [w, w.view(-1)]):
        with pytest.raises(ValueError, match="expected a tensor that no other one of params is computed from"):
            Hessian(problem.loss, params)
    h = problem.h
    assert error(dense(Hessian(lambda: h.sum() + (h**2).sum(), [h])), 2 * torch.eye(15, dtype=F64)) < ROUNDING


def test_a_parameter_that_needs_no_gradient_any_more_is_named():
    net = mlp()
    x, y = data()
    H = Hessian(lambda: F.cross_entropy(net(x), y), net.parameters())
    ones = torch.ones(H.shape[0], dtype=F64)
    H @ ones
    net[1].weight.requires_grad_(False)
    H.refresh()
    with pytest.raises(ValueError, match=r"params\[0\]: expected a tensor that requires gradients, got requires_grad"):
        H @ ones
