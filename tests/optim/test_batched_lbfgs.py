"""`BatchedLBFGS`: problems in the rows of parameters, each as if it were alone; steps, states, callbacks, failures."""

import copy
import io
import math

import pytest
import torch

import secant
from secant.optim import BatchedLBFGS
from secant.result import Status

F64 = torch.float64


def rosenbrock(x):
    return (100.0 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1.0 - x[:, :-1]) ** 2).sum(-1)


def starts(b=8, n=4, seed=0, dtype=F64):
    return (4.0 * torch.rand(b, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 2.0).to(dtype)


class Run:
    """The optimizer on Rosenbrock's function, whose variables are in one parameter or in two."""

    def __init__(self, x0, *, parts=1, fun=rosenbrock, **options):
        self.fun, self.count, self.spoil = fun, 0, lambda losses: losses
        self.params = [x.clone().requires_grad_() for x in x0.chunk(parts, 1)]
        self.optimizer = BatchedLBFGS(self.params, **options)

    @property
    def x(self):
        return torch.cat([p.detach() for p in self.params], 1)

    def closure(self):
        self.count += 1
        self.optimizer.zero_grad()
        losses = self.fun(torch.cat(self.params, 1))
        losses.sum().backward()
        return self.spoil(losses)

    def step(self, calls=1):
        for _ in range(calls):
            self.losses = self.optimizer.step(self.closure)
        return self


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_finds_the_minima_and_says_so(dtype, parts):
    x0 = starts(dtype=dtype)
    run = Run(x0, parts=parts, max_iter=200, tolerance_grad=1e-2 if dtype is torch.float32 else 1e-8).step()
    assert run.optimizer.status.dtype is torch.int32
    assert run.optimizer.status.tolist() == [Status.CONVERGED] * 8
    torch.testing.assert_close(run.losses.detach(), rosenbrock(x0), rtol=0, atol=0)
    grad = torch.cat([p.grad for p in run.params], 1)
    x = run.x.requires_grad_()
    (want,) = torch.autograd.grad(rosenbrock(x).sum(), x)
    assert torch.equal(grad, want)
    assert all(p.dtype is dtype for p in run.params)


def test_a_problem_ends_where_it_ends_alone():
    x0 = starts(20)
    whole = Run(x0, max_iter=15).step(3)
    for i in (0, 7, 19):
        alone = Run(x0[i : i + 1], max_iter=15).step(3)
        assert torch.equal(alone.x[0], whole.x[i])
        assert alone.optimizer.status[0] == whole.optimizer.status[i]
    assert torch.equal(Run(x0, parts=2, max_iter=15).step(3).x, whole.x)


def test_two_steps_are_one_of_twice_the_iterations():
    once, twice = Run(starts(), max_iter=12, tolerance_grad=0.0).step(), Run(starts(), max_iter=6, tolerance_grad=0.0)
    assert twice.step().optimizer.status.tolist() == [Status.MAX_ITER] * 8
    assert torch.equal(twice.step().x, once.x)


def test_it_continues_bit_for_bit_from_a_file():
    run = Run(starts(), max_iter=5).step()
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other = Run(run.x, max_iter=5)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    before = run.x
    assert torch.equal(run.step().x, other.step().x)
    assert not torch.equal(run.x, before)
    a, b = (r.optimizer.state_dict()["state"][0] for r in (run, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_a_state_of_something_else_changes_nothing():
    run = Run(starts(), max_iter=5).step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    for name, value in (("func_evals", -1), ("count", saved["state"][0]["count"] + 100), ("s", torch.zeros(2))):
        state = copy.deepcopy(saved)
        state["state"][0][name] = value
        with pytest.raises(ValueError, match="load_state_dict: state"):
            run.optimizer.load_state_dict(state)
    other = Run(run.x, max_iter=5)
    other.optimizer.load_state_dict(saved)
    assert torch.equal(run.step().x, other.step().x)


def test_a_nan_touches_nobody_else():
    def fun(x):
        f = rosenbrock(x)
        bad = torch.tensor([0.0, math.nan, 0.0, 0.0], dtype=F64)
        return f + bad * x[:, 0]

    x0 = starts(4)
    run = Run(x0, fun=fun, max_iter=100, tolerance_grad=1e-8).step()
    assert run.optimizer.status.tolist() == [0, Status.NOT_FINITE, 0, 0]
    assert torch.equal(run.x[1], x0[1])
    clean = Run(x0, max_iter=100, tolerance_grad=1e-8).step()
    assert torch.equal(run.x[[0, 2, 3]], clean.x[[0, 2, 3]])


def test_an_exception_leaves_no_trace():
    run = Run(starts(), max_iter=5).step()
    before, state, grad = run.x, copy.deepcopy(run.optimizer.state_dict()), run.params[0].grad.clone()
    start = run.count

    def spoil(losses):
        if run.count == start + 4:
            raise RuntimeError("spoilt")
        return losses

    run.spoil = spoil
    with pytest.raises(RuntimeError, match="spoilt"):
        run.step()
    assert torch.equal(run.x, before)
    assert torch.equal(run.params[0].grad, grad)
    now = run.optimizer.state_dict()["state"][0]
    for name, value in state["state"][0].items():
        assert torch.equal(now[name], value) if isinstance(value, torch.Tensor) else now[name] == value, name


def test_the_callback_is_told_and_stops():
    seen = []
    run = Run(starts(), max_iter=50, callback=lambda iteration: seen.append(iteration) or len(seen) == 4).step()
    assert [one.n for one in seen] == [1, 2, 3, 4]
    assert run.optimizer.status.tolist() == [Status.STOPPED] * 8
    assert seen[-1].evaluations == run.count
    assert seen[-1].value == pytest.approx(float(rosenbrock(run.x).sum()), rel=1e-12)
    assert seen[0].value > seen[-1].value
    assert all(one.step > 0.0 for one in seen)


def test_options_may_change_in_mid_run():
    run = Run(starts(), max_iter=5).step()
    run.optimizer.param_groups[0]["history_size"] = 3
    run.optimizer.param_groups[0]["max_iter"] = 200
    assert run.step().optimizer.status.tolist() == [Status.CONVERGED] * 8
    run.optimizer.param_groups[0]["history_size"] = 0
    with pytest.raises(ValueError, match="BatchedLBFGS: history_size: expected "):
        run.step()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([torch.ones(())], r"params\[0\]: expected shape \(B, ...\)"),
        ([torch.ones(3, 2), torch.ones(2, 2)], r"params\[1\]: expected shape \(3, ...\), like params\[0\]"),
    ],
)
def test_parameters_without_equal_rows_are_named(params, words):
    with pytest.raises(ValueError, match=words):
        BatchedLBFGS([p.requires_grad_() for p in params])


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: x.sum(), r"closure: expected it to return losses \(3,\)"),
        (lambda x: x.sum(-1), "calls backward on the sum of the losses"),
        (lambda x: None, r"closure: expected it to return losses \(3,\)"),
    ],
)
def test_closures_of_another_kind_are_named(returned, words):
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match=words):
        BatchedLBFGS([x]).step(lambda: returned(x))
    assert torch.equal(x.detach(), torch.ones(3, 2))


def test_it_is_public():
    assert secant.optim.BatchedLBFGS is BatchedLBFGS
