"""Why a call of LBFGS ended, and what its callback is told."""

import copy
import math
import pickle

import pytest
import torch

import secant
from optimizer_problems import PROBLEMS, Reads, Run
from secant.optim import LBFGS
from secant.result import Iteration, Status

SEARCHES = [None, "strong_wolfe"]
both = pytest.mark.parametrize("line_search_fn", SEARCHES)
packings = pytest.mark.parametrize("packed", [False, True])


def prepared(run, packed=False):
    run.optimizer._bind()
    run.optimizer._packed = packed
    return run


def largest(run, x):
    """|g|_inf at a point given as one vector."""
    leaves = [part.reshape(p.shape).clone().requires_grad_() for part, p in
              zip(x.split([p.numel() for p in run.params]), run.params, strict=True)]  # fmt: skip
    return max(g.abs().max().item() for g in torch.autograd.grad(run.loss(leaves), leaves))


# Status ---------------------------------------------------------------------------------------------------------------


def test_there_is_none_before_the_first_step():
    assert Run(LBFGS, *PROBLEMS["mlp"]).optimizer.status is None


@packings
@both
def test_converged_is_tolerance_grad(line_search_fn, packed):
    options = {"tolerance_grad": 1e-4, "tolerance_change": 0.0, "max_iter": 500, "max_eval": 5000}
    run = prepared(Run(LBFGS, *PROBLEMS["quadratic-1e3"], line_search_fn=line_search_fn, **options), packed).step()
    assert run.optimizer.status is Status.CONVERGED
    assert run.optimizer.status.ok
    assert largest(run, run.x) <= 1e-4
    run.step()
    assert run.optimizer.status is Status.CONVERGED


@packings
@both
def test_small_change_is_tolerance_change(line_search_fn, packed):
    options = {"tolerance_grad": 0.0, "tolerance_change": 1e-3, "max_iter": 500, "max_eval": 5000}
    run = prepared(Run(LBFGS, *PROBLEMS["quadratic-1e3"], line_search_fn=line_search_fn, **options), packed).step()
    assert run.optimizer.status is Status.SMALL_CHANGE
    assert run.state["n_iter"] < 500


@both
def test_a_learning_rate_of_zero_changes_nothing(line_search_fn):
    run = Run(LBFGS, *PROBLEMS["mlp"], lr=0.0, line_search_fn=line_search_fn).step()
    assert run.optimizer.status is Status.SMALL_CHANGE


@packings
@both
def test_limits(line_search_fn, packed):
    for max_iter in (1, 3):
        options = {"max_iter": max_iter, "max_eval": 1000, "line_search_fn": line_search_fn}
        run = prepared(Run(LBFGS, *PROBLEMS["rosenbrock-10"], **options), packed).step()
        assert run.optimizer.status is Status.MAX_ITER
        assert run.state["n_iter"] == max_iter
    for max_eval in (2, 5):
        options = {"max_iter": 1000, "max_eval": max_eval, "line_search_fn": line_search_fn}
        run = prepared(Run(LBFGS, *PROBLEMS["rosenbrock-10"], **options), packed).step()
        assert run.optimizer.status is Status.MAX_EVAL
        assert len(run.points) == max_eval
        assert run.state["n_iter"] < 1000


def uphill(params):
    """The value of x^2 / 2 with the gradient of its negative: no step along d decreases it."""
    (x,) = params
    return (1.5 * x.detach().square() - x * x.detach()).sum()


@packings
def test_stalled_is_a_search_that_found_nothing(packed):
    run = Run(LBFGS, uphill, [torch.tensor([3.0, -1.0]).double()], line_search_fn="strong_wolfe", max_eval=100)
    start = run.x
    prepared(run, packed).step()
    assert run.optimizer.status is Status.STALLED
    assert torch.equal(run.x, start)
    assert 1 < len(run.points) < 100


@packings
def test_no_descent_is_a_direction_that_points_upwards(packed):
    run = Run(LBFGS, *PROBLEMS["rosenbrock-2"], line_search_fn="strong_wolfe", max_iter=3, max_eval=99).step()
    assert run.optimizer.status is Status.MAX_ITER
    run.state["direction"].neg_()
    before, x = len(run.points), run.x
    run.optimizer._packed = packed
    run.step()
    assert run.optimizer.status is Status.NO_DESCENT
    assert torch.equal(run.x, x)
    assert len(run.points) == before + 1
    assert run.state["count"] == 0
    run.step(10)
    assert run.losses[-1] < run.losses[before]


@packings
@both
@pytest.mark.parametrize("when", [lambda k: k == 0, lambda k: k > 0], ids=["at the start", "after it"])
def test_not_finite(when, line_search_fn, packed):
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, None, start, line_search_fn=line_search_fn, max_eval=200)
    run.loss = lambda params: loss(params) * (math.nan if when(len(run.points)) else 1.0)
    before = run.x
    prepared(run, packed).step()
    assert run.optimizer.status is Status.NOT_FINITE
    assert torch.equal(run.x, before)


def test_a_step_that_would_overflow_is_not_finite():
    run = Run(LBFGS, lambda params: params[0].sum(), [torch.tensor([1.0])], lr=1e38, max_iter=2).step()
    assert run.optimizer.status is Status.NOT_FINITE


@packings
@both
@pytest.mark.parametrize("last", [0, 1, 4])
def test_stopped_is_the_callback(last, line_search_fn, packed):
    told = []

    def callback(iteration):
        told.append(iteration)
        return iteration.n == last

    run = Run(LBFGS, *PROBLEMS["mlp"], line_search_fn=line_search_fn, callback=callback)
    prepared(run, packed).step()
    assert run.optimizer.status is Status.STOPPED
    assert [x.n for x in told] == list(range(last + 1))
    assert run.state["n_iter"] == last
    assert run.loss(run.params).item() == told[-1].value
    # The run goes on from there as if it had not been stopped.
    run.optimizer.callback = None
    run.step(2)
    assert run.losses[-1] < 0.1 * run.losses[0]


@both
def test_stopping_loses_no_pair(line_search_fn):
    """Stopped after each iteration and called again, a run visits the points of one that is not stopped."""
    options = {"line_search_fn": line_search_fn, "max_eval": 1000, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    whole = Run(LBFGS, *PROBLEMS["mlp"], max_iter=12, **options).step()
    run = Run(LBFGS, *PROBLEMS["mlp"], max_iter=12, callback=lambda iteration: iteration.step > 0.0, **options)
    while run.optimizer.status in (None, Status.STOPPED) and run.state.get("n_iter", 0) < 12:
        run.step()
    seen = {tuple(x.tolist()) for x in run.points}
    # Without a search the last step of `whole` is not evaluated, in `run` it is.
    assert {tuple(x.tolist()) for x in whole.points} <= seen
    assert len(seen) <= len(whole.points) + 1


# Callback -------------------------------------------------------------------------------------------------------------


class Told(Run):
    """A run that compares what the callback is told with the parameters and with its own log of evaluations."""

    def __init__(self, *args, packed=False, **options):
        super().__init__(LBFGS, *args, callback=self.callback, **options)
        self.told, self.at = [], []
        prepared(self, packed)

    def callback(self, iteration):
        assert isinstance(iteration, Iteration)
        assert iteration.evaluations == len(self.points)
        self.told.append(iteration)
        self.at.append(self.x)


@packings
@both
@pytest.mark.parametrize("problem", ["quadratic-1e3", "rosenbrock-10", "mlp"])
@pytest.mark.parametrize("max_iter", [1, 4, 20])
def test_the_callback_is_told_each_iterate_once(max_iter, problem, line_search_fn, packed):
    options = {"line_search_fn": line_search_fn, "max_iter": max_iter, "max_eval": 1000, "tolerance_change": 0.0}
    run = Told(*PROBLEMS[problem], packed=packed, **options).step(20 // max_iter)
    ended = 20 if line_search_fn else 19  # without a search the last point is not evaluated
    assert [x.n for x in run.told] == list(range(ended + 1))
    assert run.told[0].step == 0.0
    for iteration, x in zip(run.told, run.at, strict=True):
        # The iterate is where the parameters are, and the closure has been there.
        at = max(i for i, point in enumerate(run.points[: iteration.evaluations]) if torch.equal(point, x))
        assert iteration.value == run.losses[at]
        assert iteration.grad_norm == largest(run, x)
        assert iteration.step > 0.0 or iteration.n == 0
    if line_search_fn is None:
        first = run.points[0]
        leaf = first.clone().requires_grad_()
        shapes = [p.shape for p in run.params]
        parts = [v.reshape(s) for v, s in zip(leaf.split([s.numel() for s in shapes]), shapes, strict=True)]
        total = torch.autograd.grad(run.loss(parts), leaf)[0].abs().sum().item()
        steps = [min(1.0, 1.0 / total)] + [1.0] * (ended - 1)
        assert [x.step for x in run.told[1:]] == pytest.approx(steps, rel=1e-14)


@packings
@both
def test_a_callback_changes_nothing(line_search_fn, packed):
    expected = prepared(Run(LBFGS, *PROBLEMS["mlp"], line_search_fn=line_search_fn), packed).step(3)
    run = Told(*PROBLEMS["mlp"], packed=packed, line_search_fn=line_search_fn).step(3)
    assert len(run.points) == len(expected.points)
    assert all(torch.equal(a, b) for a, b in zip(run.points, expected.points, strict=True))
    assert torch.equal(run.x, expected.x)


@both
def test_a_callback_needs_no_transfer(line_search_fn, monkeypatch):
    loss, start = PROBLEMS["mlp"]
    params = [x.clone().requires_grad_() for x in start]
    told, evaluations = [], 0
    optimizer = LBFGS(params, line_search_fn=line_search_fn, callback=lambda iteration: told.append(iteration))

    def closure():
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    with secant.use_backend("reference"):
        optimizer._bind()
        optimizer._packed = True
        for _ in range(2):
            with Reads(monkeypatch) as reads:
                optimizer.step(closure)
            monkeypatch.undo()
            assert reads.count == evaluations > 10
            evaluations = 0
    assert len(told) > 30


@both
def test_the_callback_is_told_the_loss_that_is_maximized(line_search_fn):
    loss, start = PROBLEMS["mlp"]
    up = Told(lambda params: -loss(params), start, maximize=True, line_search_fn=line_search_fn).step()
    down = Told(loss, start, line_search_fn=line_search_fn).step()
    assert [x._replace(value=-x.value) for x in up.told] == down.told
    assert {x.value for x in up.told} <= set(up.losses)


@both
def test_grad_norm_is_what_tolerance_grad_looks_at(line_search_fn):
    """With unequal lr both are of R^(1/2) g."""
    told = []
    params = [torch.tensor([3.0]).double().requires_grad_(), torch.tensor([-2.0]).double().requires_grad_()]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.25}]
    optimizer = LBFGS(groups, line_search_fn=line_search_fn, callback=lambda iteration: told.append(iteration))
    sizes = []

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (params[0] ** 2 + 20.0 * params[1] ** 2).sum()
        loss.backward()
        sizes.append(max(params[0].grad.abs().item(), 0.5 * params[1].grad.abs().item()))
        return loss

    optimizer.step(closure)
    assert len(told) > 3
    assert all(x.grad_norm in sizes for x in told)
    assert told[0].grad_norm == 20.0


@packings
@both
@pytest.mark.parametrize("error", [ValueError("v"), KeyboardInterrupt()], ids=repr)
def test_a_callback_that_raises_leaves_no_trace(error, line_search_fn, packed):
    for calls, at in [(0, 0), (0, 3), (1, 2), (2, 6)]:
        options = {"line_search_fn": line_search_fn, "max_iter": 8, "history_size": 3}
        run, expected = (prepared(Run(LBFGS, *PROBLEMS["mlp"], **options), packed).step(calls) for _ in range(2))
        before, x = copy.deepcopy(run.optimizer.state_dict()), run.x
        told = []

        def callback(iteration, told=told, at=at):
            told.append(iteration)
            if len(told) > at:
                raise error

        run.optimizer.callback = callback
        with pytest.raises(type(error)):
            run.step()
        assert torch.equal(run.x, x)
        after = run.optimizer.state_dict()
        assert after["state"].keys() == before["state"].keys()
        for name, value in before["state"].get(0, {}).items():
            got = after["state"][0][name]
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name
        run.optimizer.callback = None
        assert torch.equal(run.step(2).x, expected.step(2).x)


def test_a_callback_is_not_part_of_the_state():
    run = Run(LBFGS, *PROBLEMS["mlp"], callback=lambda iteration: None).step()
    assert "callback" not in run.optimizer.defaults
    assert all("callback" not in group for group in run.optimizer.param_groups)
    assert "callback" not in run.optimizer.state_dict()
    for other in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert other.callback is None
    saved = run.optimizer.state_dict()
    run.optimizer.load_state_dict(saved)
    assert run.optimizer.callback is not None
    with pytest.raises(TypeError, match="LBFGS: callback: expected a function or None, got 3"):
        Run(LBFGS, *PROBLEMS["mlp"], callback=3)
