"""NaN and Inf: steps become shorter, parameters stay finite."""

import math

import pytest
import torch

from optimizer_problems import PROBLEMS, Run
from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


class Injected(Run):
    """A run whose closure spoils the loss or the gradient at chosen evaluations (counted from 0)."""

    def __init__(self, *args, when, loss=None, grad=None, **options):
        super().__init__(LBFGS, *args, **options)
        self.when, self.bad_loss, self.bad_grad, self.calls = when, loss, grad, 0

    def closure(self):
        loss = super().closure()
        bad = self.when(self.calls)
        self.calls += 1
        if bad and self.bad_grad is not None:
            self.params[0].grad.view(-1)[0] = self.bad_grad
        return loss * self.bad_loss if bad and self.bad_loss is not None else loss


SPOILS = [{"loss": math.nan}, {"loss": math.inf}, {"loss": -math.inf}, {"grad": math.nan}, {"grad": math.inf}]


@pytest.mark.parametrize("spoil", SPOILS, ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_spoilt_evaluations_are_stepped_around(line_search_fn, spoil):
    run = Injected(*PROBLEMS["mlp"], when=lambda k: k % 4 == 3, line_search_fn=line_search_fn, max_iter=60, **spoil)
    run.step(2)
    assert all(torch.isfinite(x).all() for x in run.points)
    assert torch.isfinite(run.x).all()
    assert run.losses[-1] < 0.1 * run.losses[0]


@pytest.mark.parametrize("spoil", SPOILS, ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_nothing_finite_returns_to_the_start_exactly(line_search_fn, spoil):
    run = Injected(*PROBLEMS["mlp"], when=lambda k: k > 0, line_search_fn=line_search_fn, **spoil)
    start = run.x
    run.step()
    assert len(run.points) > 1
    assert torch.equal(run.x, start)
    # The optimizer is as it was: once the closure behaves again, so does the run.
    run.when = lambda k: False
    run.step(3)
    assert run.losses[-1] < 0.1 * run.losses[0]


@pytest.mark.parametrize("spoil", SPOILS, ids=str)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_a_start_that_is_not_finite_is_left_alone(line_search_fn, spoil):
    run = Injected(*PROBLEMS["mlp"], when=lambda k: k == 0, line_search_fn=line_search_fn, **spoil)
    start = run.x
    run.step()
    assert torch.equal(run.x, start)
    assert len(run.points) == 1
    run.step(3)
    assert run.losses[-1] < 0.1 * run.losses[0]


def barrier(params):
    """Sum of x - log x: NaN for x < 0, minimum at 1."""
    (x,) = params
    return (x - x.log()).sum()


@pytest.mark.parametrize("max_iter", [1, 5, 50])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_log_going_nan(line_search_fn, max_iter):
    # lr = 30 throws the first steps far below zero, where torch stays.
    start = [torch.tensor([0.5, 3.0, 9.0], dtype=torch.float64)]
    options = {"lr": 30.0, "line_search_fn": line_search_fn, "max_iter": max_iter}
    if line_search_fn is None:
        theirs = Run(torch.optim.LBFGS, barrier, start, **options).step(10)
        assert theirs.x.min() < -1e3
        assert math.isnan(theirs.losses[-1])
    run = Run(LBFGS, barrier, start, **options)
    run.step(200 // max_iter)
    assert any(math.isnan(f) for f in run.losses)
    assert all(torch.isfinite(x).all() for x in run.points)
    assert torch.isfinite(run.x).all()
    finite = [f for f in run.losses if math.isfinite(f)]
    assert min(finite) < finite[0]
    if line_search_fn is not None and max_iter > 1:
        # Every accepted step decreases the loss, and it is strictly convex: the run converges. (max_iter = 1 leaves one
        # trial for a search, as in torch; a lr of 30 is then too long for good.)
        assert (run.x - 1.0).abs().max() < 1e-4


def test_an_unseen_step_is_halved_by_the_next_call():
    """With max_iter = 1 and no line search a call ends on a point that nobody has evaluated."""
    run = Run(LBFGS, barrier, [torch.tensor([9.0], dtype=torch.float64)], lr=100.0, max_iter=1)
    run.step()
    # g = 1 - 1/9, first step lr * min(1, 1 / |g|) g = 100 g.
    assert run.x.item() == pytest.approx(9.0 - 100.0 * (1.0 - 1.0 / 9.0))
    overshoot = 9.0 - run.x.item()
    for k in range(1, 4):
        run.step()
        assert math.isnan(run.losses[-1])
        assert run.x.item() == pytest.approx(9.0 - overshoot / 2**k)
    run.step()
    assert run.x.item() == pytest.approx(9.0 - overshoot / 2**4)
    run.step()
    assert math.isfinite(run.losses[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_cannot_overflow_a_parameter(packed, line_search_fn, dtype):
    """With an enormous lr the plain step is infinite; tanh makes the loss finite there, so only the parameter tells."""
    big = torch.finfo(dtype).max

    def loss(params):
        (x,) = params
        return (-0.5 * big * torch.tanh(x / (0.5 * big))).sum()

    # The slope is -sech(1.9)^2 = -0.086 at 0.95 big, so lr = big would add 0.086 big.
    start = torch.tensor([0.95 * big], dtype=dtype)
    assert math.isinf((start + 0.08 * big).item())
    run = Run(LBFGS, loss, [start], lr=big, line_search_fn=line_search_fn)
    run.optimizer._bind()
    run.optimizer._packed = packed
    run.step(3)
    assert torch.isfinite(run.x).all()
    if not packed:  # where the size of the direction is known before it is tried, nothing infinite is ever evaluated
        assert all(torch.isfinite(x).all() for x in run.points)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_a_huge_gradient_in_float32(line_search_fn):
    """Gradients near the largest number: the norms and products overflow, the parameters must not."""

    def loss(params):
        (x,) = params
        return 1e37 * (x**4).sum()

    run = Run(LBFGS, loss, [torch.tensor([1.0, -2.0])], line_search_fn=line_search_fn).step(5)
    assert torch.isfinite(run.x).all()


def test_a_search_that_ends_on_an_earlier_trial_keeps_its_gradient():
    """Only the start and the first trial are finite: the bracket closes on that trial, and the run goes on from it."""

    def loss(params):
        return 0.5 * (params[0] - 1000.0).square().sum()

    run = Injected(loss, [torch.zeros(2).double()], when=lambda k: k > 1, loss=math.nan, max_iter=2, max_eval=200,
                   line_search_fn="strong_wolfe").step()  # fmt: skip
    assert run.state["n_iter"] == 2
    assert len(run.points) > 4
    # Where the second iteration began, and ended, since it found nothing finite.
    assert torch.equal(run.x, run.points[1])
    assert torch.equal(run.state["start"], run.points[1])
    assert torch.equal(run.state["prev_grad"], run.points[1] - 1000.0)
