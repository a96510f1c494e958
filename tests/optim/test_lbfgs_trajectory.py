"""secant.optim.LBFGS against torch.optim.LBFGS: the same points in the same order."""

import pytest
import torch

import secant
from optimizer_problems import PROBLEMS, Run, rosenbrock
from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


def assert_same_points(ours, theirs, first):
    """The first evaluated points, to 1e-8 relative to the size of the point.

    Rounding of the two-loop recursion differs at 1e-16; twenty iterations of these problems amplify it by under 1e6.
    """
    assert len(ours) >= min(first, len(theirs))
    for a, b in zip(ours[:first], theirs[:first], strict=False):
        assert (a - b).norm() <= 1e-8 * (1.0 + b.norm())


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"history_size": 4},
        {"history_size": 1},
        {"lr": 0.3},
        {"max_iter": 1},
        {"max_iter": 3},
        {"max_iter": 1, "max_eval": 30},
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_trajectory(problem, options, line_search_fn):
    calls = -(-20 // options.get("max_iter", 20))
    runs = [
        Run(cls, *PROBLEMS[problem], line_search_fn=line_search_fn, **options).step(calls)
        for cls in (LBFGS, torch.optim.LBFGS)
    ]
    ours, theirs = runs
    assert_same_points(ours.points, theirs.points, 20)
    assert_same_points(ours.ends, theirs.ends, 20)
    assert len(ours.points) == len(theirs.points)
    assert ours.state["func_evals"] == theirs.state["func_evals"] == len(ours.points)
    assert ours.state["n_iter"] == theirs.state["n_iter"]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_trajectory_on_the_reference_backend(line_search_fn):
    with secant.use_backend("reference"):
        ours = Run(LBFGS, *PROBLEMS["mlp"], line_search_fn=line_search_fn).step()
    theirs = Run(torch.optim.LBFGS, *PROBLEMS["mlp"], line_search_fn=line_search_fn).step()
    assert_same_points(ours.points, theirs.points, 20)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("problem", ["quadratic-1e3", "rosenbrock-10", "mlp"])
def test_one_long_step_is_many_short_ones(problem, line_search_fn):
    options = {"line_search_fn": line_search_fn, "max_eval": 1000, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    long = Run(LBFGS, *PROBLEMS[problem], max_iter=24, **options).step()
    short = Run(LBFGS, *PROBLEMS[problem], max_iter=1, **options).step(24)
    uneven = Run(LBFGS, *PROBLEMS[problem], max_iter=7, **options).step(3)
    uneven.optimizer.param_groups[0]["max_iter"] = 3
    uneven.step()
    assert torch.equal(long.x, short.x)
    assert torch.equal(long.x, uneven.x)


def test_returns_the_first_loss_as_torch_does():
    for cls in (LBFGS, torch.optim.LBFGS):
        run = Run(cls, *PROBLEMS["rosenbrock-2"], line_search_fn="strong_wolfe")
        returned = run.optimizer.step(run.closure)
        assert isinstance(returned, torch.Tensor)
        assert returned.item() == run.losses[0] > min(run.losses)


def test_a_closure_may_return_a_number():
    run = Run(LBFGS, *PROBLEMS["rosenbrock-2"], line_search_fn="strong_wolfe")
    assert run.optimizer.step(lambda: run.closure().item()) == run.losses[0]
    other = Run(LBFGS, *PROBLEMS["rosenbrock-2"], line_search_fn="strong_wolfe").step()
    assert torch.equal(run.x, other.x)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_stops_where_torch_stops(line_search_fn):
    for tolerances in ({"tolerance_grad": 1e-3}, {"tolerance_change": 1e-4}, {"tolerance_change": 1e-2}):
        runs = [
            Run(cls, *PROBLEMS["quadratic-1e3"], line_search_fn=line_search_fn, max_iter=500, **tolerances).step(2)
            for cls in (LBFGS, torch.optim.LBFGS)
        ]
        assert len(runs[0].points) == len(runs[1].points) < 500


def test_solves_rosenbrock_as_documented():
    run = Run(LBFGS, *PROBLEMS["rosenbrock-2"], max_iter=100, line_search_fn="strong_wolfe").step()
    assert run.losses[0] == pytest.approx(24.2)
    assert (run.x - 1.0).abs().max() <= 1e-4


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_maximize_is_minimizing_the_negative(line_search_fn):
    options = {"line_search_fn": line_search_fn, "max_iter": 30}
    loss, start = PROBLEMS["mlp"]
    down = Run(LBFGS, loss, start, **options).step(2)
    up = Run(LBFGS, lambda params: -loss(params), start, maximize=True, **options).step(2)
    assert torch.equal(down.x, up.x)
    assert [-f for f in up.losses] == down.losses
    assert down.losses[-1] < 0.1 * down.losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_history_dtype(dtype):
    run = Run(LBFGS, rosenbrock, [torch.linspace(-1, 1, 10)], history_dtype=dtype, max_iter=200, max_eval=1000,
              line_search_fn="strong_wolfe").step()  # fmt: skip
    assert run.state["s"].dtype is dtype
    # The gradient falls below the default tolerances of a float32 run from 1e2: rounding pairs costs iterations, not
    # the solution.
    assert run.losses[-1] <= 1e-6
    assert (run.x - 1.0).abs().max() <= 1e-2


def test_the_gate_is_relative():
    """Near the end of this run s.y is below torch's 1e-10; ours goes on learning curvature, and gets further."""
    loss, start = PROBLEMS["quadratic-1e3"]
    options = {"max_iter": 200, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    ours = Run(LBFGS, lambda params: 1e-12 * loss(params), start, **options).step()
    theirs = Run(torch.optim.LBFGS, lambda params: 1e-12 * loss(params), start, **options).step()
    assert theirs.losses[-1] == pytest.approx(theirs.losses[0], rel=1e-3)
    assert ours.losses[-1] < 1e-12 * loss([start[0] * 0.0])
    assert ours.state["count"] > 5
