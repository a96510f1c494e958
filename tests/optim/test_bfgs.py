"""`secant.optim.BFGS`: what it has that the matrix of all optimizers does not ask."""

import math

import pytest
import torch

from optimizer_problems import PROBLEMS, Run
from secant.optim import BFGS, LBFGS
from secant.result import Status

F64 = torch.float64
RULES = ["ssbroyden", "ssbfgs", "bfgs"]
updates = pytest.mark.parametrize("update", RULES)


def run_of(problem, cls=BFGS, dtype=F64, **options):
    loss, start = PROBLEMS[problem]
    return Run(cls, loss, [x.to(dtype) for x in start], **options)


@updates
@pytest.mark.parametrize("problem", ["rosenbrock-2", "rosenbrock-10", "quadratic-1e1"])
def test_it_reaches_the_minimum(problem, update):
    run = run_of(problem, update=update, max_iter=300, tolerance_grad=1e-7, tolerance_change=0.0).step()
    assert run.optimizer.status is Status.CONVERGED
    for p in run.params:
        assert p.grad.abs().max() <= 1e-7


@updates
def test_it_is_the_formula(update):
    """The first iterations from H in full, with the t that the search took and the tau and phi that it was told."""
    loss, start = PROBLEMS["rosenbrock-10"]
    steps = []
    run = Run(BFGS, loss, start, update=update, max_iter=1, max_eval=30, callback=lambda it: steps.append(it.step))
    run.step()
    h = torch.eye(10, dtype=F64)
    x, grads = start[0].clone(), []

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(loss([at]), at)[0]

    g = gradient(x)
    for _ in range(8):
        t = steps[-1]
        s = -t * (h @ g)
        assert torch.allclose(x + s, run.x, rtol=1e-9, atol=1e-12)
        x = run.x
        new = gradient(x)
        y = new - g
        stats = run.optimizer._learner.stats
        tau, phi = stats.tau, stats.phi
        sy, w = s @ y, h @ y
        if stats.accepted:
            q = y @ w
            v = q.sqrt() * (s / sy - w / q)
            gamma = sy / q if int(run.optimizer._learner.count) == 1 else 1.0
            h = gamma / tau * (h - torch.outer(w, w) / q + phi * torch.outer(v, v)) + torch.outer(s, s) / sy
        else:
            assert sy <= 1e-15 * s.norm() * y.norm()
        g = new
        grads.append(stats.accepted)
        run.step()
    assert sum(grads) >= 6


def test_self_scaling_and_density_pay():
    """On an ill-conditioned network: fewer evaluations than BFGS unscaled, and than limited memory."""

    def evaluations(cls, **options):
        run = run_of("mlp", cls, max_iter=10, line_search_fn="strong_wolfe", tolerance_change=0.0, **options)
        while min(run.losses, default=math.inf) > 1e-3 and len(run.losses) < 3000:
            run.step()
        return len(run.losses)

    ours = evaluations(BFGS)
    assert ours < evaluations(LBFGS, history_size=5)
    assert ours < 3000


def test_what_it_learned_survives_options_and_not_another_function():
    run = run_of("rosenbrock-10", max_iter=5).step()
    h = run.optimizer._learner.matrix()
    run.optimizer.param_groups[0]["update"] = "bfgs"
    run.optimizer._bind()
    assert run.optimizer._learner.rule == "bfgs"
    assert torch.equal(run.optimizer._learner.matrix(), h)
    run.optimizer.param_groups[0]["maximize"] = True
    run.optimizer._bind()
    assert torch.equal(run.optimizer._learner.matrix(), torch.eye(10, dtype=F64))


def test_freezing_a_parameter_starts_anew():
    run = run_of("mlp", max_iter=3).step(2)
    assert run.optimizer._learner.count >= 4
    run.params[1].requires_grad_(False)
    before = run.params[1].detach().clone()
    run.step()
    assert run.optimizer._learner.count <= 3
    assert torch.equal(run.params[1].detach(), before)
    run.step(20)
    assert run.losses[-1] < run.losses[0]
    sizes = [p.numel() for p in run.params]
    first = sizes[0]
    m = run.optimizer._learner.matrix()
    frozen = slice(first, first + sizes[1])
    assert not m[frozen, :first].any()  # H is block-diagonal: what does not move has no part in what does


def test_a_matrix_that_is_spoilt_is_replaced():
    run = run_of("rosenbrock-2", max_iter=4).step()
    run.optimizer._learner._h.fill_(math.nan)
    run.optimizer._prev_grad.fill_(0.0)  # so that the direction is computed anew
    run.step(40)
    assert (run.x - 1).abs().max() < 1e-5


@updates
def test_float32_ends_at_its_rounding(update):
    run = run_of("rosenbrock-10", dtype=torch.float32, update=update, max_iter=20, tolerance_grad=0, tolerance_change=0)
    for _ in range(30):
        run.step()
    assert run.losses[-1] <= 1e-9
    assert torch.isfinite(run.x).all()
    assert run.optimizer.status in (Status.STALLED, Status.SMALL_CHANGE, Status.MAX_ITER, Status.CONVERGED)


def test_the_rate_is_one_for_all():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="BFGS: lr: expected 1 in every group"):
        BFGS([{"params": [x]}, {"params": [y], "lr": 0.5}])


def test_without_a_line_search_steps_have_the_length_lr():
    run = run_of("quadratic-1e1", line_search_fn=None, lr=0.5, max_iter=1, max_eval=1).step(2)
    assert torch.allclose(run.ends[0], -0.5 * _gradient(run, 0) / _gradient(run, 0).abs().sum().clamp(min=1.0))
    run.step(60)
    assert run.losses[-1] < run.losses[0]


def _gradient(run, k):
    x = run.points[k].clone().requires_grad_()
    return torch.autograd.grad(run.loss([x]), x)[0]
