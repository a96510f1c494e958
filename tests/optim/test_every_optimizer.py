"""What every optimizer promises, on every one of them: one line in `OPTIMIZERS` is all that a new one needs."""

import copy
import inspect
import io
import math
import pickle
import textwrap
import warnings
from typing import NamedTuple

import pytest
import torch

from optimizer_problems import PROBLEMS, RESIDUALS, Reads
from secant import _checks
from secant.curvature import GGN, Hessian
from secant.curvature._curvature import CurvatureOperator
from secant.optim import (
    BFGS,
    KFAC,
    LBFGS,
    SOAP,
    AdaHessian,
    BlockAdam,
    CubicNewton,
    LevenbergMarquardt,
    Muon,
    NaturalGradient,
    Newton,
    NewtonCG,
    SaddleFreeNewton,
    Shampoo,
    Sophia,
    StochasticLBFGS,
    TrustRegion,
)
from secant.optim._flat_optimizer import RATE, FlatOptimizer
from secant.optim._per_parameter import PerParameterOptimizer
from secant.result import Iteration, Status
from secant.solvers._robust import Robust


def example(base, name, end):
    """The optimizer that the docstring of a base writes down."""
    text = inspect.getdoc(base)
    code = text[text.index(f"    class {name}") : text.index(end)]
    names = {base.__name__: base, "RATE": RATE, "_checks": _checks, "Status": Status, "math": math, "torch": torch}
    exec(textwrap.dedent(code), names)
    cls = globals()[name] = names[name]  # where a pickle finds it
    cls.__module__ = __name__
    return cls


class Case(NamedTuple):
    """An optimizer: what makes it, the kind of its closure, options that its groups may differ in, one that may change.

    Of kind "none" are those whose step takes the gradients as they are, with a state per parameter, and of kind "twice"
    those that evaluate the closure again after it.
    Options: by name, a valid value other than the default, and an invalid one. memory: of the state of such an
    optimizer, as a multiple of that of the parameters.
    """

    name: str
    make: type
    fixed: dict
    kind: str
    per_group: dict
    shared: dict
    memory: float = 0.0


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
    Case("example", example(FlatOptimizer, "HeavyBall", "The state is filed"), {"lr": 0.02}, "gradient", {},
         {"momentum": (0.5, 1.0)}),
    # Held back, so that a few steps do not end at the minimum.
    Case("newton", Newton, {"lr": 0.1, "max_iter": 2}, "loss", {}, {"lr": (0.05, -1.0), "modify": ("shift", "cut")}),
    Case("newton-cg", NewtonCG, {"lr": 0.1, "max_iter": 2}, "loss", {}, {"max_inner": (1, 0), "damping": (1.0, -1.0)}),
    Case("newton-cg-wolfe", NewtonCG, {"lr": 0.1, "max_iter": 2, "line_search_fn": "strong_wolfe"}, "loss", {}, {}),
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
    Case("sign", example(PerParameterOptimizer, "Sign", "The state of a parameter is"), {"lr": 0.01}, "none",
         {"lr": (0.02, -1.0), "beta": (0.5, 1.0), "weight_decay": (0.1, -0.1)}, {}, memory=1.0),
    Case("muon", Muon, {"lr": 0.02, "adam_scale": 1.0}, "none",
         {"lr": (0.01, -1.0), "momentum": (0.5, 1.0), "ns_steps": (3, 0), "betas": ((0.8, 0.9), (0.9, 1.0))}, {},
         memory=1.0),
    Case("shampoo", Shampoo, {"lr": 0.01, "precondition_frequency": 5}, "none",
         {"lr": (0.02, -1.0), "betas": ((0.8, 0.9), (0.9, 1.0)), "damping": (0.5, 0.0),
          "beta_gram": (0.5, 1.0), "eps": (1e-3, 0.0), "exponent": (0.25, 0.3)}, {}, memory=5.015625),
    Case("shampoo-rms", Shampoo, {"lr": 0.01, "graft": "rms", "one_sided": True}, "none",
         {"graft": ("sgd", "lion")}, {}, memory=2.5078125),
    Case("soap", SOAP, {"lr": 0.01, "precondition_frequency": 5}, "none",
         {"lr": (0.02, -1.0), "betas": ((0.8, 0.9), (0.9, 1.0)), "precondition_frequency": (1, 0)}, {},
         memory=5.015625),
    Case("block-adam", BlockAdam, {"lr": 0.01, "update_every": 1}, "none",
         {"lr": (0.02, -1.0), "damping": (0.5, 1.0), "betas": ((0.8, 0.9), (0.9, 1.0))}, {}, memory=33.0),
    Case("block-adam-refresh", BlockAdam, {"lr": 0.01, "update_every": 3}, "none", {"update_every": (5, 0)}, {},
         memory=33.0),
    Case("adahessian", AdaHessian, {}, "none",
         {"lr": (0.02, -1.0), "clip": (1e-3, 0.0), "hessian_power": (0.5, 1.1), "betas": ((0.8, 0.9), (0.9, 1.0))}, {},
         memory=2.0),
    Case("adahessian-seldom", AdaHessian, {"update_every": 3}, "none", {"update_every": (2, 0), "seed": (5, -1)}, {},
         memory=2.0),
    Case("sophia-h", Sophia, {"lr": 0.01, "update_every": 2}, "none",
         {"lr": (0.02, -1.0), "rho": (1.0, 0.0), "betas": ((0.8, 0.9), (0.9, 1.0))}, {}, memory=2.0),
    Case("sophia-g", Sophia, {"lr": 0.01, "estimator": "gnb", "rho": 1.0, "update_every": 1}, "none",
         {"lr": (0.02, -1.0), "betas": ((0.8, 0.9), (0.9, 1.0))}, {}, memory=2.0),
    Case("stochastic-lbfgs", StochasticLBFGS, {"lr": 0.01, "average": 0.5, "update_every": 1}, "none",
         {"lr": (0.02, -1.0), "weight_decay": (0.1, -0.1)}, {"betas": ((0.8, 0.9), (0.9, 1.0)), "average": (0.9, 1.0),
         "graft": (False, 1), "curvature_tol": (0.9, 1.0)}, memory=26.0),
    Case("stochastic-lbfgs-same", StochasticLBFGS, {"lr": 0.01, "pairs": "same-batch", "history_size": 4}, "twice",
         {"lr": (0.02, -1.0)}, {"update_every": (2, 0), "curvature_tol": (0.9, 1.0)}),
    # Of parameters in no layer; where there is a model it is given that, see `fixed`.
    Case("kfac", KFAC, {"lr": 0.01, "model": torch.nn.Identity(), "update_every": 1}, "none",
         {"lr": (0.02, -1.0), "betas": ((0.8, 0.9), (0.9, 1.0)), "weight_decay": (0.1, -0.1)}, {}, memory=2.0),
    Case("kfac-refresh", KFAC, {"lr": 0.01, "model": torch.nn.Identity(), "update_every": 3, "factor_every": 2}, "none",
         {"eps": (0.1, 0.0)}, {}, memory=2.0),
]  # fmt: skip


def fixed(case, model):
    """The options of a case, for parameters of a model."""
    return {**case.fixed, **({"model": model} if "model" in case.fixed else {})}


def having(accept):
    cases = [case for case in OPTIMIZERS if accept(case)]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


CLOSURES = ("gradient", "residuals", "loss", "outputs")


def of_kind(*kinds):
    return having(lambda case: case.kind in kinds)


everyone = having(lambda case: True)
optimizers = having(lambda case: case.kind in CLOSURES)  # that evaluate a closure, and all parameters as one vector


problems = pytest.mark.parametrize("problem", ["quadratic-1e1", "mlp"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def _one_mode(monkeypatch):
    """Products have one mode: timing would choose, so that two runs could differ, and evaluate the closure at will."""
    monkeypatch.setattr(Hessian, "_MODES", Hessian._MODES[:1])
    monkeypatch.setattr(GGN, "_MODES", GGN._MODES[:1])
    monkeypatch.setattr(CurvatureOperator, "_seconds", lambda self, call: (call(), 1.0)[1])


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
        if self.case.kind in ("gradient", "twice"):
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

    def backward(self):
        """Leave the gradients for a step that evaluates nothing."""
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        self.losses.append(loss.item())
        loss.backward(create_graph=self.optimizer.is_second_order)
        if self.case.fixed.get("estimator") == "gnb" and len(self.losses) % 5 == 1:
            self.optimizer.update_hessian(1)

    def attempt(self):
        """One step, from the gradients as they are where there is no closure."""
        self.optimizer.step(*([] if self.case.kind == "none" else [self.closure]))

    def step(self, calls=1):
        for _ in range(calls):
            if self.case.kind == "none":
                self.backward()
            self.attempt()
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


@everyone
@problems
@dtypes
def test_it_descends(case, problem, dtype):
    run = Run(case, problem, dtype).step(30)
    assert run.losses[-1] < min(run.losses[0], 0.9 * run.losses[0])
    assert all(p.dtype is dtype for p in run.params)


@everyone
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


@everyone
def test_groups_of_equal_options_are_one_group(case):
    assert torch.equal(Run(case, "mlp").step(3).x, Run(case, "mlp", groups=one_each()).step(3).x)


@everyone
def test_groups_differ_only_where_they_may(case):
    for name, (value, _) in case.per_group.items():
        plain = case.fixed.get(name, inspect.signature(case.make).parameters[name].default)
        run = Run(case, "mlp", groups=one_each(**{name: [plain, value, value, plain]})).step(20)
        assert run.losses[-1] < run.losses[0]
        assert not torch.equal(run.x, Run(case, "mlp").step(20).x)
    for name, (value, _) in case.shared.items():
        plain = case.fixed.get(name, inspect.signature(case.make).parameters[name].default)
        with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected .* in every group"):
            Run(case, "mlp", groups=one_each(**{name: [plain, plain, value, plain]}))


@everyone
def test_options_may_change_in_mid_run(case):
    for name, (value, invalid) in (case.per_group | case.shared).items():
        run, other = Run(case, "mlp").step(2), Run(case, "mlp").step(2)
        run.optimizer.param_groups[0][name] = value
        run.step(4)
        other.step(4)
        assert run.optimizer.param_groups[0][name] == value
        assert torch.isfinite(run.x).all()
        assert name == "tolerance_grad" or not torch.equal(run.x, other.x), name
        for given in (invalid, 0 if case.make.OPTIONS[name].accept(None) else None, "x"):
            with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected "):
                Run(case, "mlp", **{name: given})
            old = run.optimizer.param_groups[0][name]
            before = frozen(run)
            run.optimizer.param_groups[0][name] = given
            count = run.count
            with pytest.raises(ValueError, match=f"{case.make.__name__}: {name}: expected "):
                run.attempt()
            assert run.count == count
            run.optimizer.param_groups[0][name] = old
            assert_frozen(run, before)


@everyone
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


@everyone
@dtypes
def test_a_gradient_of_zero_at_the_start_moves_nothing(case, dtype):
    run = Run(case, "mlp", dtype)
    power = 2 if case.kind == "none" and run.optimizer.is_second_order else 1  # there a constant has no graph
    run.loss = lambda params: sum((p**power * 0.0).sum() for p in params)
    start = run.x
    run.step(2)
    assert torch.equal(run.x, start)
    if case.kind in CLOSURES:
        assert run.optimizer.status in (Status.CONVERGED, Status.SMALL_CHANGE, Status.MAX_ITER)


@everyone
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


# State per parameter, no closure --------------------------------------------------------------------------------------

closure_free = of_kind("none")


def spread(run, other, power=0.5):
    """How far two runs are apart, relative to how far one has come, and what rounding may make of it.

    A rounding is amplified by as much as the problem allows: half the digits are left alone.
    """
    start = torch.cat([x.reshape(-1) for x in PROBLEMS["mlp"][1]]).to(run.dtype)
    bound = torch.finfo(run.dtype).eps ** power
    return float((run.x - other.x).norm() / (run.x - start).norm()), bound


def model_of(case, seed=0, groups=None, **options):
    """A network with parameters of one, two and four dimensions, its optimizer, and a step of both."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Tanh(),
        torch.nn.Linear(6, 2),
    )  # fmt: skip
    given = model.named_parameters() if groups is None else groups(dict(model.named_parameters()))
    optimizer = case.make(given, **{**fixed(case, model), **options})
    data = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(5))

    def step():
        optimizer.zero_grad()
        model(data).square().mean().backward(create_graph=optimizer.is_second_order)
        optimizer.step()

    return model, optimizer, step


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def state_bytes(optimizer):
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values() if x.dim())


@closure_free
def test_the_state_is_of_each_parameter(case):
    run = Run(case, "mlp")
    assert not run.optimizer.state

    def shapes():
        return [{k: (x.shape, x.dtype) for k, x in run.optimizer.state[p].items()} for p in run.params]

    run.step()
    first = shapes()
    assert all(state["step"] == (torch.Size([]), torch.float32) for state in first)
    run.step(20)
    assert shapes() == first
    assert all(run.optimizer.state[p]["step"].item() == 21 for p in run.params)


@closure_free
def test_the_memory_is_what_the_documentation_says(case):
    p = torch.nn.Parameter(torch.randn(256, 128))
    optimizer = case.make([p], **case.fixed)
    ((p @ torch.randn(128)).square().sum()).backward(create_graph=optimizer.is_second_order)
    optimizer.step()
    ratio = state_bytes(optimizer) / (p.numel() * p.element_size())
    assert ratio == pytest.approx(case.memory, rel=1e-3)  # but for what does not grow with the parameters
    documented = " ".join(inspect.getdoc(case.make).split())
    assert f"{case.memory:g} times the memory of the parameters" in documented or case.name == "sign"


@closure_free
def test_parameters_it_does_not_take(case):
    good = torch.ones(2, requires_grad=True)
    for bad, error, message in [
        (torch.ones(2, dtype=torch.complex64, requires_grad=True), TypeError, r"params\[1\]: .*view_as_real"),
        (torch.ones(2, dtype=torch.int64), TypeError, r"params\[1\]: expected dtype"),
        (torch.ones(2).to_sparse().requires_grad_(), ValueError, r"params\[1\]: expected a dense"),
        (good, ValueError, "params: expected distinct tensors"),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of duplicates
            with pytest.raises(error, match=f"{case.make.__name__}: {message}"):
                case.make([good, bad], **case.fixed)
    optimizer = case.make([good], **case.fixed)
    with pytest.raises(TypeError, match=r"params\[1\]"):
        optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


@closure_free
def test_a_sparse_gradient_is_refused_before_anything_changes(case):
    table = torch.nn.Embedding(5, 3, sparse=True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = case.make([weight, *table.parameters()], **case.fixed)
    (table(torch.tensor([1, 2])) @ weight).sum().backward()
    before = weight.detach().clone(), table.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"{case.make.__name__}: params\[1\].grad: expected a dense gradient"):
        optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(table.weight, before[1])
    assert not optimizer.state


@closure_free
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_parameters_have_a_float32_state_and_are_rounded_once(case, dtype):
    run = Run(case, "mlp", dtype)
    single = Run(case, "mlp", torch.float32, start=run.params)
    run.step()
    single.backward()
    for p, q in zip(single.params, run.params, strict=True):
        p.grad = q.grad.float() if not single.optimizer.is_second_order else p.grad
    if not single.optimizer.is_second_order:  # whose gradients carry a graph, so that they cannot be put in place
        single.attempt()
        for p, q in zip(single.params, run.params, strict=True):
            assert torch.equal(p.to(dtype), q)
    run.step(3)
    tensors = [x for state in run.optimizer.state.values() for x in state.values()]
    assert all(x.dtype in (torch.float32, torch.float64) for x in tensors if x.is_floating_point())
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = twin(run)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other.optimizer.state_dict(), run.optimizer.state_dict())
    assert torch.equal(run.step(3).x, other.step(3).x)
    assert torch.isfinite(run.x).all()


@closure_free
def test_a_loaded_state_is_a_copy(case):
    run = Run(case, "mlp").step(3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = twin(run)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.step(2)
    assert_same_state(run.optimizer.state_dict(), saved)


@closure_free
def test_a_learning_rate_may_be_a_tensor(case):
    plain = Run(case, "mlp").step(10)
    rate = plain.optimizer.param_groups[0]["lr"]
    for lr in (torch.tensor(rate, dtype=torch.float64), torch.tensor([rate], dtype=torch.float64)):
        assert torch.equal(Run(case, "mlp", lr=lr).step(10).x, plain.x)
    with pytest.raises(ValueError, match=f"{case.make.__name__}: lr: expected"):
        Run(case, "mlp", lr=torch.tensor([rate, rate]))


@closure_free
def test_a_capturable_step_reads_nothing_and_does_the_same(case, monkeypatch):
    rate = Run(case, "mlp").optimizer.param_groups[0]["lr"]
    if (
        Run(case, "mlp").optimizer.param_groups[0].get("update_every", 1) > 1
    ):  # which step is due is known to the host alone
        with pytest.raises(ValueError, match=f"{case.make.__name__}: update_every: expected 1"):
            Run(case, "mlp", capturable=True)
        return
    run = Run(case, "mlp", capturable=True, lr=torch.tensor(rate, dtype=torch.float64))
    for _ in range(10):
        run.backward()
        with Reads(monkeypatch) as reads:
            run.attempt()
        assert reads.count == 0
    # beta^t is rounded to float32 there, a relative 6e-8 t of a direction. Signs come from other generators.
    apart, _ = spread(run, Run(case, "mlp").step(10))
    assert apart < (1.0 if run.optimizer.is_second_order else 1e-4)


@closure_free
def test_schedules_reach_it(case):
    run, expected = Run(case, "mlp"), Run(case, "mlp")
    rate = run.optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=10)
    for k in range(10):
        expected.optimizer.param_groups[0]["lr"] = 0.5 * rate * (1.0 + math.cos(math.pi * k / 10))
        run.step()
        expected.step()
        schedule.step()
    apart, bound = spread(run, expected)
    assert apart < bound  # the schedule has a recurrence in place of the formula
    assert torch.equal(run.x, run.step().x)  # lr is 0 now


@closure_free
def test_clipping_and_scaling_of_gradients(case):
    """Gradients that are clipped to a norm; a scaler that multiplies by 2^k, and skips what is not finite."""
    run, expected = Run(case, "mlp", torch.float32), Run(case, "mlp", torch.float32)
    run.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.params, 1e-3)
    assert norm > 1e-3
    run.attempt()
    assert torch.isfinite(run.x).all()
    run = Run(case, "mlp", torch.float32)
    if expected.optimizer.is_second_order:  # the graph of a scaled loss has scaled products
        run.optimizer.hessian_closure = lambda: run.loss(run.params)
        assert not run.optimizer.is_second_order
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for spoilt in (False, True, False, False):
        run.optimizer.zero_grad()
        loss = scaler.scale(run.loss(run.params)) * (math.inf if spoilt else 1.0)
        loss.backward()
        before = run.x
        scaler.unscale_(run.optimizer)
        if case.fixed.get("estimator") == "gnb" and len(expected.losses) == 0:
            run.optimizer.update_hessian(1)
        scaler.step(run.optimizer)
        scaler.update()
        if spoilt:
            assert torch.equal(run.x, before)
        else:
            expected.step()
    apart, bound = spread(run, expected)
    assert apart <= bound if expected.optimizer.is_second_order else torch.equal(run.x, expected.x)


@closure_free
def test_a_closure_is_called_first_and_its_loss_returned(case):
    run, expected = Run(case, "mlp"), Run(case, "mlp")
    for _ in range(3):

        def closure():
            run.backward()
            return run.losses[-1]

        with torch.no_grad():
            assert run.optimizer.step(closure) == run.losses[-1]
        expected.step()
    assert torch.equal(run.x, expected.x)
    before = frozen(run)

    def raising():
        raise Spoilt

    with pytest.raises(Spoilt):
        run.optimizer.step(raising)
    assert_frozen(run, before)
    with pytest.raises(TypeError, match=f"{case.make.__name__}.step: closure: expected a function"):
        run.optimizer.step(1.0)


@closure_free
def test_an_added_group_leaves_the_others_their_state(case):
    run = Run(case, "mlp", groups=lambda params: params[:2]).step(3)
    run.optimizer.add_param_group({"params": run.params[2:]})
    start = run.params[2].detach().clone()
    run.step(2)
    # Where all parameters are one vector, what was learned of a shorter one is forgotten.
    before = [2, 2] if isinstance(run.optimizer, StochasticLBFGS) else [5, 5]
    assert [run.optimizer.state[p]["step"].item() for p in run.params] == [*before, 2, 2]
    assert not torch.equal(run.params[2], start)


@closure_free
def test_a_parameter_without_a_gradient_waits(case):
    run = Run(case, "mlp")
    frozen_, loss = run.params[1], run.loss
    start = frozen_.detach().clone()
    run.loss = lambda params: loss([params[0], start, *params[2:]])
    run.step(2)
    assert torch.equal(frozen_, start)
    assert frozen_ not in run.optimizer.state or run.optimizer.state[frozen_]["step"] == 0
    run.loss = loss
    run.step(3)
    assert not torch.equal(frozen_, start)
    assert [run.optimizer.state[p]["step"].item() for p in run.params] == [5, 3, 5, 5]


@closure_free
def test_an_old_gradient_of_a_frozen_parameter_moves_nothing(case):
    run = Run(case, "mlp").step(2)
    run.backward()
    run.params[1].requires_grad_(False)
    before = run.params[1].detach().clone()
    run.attempt()
    assert torch.equal(run.params[1], before)
    assert run.optimizer.state[run.params[1]]["step"].item() == 2


@closure_free
def test_tied_parameters_are_one(case):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    optimizer = case.make(model.parameters(), **fixed(case, model))
    start = model[0].weight.detach().clone()
    loss = torch.nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7))
    loss.backward(create_graph=optimizer.is_second_order)
    optimizer.step()
    assert len(optimizer.state) == 1
    assert model[1].weight is model[0].weight
    assert not torch.equal(model[0].weight, start)


@closure_free
def test_odd_shapes(case):
    """Scalars, empty tensors, transposed ones: a transposed parameter takes the steps of a plain one."""
    gen = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 5, generator=gen).double()
    for turned in (plain.clone(), plain.t().contiguous().t()):
        params = [x.requires_grad_() for x in (turned, torch.ones(()).double(), torch.zeros(0).double())]
        optimizer = case.make(params, **case.fixed)
        for _ in range(3):
            optimizer.zero_grad()
            loss = (params[0] ** 4).sum() + (params[1] - 3.0) ** 2 + params[2].sum()
            loss.backward(create_graph=optimizer.is_second_order)
            optimizer.step()
        assert torch.isfinite(params[0]).all()
        if turned.is_contiguous():
            expected = params[0].detach().clone(), params[1].detach().clone()
    torch.testing.assert_close(params[0].detach(), expected[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(params[1], expected[1])


@closure_free
def test_copies_and_pickles_continue(case):
    run = Run(case, "mlp").step(3)
    params, optimizer = copy.deepcopy((run.params, run.optimizer))
    others = [(params, optimizer), pickle.loads(pickle.dumps((run.params, run.optimizer)))]
    run.step(3)
    for params, optimizer in others:
        for _ in range(3):
            optimizer.zero_grad()
            run.loss(params).backward(create_graph=optimizer.is_second_order)
            optimizer.step()
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params]), run.x)


@closure_free
def test_a_state_of_something_else_is_refused_whole(case):
    run = Run(case, "mlp").step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    broken = [copy.deepcopy(saved) for _ in range(4)]
    last = saved["state"][3]
    name = next(k for k, x in saved["state"][0].items() if k != "step" and x.dim())
    del broken[0]["state"][3]["step"]
    broken[1]["state"][0][name] = saved["state"][0][name][..., :-1]
    broken[2]["state"][3] = [1.0]
    broken[3]["param_groups"][0]["lr"] = -1.0
    assert "step" in last
    before = frozen(run)
    for state, message in zip(broken, (r"state of params\[3\]: expected keys", r"state of params\[0\]", "state", "lr"),
                              strict=True):  # fmt: skip
        with pytest.raises(
            (ValueError, TypeError, AttributeError), match=rf"{case.make.__name__}.load_state_dict: {message}"
        ):
            run.optimizer.load_state_dict(state)
        assert_frozen(run, before)


def in_two(named):
    """The same parameters in other groups, and in another order."""
    names = list(named)
    return [{"params": [(n, named[n]) for n in names[k::2]]} for k in (1, 0)]


@closure_free
def test_names_find_their_state_in_other_groups(case):
    model, optimizer, step = model_of(case)
    for _ in range(3):
        step()
    other, second, step_other = model_of(case, groups=in_two)
    second.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        step()
        step_other()
    assert torch.equal(flat(model), flat(other))


@closure_free
@pytest.mark.parametrize("groups", [None, in_two], ids=["same", "regrouped"])
def test_a_distributed_checkpoint_continues(case, groups, tmp_path):
    """A step with zero gradients and lr = 0 builds the state there, which is then filled from the files."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as names

    options = names.StateDictOptions(flatten_optimizer_state_dict=groups is not None)
    model, optimizer, step = model_of(case)
    for _ in range(3):
        step()
    own = names.get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"model": model.state_dict(), "optimizer": own}, checkpoint_id=tmp_path, no_dist=True)
    other, second, step_other = model_of(case, seed=1, groups=groups)
    start = flat(other)
    target = {"model": other.state_dict(), "optimizer": names.get_optimizer_state_dict(other, second, options=options)}
    assert torch.equal(flat(other), start)
    checkpoint.load(target, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(target["model"])
    names.set_optimizer_state_dict(other, second, target["optimizer"], options=options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert {k: x.dtype for k, x in optimizer.state[p].items()} == {k: x.dtype for k, x in second.state[q].items()}
    for _ in range(3):
        step()
        step_other()
    assert torch.equal(flat(model), flat(other))


#: Those whose steps of a shard need nothing of the others, or bring together what they need.
SHARDED = ("sign", "muon", "sophia-g")


@of_kind("none", "twice")
@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_a_parameter_of_many_processes(case, tmp_path):
    """Its state is spread as it is, and its steps are those of a whole one; or it is refused, in a later group too."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        gen = torch.Generator().manual_seed(0)
        whole = torch.randn(4, 3, generator=gen).requires_grad_()
        for placement in (Shard(0), Replicate()):
            p = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement]))
            if case.name not in SHARDED:
                with pytest.raises(ValueError, match=rf"{case.make.__name__}: params\[0\]: expected .*, got a DTensor"):
                    case.make([p], **case.fixed)
                optimizer = case.make([torch.nn.Parameter(torch.ones(2))], **case.fixed)
                with pytest.raises(ValueError, match=rf"{case.make.__name__}: params\[1\]: expected .*, got a DTensor"):
                    optimizer.add_param_group({"params": [p]})
                assert len(optimizer.param_groups) == 1
                continue
            q = torch.nn.Parameter(whole.detach().clone())
            for x in (p, q):
                own = torch.nn.Parameter(torch.ones(2))  # of this process alone
                optimizer = case.make([x, own], **case.fixed)
                for _ in range(3):
                    optimizer.zero_grad()
                    ((x - 1.0) ** 4).sum().backward()
                    own.sum().backward()
                    optimizer.step()
                assert (own < 1.0).all()
                if x is p:
                    assert all(isinstance(t, DTensor) for t in optimizer.state[p].values() if t.dim())
            torch.testing.assert_close(p.full_tensor(), q.detach())
    finally:
        torch.distributed.destroy_process_group()


def _train_a_shard(case):
    """Steps of a parameter whose rows are shared out, 3 and 2; whole at the end."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    _approach_one(case, p)
    return p.full_tensor()


def _approach_one(case, p):
    optimizer = case.make([p], **case.fixed)
    for _ in range(3):
        optimizer.zero_grad()
        ((p - 1.0) ** 4).sum().backward()
        optimizer.step()


def _train_a_half(rank, folder, names):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for case in OPTIMIZERS:
        if case.name in names:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = case.make(model.parameters(), **fixed(case, model))
            x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(1))[rank]
            if optimizer.is_second_order:  # the diagonal of this share; steps average it
                optimizer.hessian_closure = lambda model=model, x=x: model(x).square().mean()
            for _ in range(5):
                optimizer.zero_grad()
                parallel(x).square().mean().backward()
                optimizer.step()
            found[case.name] = flat(model)
            if case.name in SHARDED:
                found[f"{case.name}, shared out"] = _train_a_shard(case)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no gloo")
def test_ranks_stay_equal_bit_for_bit(tmp_path):
    names = [case.name for case in OPTIMIZERS if case.kind == "none"]
    torch.multiprocessing.spawn(_train_a_half, (str(tmp_path), names), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert sorted(one) == sorted([*names, *(f"{name}, shared out" for name in SHARDED)])
    assert all(torch.equal(one[name], other[name]) for name in one)
    for case in (case for case in OPTIMIZERS if case.name in SHARDED):
        p = torch.nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
        _approach_one(case, p)
        torch.testing.assert_close(one[f"{case.name}, shared out"], p.detach())
