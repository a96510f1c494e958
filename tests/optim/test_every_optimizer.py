"""What every optimizer promises, on every one of them: one line in `OPTIMIZERS` is all that a new one needs."""

import copy
import inspect
import io
import math
import textwrap
from typing import NamedTuple

import pytest
import torch

from optimizer_problems import PROBLEMS, RESIDUALS
from secant import _checks
from secant.curvature import GGN, Hessian
from secant.optim import (
    BFGS,
    LBFGS,
    CubicNewton,
    LevenbergMarquardt,
    NaturalGradient,
    Newton,
    NewtonCG,
    SaddleFreeNewton,
    TrustRegion,
)
from secant.optim._flat_optimizer import RATE, FlatOptimizer
from secant.result import Iteration, Status
from secant.solvers._robust import Robust


def example():
    """The optimizer that the docstring of the base writes down."""
    text = inspect.getdoc(FlatOptimizer)
    code = text[text.index("    class HeavyBall") : text.index("The state is filed")]
    names = {"FlatOptimizer": FlatOptimizer, "RATE": RATE, "_checks": _checks, "Status": Status, "math": math}
    exec(textwrap.dedent(code), names)
    return names["HeavyBall"]


class Case(NamedTuple):
    """An optimizer: what makes it, the kind of its closure, options that its groups may differ in, one that may change.

    Options: by name, a valid value other than the default, and an invalid one.
    """

    name: str
    make: type
    fixed: dict
    kind: str
    per_group: dict
    shared: dict


OPTIMIZERS = [
    Case("lbfgs", LBFGS, {"history_size": 4, "max_iter": 3}, "gradient", {"lr": (0.5, -1.0)}, {"max_iter": (2, True)}),
    Case("lbfgs-wolfe", LBFGS, {"history_size": 4, "max_iter": 3, "line_search_fn": "strong_wolfe"}, "gradient",
         {"lr": (0.5, math.nan)}, {"tolerance_grad": (1e-3, "1")}),
    Case("bfgs", BFGS, {"max_iter": 3}, "gradient", {}, {"update": ("bfgs", "dfp")}),
    Case("lm", LevenbergMarquardt, {"max_iter": 1, "damping": 1e2}, "residuals", {},
         {"max_iter": (2, True), "geodesic": (False, 1)}),
    Case("lm-marquardt-samples", LevenbergMarquardt,
         {"max_iter": 1, "damping": 1e2, "scaling": "marquardt", "solver": "samples", "loss": "soft_l1"}, "residuals",
         {}, {"f_scale": (2.0, 0.0)}),
    Case("lm-radius", LevenbergMarquardt,
         {"max_iter": 1, "strategy": "radius", "factor": 1e-3, "scaling": "marquardt"}, "residuals", {},
         {"strategy": ("lambda", "mu"), "geodesic": (False, 1)}),
    Case("natural-gradient", NaturalGradient, {"max_iter": 1, "damping": 1e5}, "residuals", {},
         {"max_iter": (2, True), "adaptive": (False, 1)}),
    Case("natural-gradient-momentum", NaturalGradient,
         {"max_iter": 1, "lr": 0.3, "damping": 1.0, "adaptive": False, "momentum": 0.5}, "residuals", {},
         {"momentum": (0.7, 1.0), "damping": (2.0, 0.0)}),
    Case("example", example(), {"lr": 0.02}, "gradient", {}, {"momentum": (0.5, 1.0)}),
    # Held back, so that a few steps do not end at the minimum.
    Case("newton", Newton, {"lr": 0.1, "max_iter": 2}, "loss", {}, {"lr": (0.05, -1.0), "modify": ("shift", "cut")}),
    Case("newton-cg", NewtonCG, {"lr": 0.1, "max_iter": 2}, "loss", {}, {"max_inner": (1, 0), "damping": (1.0, -1.0)}),
    Case("newton-cg-ggn", NewtonCG, {"lr": 0.1, "max_iter": 2, "curvature": "ggn", "preconditioner": "nystrom"},
         "outputs", {}, {"rank": (3, 0), "lr": (0.05, -1.0)}),
    Case("newton-cg-adaptive", NewtonCG, {"lr": 0.1, "max_iter": 2, "curvature": "ggn", "adaptive": True}, "outputs",
         {}, {"adaptive": (False, 1), "max_inner": (1, 0)}),
    Case("trust-region", TrustRegion, {"initial_radius": 0.02, "max_radius": 0.04, "max_iter": 2}, "loss",
         {}, {"max_radius": (0.03, 0.0), "max_iter": (1, 0)}),
    Case("trust-region-exact", TrustRegion,
         {"subproblem": "exact", "initial_radius": 0.02, "max_radius": 0.04, "max_iter": 2}, "loss",
         {}, {"max_radius": (0.03, 0.0), "subproblem": ("steihaug", "dogleg")}),
    Case("cubic-newton", CubicNewton, {"sigma": 1e4, "max_iter": 2}, "loss", {}, {"max_iter": (1, 0)}),
    Case("saddle-free-newton", SaddleFreeNewton, {"damping": 1e3, "max_iter": 1}, "loss",
         {}, {"subspace": (1, 0), "max_iter": (2, True)}),
]  # fmt: skip


def having(accept):
    cases = [case for case in OPTIMIZERS if accept(case)]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


optimizers = having(lambda case: True)


def of_kind(*kinds):
    return having(lambda case: case.kind in kinds)


problems = pytest.mark.parametrize("problem", ["quadratic-1e1", "mlp"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def _one_mode(monkeypatch):
    """Products have one mode: timing would choose, so that two runs could differ, and evaluate the closure at will."""
    monkeypatch.setattr(Hessian, "_MODES", Hessian._MODES[:1])
    monkeypatch.setattr(GGN, "_MODES", GGN._MODES[:1])


class Spoilt(Exception):
    """Raised by a closure or a callback."""


class Run:
    """An optimizer on a problem, with a closure of its kind that can be spoilt at chosen evaluations (from 0)."""

    def __init__(self, case, problem, dtype=torch.float64, start=None, groups=None, **options):
        loss, at = PROBLEMS[problem]
        loss = RESIDUALS[problem] if case.kind == "residuals" else loss
        self.dtype, self.case = dtype, case
        self.loss = lambda params: loss([p.double() for p in params]).to(dtype)
        self.params = [x.detach().to(dtype).clone().requires_grad_() for x in (at if start is None else start)]
        self.count, self.points, self.losses, self.zero_in_place = 0, [], [], False
        self.spoil = lambda k, loss: loss
        given = self.params if groups is None else groups(self.params)
        self.optimizer = case.make(given, **{**case.fixed, **options})

    @property
    def x(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def closure(self):
        k, self.count = self.count, self.count + 1
        self.points.append(self.x)
        if self.case.kind == "gradient":
            if self.zero_in_place:
                for p in self.params:
                    if p.grad is not None and p.requires_grad:
                        p.grad.zero_()
            else:
                self.optimizer.zero_grad()
            loss = self.loss(self.params)
            loss.backward()
            returned = loss.detach()
        elif self.case.kind == "residuals":
            returned = self.loss(self.params)  # what is asked for in place of a loss
            options = self.optimizer.param_groups[0]
            loss = Robust(options.get("loss", "linear"), options.get("f_scale", 1.0)).value(returned.detach())
        elif self.case.kind == "loss":
            loss = returned = self.loss(self.params)
        else:  # the parameters themselves are the outputs, so that the GGN is the Hessian
            outputs = torch.cat([p.reshape(-1) for p in self.params])
            pieces = outputs.split([p.numel() for p in self.params])
            loss = returned = self.loss([x.reshape(p.shape) for x, p in zip(pieces, self.params, strict=True)])
        self.losses.append(loss.item())
        returned = self.spoil(k, returned)
        return (outputs, returned) if self.case.kind == "outputs" else returned

    def step(self, calls=1):
        for _ in range(calls):
            self.optimizer.step(self.closure)
        return self


def twin(run, **options):
    """A fresh run from where another is."""
    other = Run(run.case, "mlp", run.dtype, start=run.params, **options)
    other.loss = run.loss
    return other


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        for name, x in state.items():
            y = b["state"][key][name]
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def frozen(run):
    """Everything that a failed step must leave: the points, the gradients, the state."""
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in run.params]
    return run.x, grads, copy.deepcopy(run.optimizer.state_dict())


def assert_frozen(run, before):
    x, grads, state = before
    assert torch.equal(run.x, x)
    for p, (grad, content) in zip(run.params, grads, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, content)
    assert_same_state(run.optimizer.state_dict(), state)


# Progress and resuming ------------------------------------------------------------------------------------------------


@optimizers
@problems
@dtypes
def test_it_descends(case, problem, dtype):
    run = Run(case, problem, dtype).step(30)
    assert run.losses[-1] < min(run.losses[0], 0.9 * run.losses[0])
    assert all(p.dtype is dtype for p in run.params)


@optimizers
@problems
@dtypes
def test_it_continues_bit_for_bit_from_a_file(case, problem, dtype):
    run = Run(case, problem, dtype).step(5)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = twin(run)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other.optimizer.state_dict(), run.optimizer.state_dict())
    before = run.x
    run.step(3)
    other.step(3)
    assert torch.equal(run.x, other.x)
    assert not torch.equal(run.x, before)
    assert_same_state(other.optimizer.state_dict(), run.optimizer.state_dict())


@optimizers
def test_the_state_keeps_its_shape(case):
    run = Run(case, "mlp").step()

    def shapes():
        state = run.optimizer.state_dict()["state"]
        assert list(state) == [0]
        return {name: x.shape if isinstance(x, torch.Tensor) else type(x) for name, x in state[0].items()}

    first = shapes()
    run.step(5)
    assert shapes() == first


@optimizers
def test_a_state_of_something_else_changes_nothing(case):
    run = Run(case, "mlp").step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    broken = [copy.deepcopy(saved) for _ in range(3)]
    vectors = [name for name, x in saved["state"][0].items() if isinstance(x, torch.Tensor) and x.dim()]
    if vectors:
        del broken[0]["state"][0][vectors[0]]
        broken[1]["state"][0][vectors[0]] = broken[1]["state"][0][vectors[0]][..., :-1]
    else:
        del broken[0]["state"][0]["n_iter"]
        broken[1]["state"][0]["modes"] = {"hessian": 1}
    broken[2]["state"][0]["func_evals"] = -1
    before = frozen(run)
    for state in broken:
        state["param_groups"][0]["maximize"] = True
        with pytest.raises(ValueError, match=rf"{case.make.__name__}.load_state_dict: state"):
            run.optimizer.load_state_dict(state)
        assert_frozen(run, before)
    expected = twin(run)
    expected.optimizer.load_state_dict(saved)
    assert torch.equal(run.step(2).x, expected.step(2).x)


# Groups and options ---------------------------------------------------------------------------------------------------


def one_each(**options):
    return lambda params: [{"params": [p], **{k: v[i] for k, v in options.items()}} for i, p in enumerate(params)]


@optimizers
def test_groups_of_equal_options_are_one_group(case):
    assert torch.equal(Run(case, "mlp").step(3).x, Run(case, "mlp", groups=one_each()).step(3).x)


@optimizers
def test_groups_differ_only_where_they_may(case):
    for name, (value, _) in case.per_group.items():
        plain = case.fixed.get(name, inspect.signature(case.make).parameters[name].default)
        run = Run(case, "mlp", groups=one_each(**{name: [plain, plain, value, plain]})).step(20)
        assert run.losses[-1] < run.losses[0]
        assert not torch.equal(run.x, Run(case, "mlp").step(20).x)
    for name, (value, _) in case.shared.items():
        plain = case.fixed.get(name, inspect.signature(case.make).parameters[name].default)
        with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected .* in every group"):
            Run(case, "mlp", groups=one_each(**{name: [plain, plain, value, plain]}))


@optimizers
def test_options_may_change_in_mid_run(case):
    for name, (value, invalid) in (case.per_group | case.shared).items():
        run, other = Run(case, "mlp").step(2), Run(case, "mlp").step(2)
        run.optimizer.param_groups[0][name] = value
        run.step(4)
        other.step(4)
        assert run.optimizer.param_groups[0][name] == value
        assert torch.isfinite(run.x).all()
        assert name == "tolerance_grad" or not torch.equal(run.x, other.x), name
        for given in (invalid, None if name != "max_eval" else 0, "x"):
            with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected "):
                Run(case, "mlp", **{name: given})
            old = run.optimizer.param_groups[0][name]
            before = frozen(run)
            run.optimizer.param_groups[0][name] = given
            count = run.count
            with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected "):
                run.step()
            assert run.count == count
            run.optimizer.param_groups[0][name] = old
            assert_frozen(run, before)


@optimizers
def test_maximizing_is_minimizing_the_negative(case):
    if case.kind == "residuals":
        pytest.skip("the half of a sum of squares is minimized")
    down, up = Run(case, "mlp").step(5), Run(case, "mlp", maximize=True)
    loss = up.loss
    up.loss = lambda params: -loss(params)
    assert torch.equal(up.step(5).x, down.x)


@optimizers
def test_an_added_group_starts_anew(case):
    run = Run(case, "mlp", groups=lambda params: params[:2]).step()
    run.optimizer.add_param_group({"params": run.params[2:]})
    expected = twin(run)
    assert torch.equal(run.step(2).x, expected.step(2).x)


@optimizers
def test_parameters_that_cannot_be_one_vector(case):
    one = torch.ones(2, requires_grad=True)
    for options, error, message in [
        ({"dtype": torch.float64}, TypeError, r"params\[1\]: expected dtype torch.float32"),
        ({"dtype": torch.bfloat16}, TypeError, r"params\[1\]: expected dtype float32 or"),
        ({"device": "meta"}, ValueError, r"params\[1\]: expected device cpu"),
    ]:
        other = torch.ones(2, requires_grad=True, **options)
        with pytest.raises(error, match=f"{case.make.__name__}: {message}"):
            case.make([one, other], **case.fixed)


# Numbers that are not finite, and gradients that are zero or missing --------------------------------------------------


@optimizers
@problems
def test_a_loss_that_is_nan_moves_nothing_to_nan(case, problem):
    run = Run(case, problem)
    run.spoil = lambda k, loss: loss * math.nan if k % 4 == 2 else loss
    run.step(30)
    assert torch.isfinite(run.x).all()
    assert all(torch.isfinite(x).all() for x in run.points)
    assert run.losses[-1] < run.losses[0]


@optimizers
def test_a_start_that_is_nan_is_left_alone(case):
    run = Run(case, "mlp")
    run.spoil = lambda k, loss: loss * math.nan if k == 0 else loss
    start = run.x
    run.step()
    assert run.optimizer.status is Status.NOT_FINITE
    assert torch.equal(run.x, start)
    assert run.count == 1
    expected = Run(case, "mlp").step(3)
    assert torch.equal(run.step(3).x, expected.x)


@optimizers
@dtypes
def test_a_gradient_of_zero_at_the_start_moves_nothing(case, dtype):
    run = Run(case, "mlp", dtype)
    run.loss = lambda params: sum((p * 0.0).sum() for p in params)
    start = run.x
    run.step(2)
    assert torch.equal(run.x, start)
    assert run.optimizer.status in (Status.CONVERGED, Status.SMALL_CHANGE, Status.MAX_ITER)


@optimizers
def test_a_frozen_parameter_does_not_move(case):
    run = Run(case, "mlp").step(3)
    run.params[1].requires_grad_(False)
    before = [p.detach().clone() for p in run.params]
    run.step(3)
    moved = [not torch.equal(p.detach(), x) for p, x in zip(run.params, before, strict=True)]
    assert moved == [True, False, True, True]
    run.params[1].requires_grad_(True)
    run.step(3)
    assert not torch.equal(run.params[1].detach(), before[1])


# Closures -------------------------------------------------------------------------------------------------------------


@of_kind("gradient")
def test_a_closure_of_another_kind_is_named(case):
    run = Run(case, "mlp").step(2)
    before, loss = frozen(run), run.loss
    for returned, message in [
        (lambda: None, "expected it to return the loss, got None"),
        (lambda: "1.0", "expected it to return a number or a tensor of one, got str"),
        (lambda: torch.ones(3), r"got a tensor of shape \(3,\).* from a closure that returns residuals"),
        (lambda: (torch.ones(3, 2), torch.ones(())), r"from a closure that returns \(outputs, loss\)"),
        (lambda: [torch.ones(3), torch.ones(2)], "from a closure that returns residuals"),
    ]:
        with pytest.raises(TypeError, match=f"(?s){case.make.__name__}.step: closure: .*{message}"):
            run.optimizer.step(returned)
        assert_frozen(run, before)
    with pytest.raises(TypeError, match=f"{case.make.__name__}.step: closure: expected a function"):
        run.optimizer.step(None)
    fresh = Run(case, "mlp")
    before = frozen(fresh)
    with pytest.raises(TypeError, match="expected one that calls backward and returns the loss, got one that returns"):
        fresh.optimizer.step(lambda: loss(fresh.params))
    assert_frozen(fresh, before)


@of_kind("residuals")
def test_a_closure_that_returns_no_residuals_is_named(case):
    run = Run(case, "mlp").step(2)
    before, residuals = frozen(run), run.loss

    def backward():
        r = residuals(run.params)
        r.square().sum().backward()
        return r

    for returned, message in [
        (lambda: None, "got NoneType"),
        (lambda: 1.0, "got a number without a graph"),
        (lambda: torch.ones(()), r"got a loss without its graph \(detached, or no_grad\?\)"),
        (lambda: torch.ones(3), r"got residuals, or outputs, of shape \(3,\) without a graph"),
        (lambda: torch.ones(3, dtype=torch.complex64), "got a tensor of shape"),
        (backward, "got one that called backward"),
    ]:
        with pytest.raises(ValueError, match=f"(?s){case.make.__name__}.step: closure: expected residuals .*{message}"):
            run.optimizer.step(returned)
        for p in run.params:
            p.grad = None
        assert_frozen(run, before)
    with pytest.raises(TypeError, match=f"{case.make.__name__}.step: closure: expected a function"):
        run.optimizer.step(None)


@of_kind("loss", "outputs")
def test_a_closure_that_leaves_no_graph_or_another_is_named(case):
    run = Run(case, "mlp").step(2)
    loss, expected = run.loss, {"loss": "a loss with its graph", "outputs": r"a pair \(outputs, loss\)"}[case.kind]
    fresh = Run(case, "mlp")

    def backward(params):
        value = loss(params)
        value.backward()
        return value

    def pair(params):
        value = loss(params)
        return value * torch.ones(3), value

    for each in (run, fresh):
        before, params = frozen(each), each.params
        others = [
            (lambda: None, "NoneType"),
            (lambda: "1.0", "str"),
            (lambda params=params: loss(params).item(), "a number without a graph"),
            (lambda params=params: backward(params), "one that called backward"),
            (lambda params=params: loss(params).detach(), "a loss without its graph"),
            (lambda params=params: params[0] * 1.0, r"residuals, or outputs, of shape \(5, 8\)"),
            (lambda params=params: pair(params), "a pair") if case.kind == "loss" else
            (lambda params=params: loss(params), "a loss with its graph"),
        ]  # fmt: skip
        for returned, message in others:
            pattern = f"(?s){case.make.__name__}.step: closure: expected {expected}.* got {message}"
            with pytest.raises(ValueError, match=pattern):
                each.optimizer.step(returned)
            assert_frozen(each, before)
        with pytest.raises(TypeError, match=f"{case.make.__name__}.step: closure: expected a function"):
            each.optimizer.step(None)
        assert_frozen(each, before)


@of_kind("loss", "outputs")
def test_a_loss_of_nothing_here_is_an_error(case):
    run = Run(case, "mlp")
    elsewhere, before = torch.ones(3, requires_grad=True), frozen(run)

    def other():
        loss = elsewhere.square().sum()
        return loss if case.kind == "loss" else (2.0 * elsewhere, loss)

    with pytest.raises(ValueError, match=f"{case.make.__name__}.step: params: expected tensors that the closure uses"):
        run.optimizer.step(other)
    assert_frozen(run, before)


@of_kind("loss", "outputs")
def test_gradients_are_neither_read_nor_written(case):
    run, expected = Run(case, "mlp"), Run(case, "mlp")
    run.params[0].grad = torch.full_like(run.params[0], math.nan)
    given = run.params[0].grad
    assert torch.equal(run.step(3).x, expected.step(3).x)
    assert run.params[0].grad is given
    assert given.isnan().all()
    assert all(p.grad is None for p in run.params[1:])


@of_kind("loss", "outputs")
def test_a_resumed_run_has_the_modes_of_the_first(case, monkeypatch):
    """Its state says which, also to an optimizer that has chosen another one since."""
    cls, second = (GGN, "forward") if case.kind == "outputs" else (Hessian, "forward-over-reverse")
    run = Run(case, "quadratic-1e1").step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert saved["state"][0]["modes"] == {cls.__name__.lower(): "double-backward"}
    monkeypatch.setattr(cls, "_MODES", ("double-backward", second))
    saved["state"][0]["modes"] = {cls.__name__.lower(): second}
    other = Run(case, "quadratic-1e1")
    for each in (run, other):
        each.optimizer.load_state_dict(saved)
        count, evaluations = each.count, saved["state"][0]["func_evals"]
        each.step()
        state = each.optimizer.state_dict()["state"][0]
        assert state["modes"] == saved["state"][0]["modes"]
        assert each.count - count > state["func_evals"] - evaluations  # products evaluate the closure in this mode


@of_kind("gradient")
def test_a_loss_may_be_of_nothing_here(case):
    """No gradient and none to be had, or one that is set without backward: nothing is wrong with either."""
    run = Run(case, "mlp")
    elsewhere = torch.ones(3, requires_grad=True)
    start = run.x
    run.optimizer.step(lambda: elsewhere.square().sum())
    assert torch.equal(run.x, start)

    def by_hand():
        loss = run.loss(run.params)
        for p, g in zip(run.params, torch.autograd.grad(loss, run.params, retain_graph=True), strict=True):
            p.grad = g
        return loss

    run.optimizer.step(by_hand)
    assert not torch.equal(run.x, start)


@optimizers
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_closure_that_raises_leaves_no_trace(case, calls):
    for at in range(4):
        run, expected = Run(case, "mlp").step(calls), Run(case, "mlp").step(calls)
        before, first = frozen(run), run.count

        def spoil(k, loss, last=first + at):
            if k == last:
                raise Spoilt
            return loss

        run.spoil = spoil
        try:
            run.step()
        except Spoilt:
            assert_frozen(run, before)
            run.spoil = lambda k, loss: loss
            assert torch.equal(run.step(2).x, expected.step(2).x)
        else:
            assert at > 0  # the step took fewer evaluations


@optimizers
def test_a_closure_that_raises_while_a_parameter_is_frozen(case):
    """What the step had learned of the frozen one is unlearned, too, and found out again by the next."""
    run, expected = Run(case, "mlp").step(3), Run(case, "mlp").step(3)
    for each in (run, expected):
        each.params[1].requires_grad_(False)
        each.zero_in_place = True  # so that the old gradient of the frozen one stays where it is
    before, last = frozen(run), run.count
    run.optimizer.callback = lambda iteration: run.spoil(last, None)

    def spoil(k, loss):
        raise Spoilt

    for where in ("closure", "callback"):
        run.spoil = spoil if where == "closure" else (lambda k, loss: spoil(k, loss) if loss is None else loss)
        with pytest.raises(Spoilt):
            run.step()
        assert_frozen(run, before)
    run.optimizer.callback = None
    assert torch.equal(run.step(2).x, expected.step(2).x)
    assert torch.equal(run.params[1].detach().reshape(-1), before[0].split([p.numel() for p in run.params])[1])


# Status and callback --------------------------------------------------------------------------------------------------


@optimizers
def test_it_says_why_it_stopped(case):
    run = Run(case, "mlp")
    assert run.optimizer.status is None
    for _ in range(3):
        run.step()
        assert isinstance(run.optimizer.status, Status)
        assert run.optimizer.status in (Status.MAX_ITER, Status.MAX_EVAL, Status.CONVERGED, Status.SMALL_CHANGE)


@optimizers
def test_the_callback_follows_the_run(case):
    told = []
    run = Run(case, "mlp", callback=lambda iteration: told.append(iteration)).step(4)
    expected = Run(case, "mlp").step(4)
    assert torch.equal(run.x, expected.x)
    assert run.count == expected.count
    assert all(isinstance(x, Iteration) for x in told)
    assert len(told) >= 4
    numbers = [x.n for x in told]
    assert numbers == sorted(set(numbers))
    assert {x.value for x in told} <= set(run.losses)
    assert all(x.grad_norm > 0.0 and x.step >= 0.0 for x in told)
    evaluations = [x.evaluations for x in told]
    assert evaluations == sorted(set(evaluations))
    assert evaluations[-1] <= run.count


@optimizers
def test_the_callback_may_stop_it_or_raise(case):
    run = Run(case, "mlp", callback=lambda iteration: True).step()
    assert run.optimizer.status is Status.STOPPED
    run = Run(case, "mlp").step()
    expected = Run(case, "mlp").step()
    before = frozen(run)

    def raising(iteration):
        raise Spoilt

    run.optimizer.callback = raising
    with pytest.raises(Spoilt):
        run.step()
    assert_frozen(run, before)
    run.optimizer.callback = None
    assert torch.equal(run.step(2).x, expected.step(2).x)
    assert copy.deepcopy(Run(case, "mlp", callback=raising).optimizer).callback is None
