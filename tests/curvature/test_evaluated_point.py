"""One evaluation of a closure: what it tells by its kind, how often it is made, and what is said of other kinds."""

from __future__ import annotations

import functools
import gc
import random
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature_problems import ROUNDING, Residual, data, dense, dense_hessian, dense_jacobian, error, flat, mlp
from secant.curvature import GGN, EvaluatedPoint, Fisher, Hessian, LinearOperator, _curvature, _evaluate, _graph, _point

F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Problem:
    """A net, and closures of every kind over it that count their evaluations."""

    def __init__(self, net=None):
        self.net, self.count = net or mlp(), 0
        self.x, self.y = data()
        if net is not None:
            self.x = self.x.flatten(1)
        self.t = torch.randn(7, 3, dtype=F64)
        self.params = list(self.net.parameters())

    def outputs(self):
        self.count += 1
        outputs = self.net(self.x)
        return outputs, F.cross_entropy(outputs, self.y)

    def loss(self):
        return self.outputs()[1]

    def residuals(self):
        self.count += 1
        return self.net(self.x) - self.t

    def several(self):
        return self.residuals(), 0.3 * self.params[0]

    def gradient(self):
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def squares(self):
        return sum(0.5 * r.square().sum() for r in self.several())


@pytest.mark.parametrize("make", [None, lambda: Residual().double()])
@pytest.mark.parametrize("kind", ["loss", "outputs", "residuals", "several"])
def test_everything_comes_from_one_evaluation(kind, make):
    problem = Problem(make and make())
    params = problem.params
    value = {"residuals": lambda: 0.5 * problem.residuals().square().sum(), "several": problem.squares}.get(
        kind, problem.loss
    )
    loss = value()
    gradient = flat(torch.autograd.grad(loss, params, retain_graph=True), params)
    hessian = dense_hessian(loss, params)
    jacobian = None
    if kind == "outputs":
        jacobian = dense_jacobian(problem.outputs()[0], params)
    elif kind != "loss":
        r = problem.residuals() if kind == "residuals" else torch.cat([r.reshape(-1) for r in problem.several()])
        jacobian = dense_jacobian(r, params)
    problem.count = 0
    modes = dict.fromkeys(("hessian", "ggn", "jacobian"), "double-backward")
    if make is None and kind != "several":
        modes = {}  # recognised layers
    closure, kind = getattr(problem, kind), "residuals" if kind == "several" else kind
    point = EvaluatedPoint(closure, params, kind, modes=modes)
    assert problem.count == 1
    assert point.value.shape == ()
    assert not point.value.requires_grad
    assert error(point.value, loss.detach()) < ROUNDING
    assert error(point.gradient(), gradient) < ROUNDING
    assert point.gradient() is point.gradient()
    assert point.hessian() is point.hessian()
    assert error(dense(point.hessian()), hessian) < ROUNDING
    if jacobian is not None:
        assert point.jacobian() is point.jacobian()
        assert error(point.jacobian().to_dense(), jacobian) < ROUNDING
        want = jacobian.T @ jacobian
        if kind == "outputs":
            p = torch.softmax(problem.net(problem.x), 1).detach()
            middle = torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in p]) / len(p)
            want = jacobian.T @ middle @ jacobian
        assert error(dense(point.ggn()), want) < ROUNDING
        assert error(point.ggn().diag().value, want.diagonal()) < 10 * ROUNDING
    if kind == "residuals":
        assert error(point.residuals(), r.detach().reshape(-1)) < ROUNDING
        assert error(point.gradient(), point.jacobian().T @ point.residuals()) < ROUNDING
        assert error(dense(point.jacobian().T @ point.jacobian()), dense(point.ggn())) < ROUNDING
    assert problem.count == 1
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("kind", ["outputs", "residuals"])
def test_modes_that_evaluate_again_find_the_same(kind):
    problem = Problem(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double())
    closure = getattr(problem, kind)
    state = torch.get_rng_state()
    want = EvaluatedPoint(
        closure, problem.params, kind, modes=dict.fromkeys(("hessian", "ggn", "jacobian"), "double-backward")
    )
    matrices = [want.hessian().to_dense(), want.ggn().to_dense(), want.jacobian().to_dense()]
    for hessian in ("forward-over-reverse", "reverse-over-forward"):
        torch.set_rng_state(state)
        modes = {"hessian": hessian, "ggn": "forward", "jacobian": "forward"}
        point = EvaluatedPoint(closure, problem.params, kind, modes=modes)
        assert torch.equal(point.value, want.value)
        operators = [point.hessian(), point.ggn(), point.jacobian()]
        for operator, matrix in zip(operators, matrices, strict=True):
            assert error(operator.to_dense(), matrix) < ROUNDING
            assert operator.mode in modes.values()
        assert point.modes == modes


def test_a_normalisation_within_a_derivative_is_made_again_in_parts():
    """torch 2.13 differentiates it wrongly; an exact layer norm is the measure."""
    x = torch.randn(5, 2, dtype=F64)
    w = torch.randn(2, 6, dtype=F64, requires_grad=True)
    count = []

    def loss(norm):
        at = x.clone().requires_grad_()
        u = norm(torch.sin(at @ w)).square().sum()
        (slope,) = torch.autograd.grad(u, at, create_graph=True)
        return (slope + torch.sin(at @ w).sum()).square().mean()

    def exact(z):
        z = z - z.mean(-1, keepdim=True)
        return torch.tanh(z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt())

    def closure():
        count.append(1)
        return loss(lambda z: torch.tanh(F.layer_norm(z, (6,))))

    point = EvaluatedPoint(closure, [w], modes={"hessian": "double-backward"})
    truth = loss(exact)
    # Derivatives of rsqrt to the third order: some hundreds of roundings, magnified.
    assert error(point.value, truth.detach()) < 100 * ROUNDING
    assert (
        error(point.gradient(), torch.autograd.grad(truth, w, create_graph=True)[0].detach().reshape(-1))
        < 100 * ROUNDING
    )
    assert len(count) == 1
    assert error(point.hessian().to_dense(), dense_hessian(truth, [w])) < 100 * ROUNDING
    assert len(count) == 2


def test_a_closure_that_calls_backward_has_its_gradient_read():
    problem = Problem()
    unused = torch.ones(2, dtype=F64, requires_grad=True)
    params = [*problem.params, unused]
    point = EvaluatedPoint(problem.gradient, params, "gradient")
    loss = problem.loss()
    assert torch.equal(point.value, loss.detach())
    want = flat(torch.autograd.grad(loss, params, allow_unused=True), params)
    assert torch.equal(point.gradient(), want)
    problem.params[0].grad.zero_()
    assert torch.equal(point.gradient(), want)  # a copy
    number = EvaluatedPoint(lambda: problem.gradient().item(), params, "gradient")
    assert number.value.item() == loss.item()
    assert torch.equal(number.gradient(), want)


def test_an_unused_parameter_has_zero_gradient_and_none_used_is_an_error():
    w, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    point = EvaluatedPoint(lambda: (w**3).sum(), [w, unused])
    assert point.gradient().tolist() == [3.0, 3.0, 0.0, 0.0]
    assert (point.hessian() @ torch.ones(4)).tolist() == [6.0, 6.0, 0.0, 0.0]
    other = EvaluatedPoint(lambda: (w**3).sum(), [unused])
    with pytest.raises(ValueError, match="EvaluatedPoint: params: expected tensors that the closure uses"):
        other.gradient()


def _w():
    return torch.ones(3, requires_grad=True)


W = _w()


def _backward(result):
    def closure():
        (W * W).sum().backward()
        return result()

    return closure


LOSS = "expected a loss with its graph, and no call of backward, got "
PAIR = r"expected a pair \(outputs, loss\) with their graph, and no call of backward, got "
RESIDUALS = r"expected residuals with their graph \(a tensor or several\), and no call of backward, got "
GRADIENT = "expected a loss, and a call of backward within, got "


@pytest.mark.parametrize(
    ("kind", "closure", "message"),
    [
        ("loss", lambda: 1.5, LOSS + "a number without a graph"),
        ("loss", lambda: (W * W).sum().item(), LOSS + "a number without a graph"),
        ("loss", lambda: (W * W).sum().detach(), LOSS + "a loss without its graph"),
        ("loss", lambda: W * W, LOSS + r"residuals, or outputs, of shape \(3,\)"),
        ("loss", lambda: (W * W, W.sum()), LOSS + r"a pair \(outputs, loss\)"),
        ("loss", lambda: (W * W, W), LOSS + "a tuple of Tensor, Tensor"),
        ("loss", lambda: None, LOSS + "NoneType"),
        ("loss", lambda: torch.tensor(1), LOSS + r"a tensor of shape \(\), torch.int64"),
        ("loss", _backward(lambda: (W * W).sum()), LOSS + "one that called backward"),
        ("outputs", lambda: (W * W).sum(), PAIR + "a loss with its graph"),
        ("outputs", lambda: (W.detach(), W.sum()), PAIR + r"a pair \(outputs, loss\), outputs without a graph"),
        ("outputs", _backward(lambda: (W, W.sum())), PAIR + "one that called backward"),
        ("outputs", lambda: (W, W, W), PAIR + "a tuple of Tensor, Tensor, Tensor"),
        ("residuals", lambda: 2.0, RESIDUALS + "a number without a graph"),
        ("residuals", lambda: W.detach(), RESIDUALS + r"residuals, or outputs, of shape \(3,\) without a graph"),
        ("residuals", lambda: (), RESIDUALS + "a tuple of nothing"),
        ("residuals", lambda: [W, 1.0], RESIDUALS + "a list of Tensor, float"),
        ("residuals", _backward(lambda: W * W), RESIDUALS + "one that called backward"),
        ("gradient", lambda: (W * W).sum(), GRADIENT + "one that did not call backward"),
        ("gradient", _backward(lambda: (W, W.sum())), GRADIENT + r"a pair \(outputs, loss\)"),
    ],
)
def test_another_kind_of_closure_is_named(kind, closure, message):
    W.grad = None
    with pytest.raises(ValueError, match="Newton: closure: " + message):
        EvaluatedPoint(closure, [W], kind, name="Newton")


@pytest.mark.parametrize(
    ("kind", "closure", "ask", "message"),
    [
        ("gradient", _backward(lambda: (W * W).sum()), "hessian", r"got a loss, and a call of backward within \(kind"),
        (
            "gradient",
            _backward(lambda: (W * W).sum()),
            "jacobian",
            r"EvaluatedPoint.jacobian: closure: expected residu",
        ),
        (
            "loss",
            lambda: (W * W).sum(),
            "ggn",
            r"EvaluatedPoint.ggn: closure: expected a pair \(outputs, loss\) .* or re",
        ),
        ("loss", lambda: (W * W).sum(), "residuals", r"expected residuals .*, got a loss with its graph, and no call"),
        ("residuals", lambda: W * W, "fisher", r"fisher: closure: expected a pair \(outputs, loss\)"),
    ],
)
def test_what_a_kind_does_not_give_is_named(kind, closure, ask, message):
    W.grad = None
    point = EvaluatedPoint(closure, [W], kind)
    with pytest.raises(ValueError, match=message):
        getattr(point, ask)()


def test_bad_arguments_are_named():
    for call, error_type, message in (
        (lambda: EvaluatedPoint(1, [W]), TypeError, "EvaluatedPoint: closure: expected a function"),
        (lambda: EvaluatedPoint(abs, [W], "losses"), ValueError, "kind: expected 'loss' or 'outputs' or"),
        (lambda: EvaluatedPoint(abs, []), ValueError, "params: expected at least one tensor"),
        (lambda: EvaluatedPoint(abs, [W], modes={"h": "auto"}), ValueError, "modes: expected keys among hessian, ggn"),
    ):
        with pytest.raises(error_type, match=message):
            call()
    first = EvaluatedPoint(lambda: (W * W).sum(), [W])
    for params in ([_w()], [W, _w()], []):
        with pytest.raises(ValueError, match="params: expected those of the point that this one is like, got others"):
            EvaluatedPoint(lambda: (W * W).sum(), params, like=first)
    point = EvaluatedPoint(lambda: (W * W).sum(), [W], modes={"hessian": "fast"})
    with pytest.raises(ValueError, match="chosen_mode: expected 'r-operator' or 'double-backward'"):
        point.hessian()


def test_operators_of_a_point_that_was_left_say_so():
    problem = Problem()
    point = EvaluatedPoint(problem.outputs, problem.params, "outputs")
    v = torch.randn(point.params.n, dtype=F64)
    first = point.hessian() @ v
    point.hessian().refresh()
    assert torch.equal(point.hessian() @ v, first)
    gradient = point.gradient()
    with torch.no_grad():
        problem.params[0].mul_(2)
    for ask in (point.hessian, point.ggn, point.jacobian):
        with pytest.raises(RuntimeError, match="params: expected the values at the evaluated point of this operator"):
            ask() @ v
    assert point.gradient() is gradient
    assert problem.count == 1


def test_fisher_of_a_point():
    problem = Problem()
    point = EvaluatedPoint(problem.outputs, problem.params, "outputs")
    v = torch.randn(point.params.n, dtype=F64)
    want = Fisher(lambda: problem.net(problem.x), problem.params, samples=4, seed=3) @ v
    assert torch.equal(point.fisher(samples=4, seed=3) @ v, want)
    assert point.fisher(samples=4, seed=3) is point.fisher(seed=3, samples=4)
    assert not torch.equal(point.fisher(samples=4, seed=4) @ v, want)
    assert problem.count == 1


@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse", "reverse-over-forward"])
def test_random_numbers_and_buffers_go_on_as_after_a_plain_call(mode):
    def make():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        return Problem(net)

    plain, problem = make(), make()
    torch.manual_seed(5)
    losses = [plain.loss() for _ in range(2)]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    points = []
    for loss in losses:  # each with another mask, as in a training loop
        point = EvaluatedPoint(problem.loss, problem.params, modes={"hessian": mode})
        points.append(point)
        assert error(point.value, loss.detach()) < ROUNDING
    assert not torch.equal(points[0].value, points[1].value)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(problem.net.buffers(), plain.net.buffers(), strict=True):
        assert error(ours.double(), theirs.double()) < ROUNDING
    # Products at either point are those of its own mask, and leave everything as it was.
    for point, loss in zip(points, losses, strict=True):
        H = dense_hessian(loss, plain.params)
        # Batch norm divides by a standard deviation: some hundreds of roundings rather than some tens.
        assert error(dense(point.hessian()), H) < 10 * ROUNDING
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(problem.net.buffers(), plain.net.buffers(), strict=True):
        assert error(ours.double(), theirs.double()) < ROUNDING


def test_the_vectors_of_a_spectral_norm_are_those_of_the_point():
    torch.manual_seed(1)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = Problem(net)
    problem.params = [net[2].weight]
    before = net[0].weight_u.clone()
    point = EvaluatedPoint(problem.loss, problem.params, modes={"hessian": "forward-over-reverse"})
    after = net[0].weight_u.clone()
    assert not torch.equal(before, after)  # one step of the power iteration
    H = dense(
        point.hessian()
    )  # evaluates again, from the vectors before it; else an error says that it is not repeated
    assert torch.equal(net[0].weight_u, after)
    with torch.no_grad():
        net[0].weight_u.copy_(before)
    assert error(H, dense_hessian(problem.loss(), problem.params)) < ROUNDING


def test_a_closure_that_raises_leaves_generators_and_buffers():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    problem = Problem(net)
    state, buffers = torch.get_rng_state(), [b.clone() for b in net.buffers()]

    def closure():
        problem.loss()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        EvaluatedPoint(closure, problem.params)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, c) for b, c in zip(net.buffers(), buffers, strict=True))


def test_choices_and_checks_go_on_to_the_next_point(monkeypatch):
    problem = Problem(Residual().double())
    first = EvaluatedPoint(problem.loss, problem.params)
    v = torch.randn(first.params.n, dtype=F64)
    assert first.modes == {}
    first.hessian() @ v
    modes = first.modes
    assert modes == {"hessian": first.hessian().mode}
    with torch.no_grad():
        problem.params[0].mul_(1.5)

    def never(*_):
        raise AssertionError("modes were compared again")

    monkeypatch.setattr(_curvature.CurvatureOperator, "_choose", never)
    for options in ({"modes": modes}, {"like": first}):
        point = EvaluatedPoint(problem.loss, problem.params, **options)
        assert point.modes == modes
        want = Hessian(problem.loss, problem.params, mode=modes["hessian"]) @ v
        assert torch.equal(point.hessian() @ v, want)
    monkeypatch.setattr(_curvature.CurvatureOperator, "_asymmetry", never)  # nor is the symmetry looked at again
    again = EvaluatedPoint(problem.loss, problem.params, like=first)
    assert torch.equal(again.hessian() @ v, want)
    later = EvaluatedPoint(problem.loss, problem.params, like=EvaluatedPoint(problem.loss, problem.params, like=again))
    assert later.modes == modes
    assert torch.equal(later.hessian() @ v, want)


def _points(closure, params, count, kind="loss", **options):
    """Yield that many points in a row, whose parameters are moved a little between them."""
    point = None
    for _ in range(count):
        point = EvaluatedPoint(closure, params, kind, **(options if point is None else {"like": point}))
        yield point
        with torch.no_grad():
            for p in params:
                p.mul_(1.01)


def _waves():
    w = torch.linspace(0.5, 1.5, 6, dtype=F64, requires_grad=True)
    return w, lambda: (w[1:] * w[:-1].sin()).sum() + (w**4).sum()


def test_points_that_are_a_power_of_two_are_looked_at(monkeypatch):
    w, loss = _waves()
    watched, surveyed = [], []
    enter, survey = _evaluate._Watch.__enter__, _curvature._graph.survey
    monkeypatch.setattr(_evaluate._Watch, "__enter__", lambda self: watched.append(self) or enter(self))
    monkeypatch.setattr(_curvature._graph, "survey", lambda *args: surveyed.append(args) or survey(*args))
    found, v = [], torch.ones(6, dtype=F64)
    for point in _points(loss, [w], 9, modes={"hessian": "double-backward"}):
        before = len(watched), len(surveyed)
        product = point.hessian() @ v
        assert error(product, dense_hessian(loss(), [w]) @ v) < ROUNDING
        found.append((len(watched), len(surveyed) > before[1]))
    assert [looked for _, looked in found] == [True, True, False, True, False, False, False, True, False]
    assert [count for count, _ in found] == [1, 2, 2, 3, 3, 3, 3, 4, 4]
    last = point
    EvaluatedPoint(lambda: (w**2).sum(), [w], like=last)  # another function
    assert len(watched) == 5


def _drawing(draw):
    w = torch.ones(3, dtype=F64, requires_grad=True)
    return w, lambda: ((1.5 + draw()) * w**3).sum()


def _explicit():
    generator = torch.Generator().manual_seed(3)
    return lambda: torch.rand(3, generator=generator, dtype=F64)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, _explicit(), lambda: torch.rand(3, dtype=F64)])
@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse"])
def test_what_draws_is_repeated_at_every_point(draw, mode):
    w, loss = _drawing(draw)
    losses = []
    for point in _points(loss, [w], 7, modes={"hessian": mode}):
        product = point.hessian() @ torch.ones(3, dtype=F64)
        # 6 (1.5 + draw) w of the loss (1.5 + draw) w^3, w the same for all: the mean of the draws is that of the loss
        assert error(product.sum() * w[0].detach() ** 2 / 6, point.value) < ROUNDING
        losses.append(float(point.value / w[0].detach() ** 3))
    assert len(set(losses)) == 7  # the generators go on from one to the next


def test_the_gradient_is_differentiated_once_where_products_need_its_graph(monkeypatch):
    w, loss = _waves()
    pulls, pull = [], _graph.pull
    monkeypatch.setattr(_graph, "pull", lambda *args, **options: pulls.append(options) or pull(*args, **options))
    for i, point in enumerate(_points(loss, [w], 3)):
        pulls.clear()
        (want,) = torch.autograd.grad(loss(), w)
        assert torch.equal(point.gradient(), want)
        assert error(dense(point.hessian()), dense_hessian(loss(), [w])) < ROUNDING
        if i == 0:
            point.hessian().chosen_mode = "double-backward"
        else:
            assert sum(bool(options.get("create_graph")) for options in pulls) == 1
            assert pulls[0] == {"create_graph": True}
            assert not point.gradient().requires_grad


def test_modes_that_cannot_win_are_not_compared_at_a_point():
    w, plain = _waves()

    def loss():
        time.sleep(0.02)
        return plain()

    point = EvaluatedPoint(loss, [w])
    H = point.hessian()
    assert error(dense(H), dense_hessian(plain(), [w])) < ROUNDING
    assert point.modes == {"hessian": "double-backward"}
    assert isinstance(H.timings["double-backward"], float)
    for mode in ("forward-over-reverse", "reverse-over-forward"):
        assert "an evaluation of the closure alone takes longer" in H.timings[mode]


@pytest.mark.parametrize("kind", ["loss", "residuals"])
def test_the_graph_of_a_point_goes_with_it(kind):
    w, loss = _waves()
    closure = loss if kind == "loss" else lambda: w**3
    point = EvaluatedPoint(closure, [w], kind, modes={"hessian": "double-backward"})
    point.gradient()
    H = point.hessian()
    H @ torch.ones(6, dtype=F64)
    gone = weakref.ref(H)
    gc.disable()
    try:
        del point, H
        assert gone() is None
    finally:
        gc.enable()


def test_a_loss_that_is_not_finite_is_a_value():
    w = torch.tensor([1.0, float("nan")], requires_grad=True)
    point = EvaluatedPoint(lambda: (w * w).sum(), [w])
    assert torch.isnan(point.value)
    assert point.gradient().isnan().tolist() == [False, True]
    residuals = EvaluatedPoint(lambda: w * w, [w], "residuals")
    assert (residuals.jacobian() @ torch.ones(2)).isnan().tolist() == [False, True]


def test_operators_are_operators():
    problem = Problem()
    point = EvaluatedPoint(problem.residuals, problem.params, "residuals")
    G = point.ggn()
    assert isinstance(G, GGN)
    assert G._name == "GGN"
    damped = (point.jacobian().T @ point.jacobian()).damped(0.1)
    assert isinstance(damped, LinearOperator)
    step = damped.inverse(tol=1e-12) @ -point.gradient()
    j, r = point.jacobian().to_dense(), point.residuals()
    want = torch.linalg.solve(j.T @ j + 0.1 * torch.eye(j.shape[1], dtype=F64), -j.T @ r)
    assert error(step, want) < 1e-9
    assert problem.count == 1


class _Called:
    def __init__(self, function):
        self.function = function

    def __call__(self):
        return self.function()


class _CalledOtherwise(_Called):
    pass


def test_a_norm_that_a_closure_begins_to_use_is_made_in_parts():
    x, w = torch.randn(5, 2, dtype=F64), torch.randn(2, 6, dtype=F64, requires_grad=True)

    def loss(norm):
        at = x.clone().requires_grad_()
        u = norm(torch.sin(at @ w)).square().sum()
        return torch.autograd.grad(u, at, create_graph=True)[0].square().mean()

    def exact(z):
        z = z - z.mean(-1, keepdim=True)
        return torch.tanh(z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt())

    def fused(z):
        return torch.tanh(F.layer_norm(z, (6,)))

    point = None
    for k in range(1, 8):
        norm, truth = (torch.tanh, torch.tanh) if k < 5 else (fused, exact)
        point = EvaluatedPoint(lambda norm=norm: loss(norm), [w], like=point)
        want = dense_hessian(loss(truth), [w])
        assert error(point.hessian().to_dense(), want) < 100 * ROUNDING


def test_closures_without_code_are_told_apart():
    w, loss = _waves()

    def other():
        return (w**2).sum()

    routine = _point._Routine()
    partials = [functools.partial(f) for f in (loss, loss, loss, other)]
    assert [routine.is_due(f) for f in partials] == [True, True, False, True]
    routine = _point._Routine()
    assert [routine.is_due(c(loss)) for c in (*[_Called] * 3, _CalledOtherwise)] == [True, True, False, True]
