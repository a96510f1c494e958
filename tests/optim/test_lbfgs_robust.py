"""Closures that raise, gradients that come late or of other batches, options and parameters that change in mid-run."""

import copy
import math

import numpy as np
import pytest
import torch

import secant
from optimizer_problems import PROBLEMS, Run
from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


def assert_same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key in a["state"]:
        assert a["state"][key].keys() == b["state"][key].keys()
        for name, x in a["state"][key].items():
            y = b["state"][key][name]
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


# Closures that raise --------------------------------------------------------------------------------------------------


class Raising(Run):
    """A run whose closure raises at chosen evaluations (counted from 0), after backward or before it."""

    def __init__(self, *args, when=lambda k: False, error=None, early=False, **options):
        super().__init__(LBFGS, *args, **options)
        self.when, self.error, self.early, self.calls = when, error, early, 0

    def closure(self):
        k, self.calls = self.calls, self.calls + 1
        if self.early and self.when(k):
            self.optimizer.zero_grad()
            raise self.error
        loss = super().closure()
        if self.when(k):
            raise self.error
        return loss


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("pivot 3"), KeyError("k"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("history_size", [3, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_a_closure_that_raises_leaves_no_trace(line_search_fn, packed, history_size, error):
    """At any evaluation, with a ring that is empty, filling or full: the run continues as if nothing had happened."""
    options = {"line_search_fn": line_search_fn, "max_iter": 8, "history_size": history_size}
    for calls, at in [(0, 0), (0, 1), (0, 5), (1, 0), (1, 1), (1, 4), (2, 7)]:
        run, expected = (Raising(*PROBLEMS["mlp"], error=error, early=at % 2 == 1, **options) for _ in range(2))
        for each in (run, expected):
            if packed:
                each.optimizer._bind()
                each.optimizer._packed = True
            each.step(calls)
        before, x = copy.deepcopy(run.optimizer.state_dict()), run.x
        grads = [p.grad for p in run.params]
        contents = [None if g is None else g.clone() for g in grads]
        run.when = lambda k, last=run.calls + at: k >= last
        with pytest.raises(type(error)):
            run.optimizer.step(run.closure)
        assert run.calls == expected.calls + at + 1
        assert torch.equal(run.x, x)
        assert_same_state(run.optimizer.state_dict(), before)
        for p, g, content in zip(run.params, grads, contents, strict=True):
            assert p.grad is g
            assert g is None or torch.equal(g, content)
        run.when = lambda k: False
        assert torch.equal(run.step(2).x, expected.step(2).x)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_what_may_have_to_be_undone_does_not_grow(line_search_fn):
    """Of a call's pairs copies are kept where the next call finds them: as many as a call gives up, and no more."""
    run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], history_size=3, max_iter=5, max_eval=50, line_search_fn=line_search_fn)
    run.step(2)
    free = run.optimizer._undo._free
    places = {name: [x.data_ptr() for copies in kept for x in copies] for name, kept in free.items()}
    assert len(free["pair"]) == 3  # a slot is kept once, however often it is written
    run.step(5)
    assert {name: sorted(x.data_ptr() for copies in kept for x in copies) for name, kept in free.items()} == {
        name: sorted(at) for name, at in places.items()
    }


def test_what_the_optimizer_itself_refuses_leaves_no_trace_either():
    run = Raising(*PROBLEMS["mlp"]).step()
    before, x, grad = copy.deepcopy(run.optimizer.state_dict()), run.x, run.params[0].grad.clone()
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        loss = run.closure()
        return "a string" if calls == 4 else loss

    with pytest.raises(TypeError, match="closure: expected it to return a number or a tensor of one"):
        run.optimizer.step(closure)
    assert torch.equal(run.x, x)
    assert torch.equal(run.params[0].grad, grad)
    assert_same_state(run.optimizer.state_dict(), before)


def cholesky(params):
    """log det of diag(x): fails for x <= 0 as a Gaussian process does; f = sum x - log x, minimum at 1."""
    (x,) = params
    return x.sum() - 2.0 * torch.linalg.cholesky(torch.diag(x)).diagonal().log().sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_iter", [1, 40])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_on_error_backtrack_shortens_the_step(line_search_fn, max_iter, packed):
    start = [torch.tensor([0.5, 3.0, 9.0], dtype=torch.float64)]
    options = {"line_search_fn": line_search_fn, "max_iter": max_iter}
    with pytest.raises(torch.linalg.LinAlgError):
        Run(LBFGS, cholesky, start, lr=30.0, **options).step(10)
    run = Run(LBFGS, cholesky, start, on_error="backtrack", lr=30.0 if max_iter == 40 else 3.0, **options)
    run.optimizer._bind()
    run.optimizer._packed = packed
    run.step(80 // max_iter)
    assert torch.isfinite(run.x).all()
    assert (run.x > 0.0).all()
    assert run.loss([run.x]) < run.losses[0]
    if line_search_fn is not None and max_iter > 1:
        assert (run.x - 1.0).abs().max() < 1e-4


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_on_error_backtrack_is_for_numbers_and_for_trials(line_search_fn):
    options = {"line_search_fn": line_search_fn, "on_error": "backtrack"}
    no_numbers = (KeyError("k"), TypeError("t"), torch.OutOfMemoryError("oom"), NotImplementedError(), RecursionError())
    for error in no_numbers:
        run = Raising(*PROBLEMS["mlp"], when=lambda k: k == 2, error=error, **options)
        with pytest.raises(type(error)):
            run.step()
    for error in (RuntimeError("r"), ValueError("v"), ZeroDivisionError(), torch.linalg.LinAlgError("l")):
        run = Raising(*PROBLEMS["mlp"], when=lambda k: k == 0, error=error, **options)
        with pytest.raises(type(error)):  # there is no step to shorten
            run.step()
        run = Raising(*PROBLEMS["mlp"], when=lambda k: k % 5 == 2, error=error, max_iter=60, **options).step(2)
        assert run.losses[-1] < 0.1 * run.losses[0]


def test_an_interrupt_while_an_unseen_step_is_shortened_leaves_no_trace():
    """The last step of a call leads to where the closure fails; the next call halves it, and is interrupted there."""
    run = Raising(*PROBLEMS["mlp"], error=ValueError("v"), on_error="backtrack", max_iter=2, max_eval=20).step(2)
    expected = Raising(*PROBLEMS["mlp"], on_error="backtrack", max_iter=2, max_eval=20).step(2)
    before, x, first = copy.deepcopy(run.optimizer.state_dict()), run.x, run.calls

    def closure():
        if run.calls > first:
            raise KeyboardInterrupt
        return run.closure()

    run.when = lambda k: k == first
    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step(closure)
    assert run.calls == first + 1
    assert torch.equal(run.x, x)
    assert_same_state(run.optimizer.state_dict(), before)
    run.when = lambda k: False
    assert torch.equal(run.step(2).x, expected.step(2).x)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_that_comes_with_the_next_call_completes_the_pair(packed):
    """Backward outside of the closure, as PyTorch's own C++ tests have it: the points are those of torch."""
    loss, start = PROBLEMS["mlp"]
    ends = []
    for cls in (LBFGS, torch.optim.LBFGS):
        params = [x.clone().requires_grad_() for x in start]
        optimizer = cls(params)
        if cls is LBFGS:
            optimizer._bind()
            optimizer._packed = packed
        for _ in range(20):
            optimizer.zero_grad()
            value = loss(params)
            value.backward()
            optimizer.step(lambda value=value: value)
            ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert optimizer.state[params[0]]["n_iter"] == 20
    for ours, theirs in zip(ends[:20], ends[20:], strict=True):
        # As in the trajectory tests: rounding, amplified over twenty iterations.
        assert (ours - theirs).norm() <= 1e-8 * (1.0 + theirs.norm())
    assert loss(params) < 0.5 * loss(start)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lrs", [(1.0, 1.0), (1.0, 0.5)])
def test_pairs_are_of_one_batch(lrs, packed):
    """Batches with Hessians c I: y / s is c of the call that made the step, not a mixture, in R^(-1/2) x."""
    shares = torch.tensor([lrs[0]] * 3 + [lrs[1]] * 2).double()
    params = [torch.full((3,), 5.0).double().requires_grad_(), torch.full((2,), -3.0).double().requires_grad_()]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]
    optimizer = LBFGS(groups, line_search_fn="strong_wolfe", max_iter=1, max_eval=20)
    optimizer._bind()
    optimizer._packed = packed
    curvatures = [1.0, 0.4, 2.5, 0.7]
    for c in curvatures:

        def closure(c=c):
            optimizer.zero_grad()
            loss = 0.5 * c * sum((p.square().sum() for p in params), torch.zeros(()).double()) + params[0].sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        state = optimizer.state[params[0]]
        k = int(state["count"])
        assert k == curvatures.index(c) + 1
        # Differences of numbers of size 5 c, over steps that the assertion keeps above 1e-3: rounding is below 1e-11.
        moved = state["s"][k - 1].abs() > 1e-3
        assert moved.any()
        assert (state["y"][k - 1] / state["s"][k - 1] - c * shares)[moved].abs().max() <= 1e-10


def test_huge_gradients_in_float32():
    """|g|_2 = 2e19 sqrt(3), so that g.d is infinite in float32: the run moves and arrives."""

    def loss(params):
        return (1e19 * (params[0] - torch.tensor([1.0, 2.0, 3.0])).square()).sum()

    for packed in (False, True):
        run = Run(LBFGS, loss, [torch.zeros(3)], line_search_fn="strong_wolfe", max_iter=30)
        run.optimizer._bind()
        run.optimizer._packed = packed
        run.step()
        # A quadratic is solved to the rounding of x.
        assert (run.x - torch.tensor([1.0, 2.0, 3.0])).abs().max() <= 1e-5
    many = torch.full((64,), 3e37)  # |g|_1 is infinite in float32
    run = Run(LBFGS, lambda params: (many * params[0]).sum(), [torch.zeros(64)], max_iter=1).step()
    # The first step is g / |g|_1.
    torch.testing.assert_close(run.x, torch.full((64,), -1.0 / 64.0))


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_a_frozen_parameter_does_not_move(line_search_fn):
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start, line_search_fn=line_search_fn, max_iter=5).step(2)
    run.params[1].requires_grad_(False)
    frozen, moving = run.params[1].detach().clone(), run.params[0].detach().clone()
    before = loss([p.detach() for p in run.params])
    run.step(2)
    assert torch.equal(run.params[1].detach(), frozen)
    assert not torch.equal(run.params[0].detach(), moving)
    assert run.losses[-1] < before
    run.params[1].requires_grad_(True)
    run.step(8)
    assert not torch.equal(run.params[1].detach(), frozen)
    assert run.losses[-1] < 0.1 * run.losses[0]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_a_parameter_without_a_gradient_does_not_move(line_search_fn):
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start, line_search_fn=line_search_fn, max_iter=5).step(2)
    fixed = run.params[3].detach().clone()

    def closure():
        for p in run.params:
            p.grad = None
        value = loss([*run.params[:3], fixed])
        value.backward()
        return value

    first = run.optimizer.step(closure)
    assert torch.equal(run.params[3].detach(), fixed)
    assert run.optimizer.step(closure) < first
    assert torch.equal(run.params[3].detach(), fixed)


def test_gradients_set_by_hand_need_no_requires_grad():
    x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    optimizer = LBFGS([x], line_search_fn="strong_wolfe")

    def closure():
        x.grad = 2.0 * x
        return x.square().sum()

    optimizer.step(closure)
    assert x.abs().max() < 1e-8


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.reshape(1, 1), lambda x: x.reshape(1), lambda x: x.reshape(1, 1, 1), lambda x: x.double(),
        lambda x: x.item(), lambda x: np.float64(x.item()), lambda x: np.array(x.item()),
        lambda x: np.array([[x.item()]]),
    ],
    ids=["(1, 1)", "(1,)", "(1, 1, 1)", "0-d", "float", "numpy-scalar", "numpy-0-d", "numpy-(1, 1)"],
)  # fmt: skip
def test_a_loss_is_anything_that_is_one_number(kind, line_search_fn, packed):
    run, expected = (Run(LBFGS, *PROBLEMS["rosenbrock-2"], line_search_fn=line_search_fn) for _ in range(2))
    run.optimizer._bind()
    run.optimizer._packed = packed
    for _ in range(2):
        returned = run.optimizer.step(lambda: kind(run.closure().detach()))
    assert type(returned) is type(kind(torch.ones(()).double()))
    assert torch.equal(run.x, expected.step(2).x)


def test_integers_and_narrow_floats_are_losses():
    narrow = (
        torch.tensor([[3]]),
        torch.tensor(3, dtype=torch.uint8),
        torch.tensor(3.0).half(),
        np.int64(3),
        np.float32(3),
    )
    for loss in (*narrow, 3):
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        LBFGS([p], max_iter=1).step(lambda loss=loss: loss)
        torch.testing.assert_close(p.detach(), torch.full((3,), 2.0 / 3.0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tolerance_change", [0.0, 1e-9])
@pytest.mark.parametrize("start", [[1.0, -2.0], [1.0, 0.0], [0.0, 0.0]], ids=str)
def test_a_loss_that_stays_nan_ends_soon(start, tolerance_change, packed):
    def loss(params):
        value = (params[0] - 3.0).square().sum()
        return value if len(run.points) == 0 else value * math.nan

    x = torch.tensor(start, dtype=torch.float64)
    run = Run(LBFGS, loss, [x], max_iter=500, max_eval=5000, tolerance_change=tolerance_change)
    run.optimizer._bind()
    run.optimizer._packed = packed
    run.step()
    assert torch.equal(run.x, x)
    # Eight halvings, then 2^-2, 2^-3, ...: all of the 1074 binary places below 1 in 45 more; one is the start itself.
    assert len(run.points) <= 1 + 8 + 45 + 2


# Options --------------------------------------------------------------------------------------------------------------


def test_the_newest_pairs_stay_when_the_history_changes_its_length():
    run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], history_size=6, max_iter=9, line_search_fn="strong_wolfe").step()
    group = run.optimizer.param_groups[0]

    def pairs():
        state = run.optimizer.state_dict()["state"][0]
        order = [i % len(state["s"]) for i in range(int(state["head"]) - int(state["count"]), int(state["head"]))]
        return state["s"][order].clone(), state["y"][order].clone()

    s, y = pairs()
    assert len(s) == 6
    for size, kept in ((3, 3), (8, 3)):
        group["history_size"] = size
        assert all(torch.equal(a, b[-kept:]) for a, b in zip(pairs(), (s, y), strict=True))
        assert run.state["s"].shape == (size, 10)
    run.step(6)
    assert run.losses[-1] < 1e-3 * run.losses[0]
    other = Run(LBFGS, *PROBLEMS["rosenbrock-10"])
    other.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize(
    ("option", "value"),
    [("history_dtype", torch.float32), ("curvature_tol", 1e-3), ("line_search_fn", "strong_wolfe"), ("maximize", True),
     ("history_size", 2), ("max_iter", 3), ("tolerance_grad", 1e-12), ("on_error", "backtrack")],
)  # fmt: skip
def test_options_may_change(option, value):
    run = Run(LBFGS, *PROBLEMS["rosenbrock-10"], max_iter=5).step(2)
    run.optimizer.param_groups[0][option] = value
    before = run.loss([run.x])
    run.step(1 if option == "maximize" else 6)
    assert run.loss([run.x]) > before if option == "maximize" else run.loss([run.x]) < before


@pytest.mark.parametrize(
    ("option", "value"),
    [("history_size", 0), ("history_size", True), ("history_dtype", torch.float16), ("curvature_tol", 1.0),
     ("max_iter", 0), ("line_search_fn", "wolfe"), ("maximize", 1), ("max_iter", True), ("max_iter", 2.0),
     ("lr", -1.0), ("lr", "a"),
     ("lr", math.nan), ("lr", torch.tensor(math.nan)), ("lr", 10**400), ("lr", True), ("lr", torch.tensor(1j)),
     ("lr", torch.ones((), device="meta")), ("lr", None), ("tolerance_grad", "1e-3"), ("tolerance_change", 10**400),
     ("tolerance_change", True), ("max_eval", 0), ("max_eval", False), ("on_error", "ignore"), ("on_error", None),
     ("curvature_tol", False), ("line_search_fn", np.zeros(3)), ("history_dtype", "float32")],
)  # fmt: skip
def test_invalid_options_are_named_wherever_they_come_from(option, value):
    message = f"LBFGS: {option}: expected .*, got "
    with pytest.raises(ValueError, match=message):
        Run(LBFGS, *PROBLEMS["mlp"], **{option: value})
    run = Run(LBFGS, *PROBLEMS["mlp"]).step()
    before, x = copy.deepcopy(run.optimizer.state_dict()), run.x
    run.optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=message):
        run.optimizer.step(run.closure)
    saved = copy.deepcopy(before)
    saved["param_groups"][0][option] = value
    run.optimizer.param_groups[0][option] = before["param_groups"][0][option]
    with pytest.raises(ValueError, match=f"LBFGS.load_state_dict: {option}: expected .*, got "):
        run.optimizer.load_state_dict(saved)
    assert torch.equal(run.x, x)
    assert_same_state(run.optimizer.state_dict(), before)


def test_the_first_group_speaks_for_all():
    loss, start = PROBLEMS["mlp"]
    run = Run(LBFGS, loss, start)
    run.optimizer = LBFGS([{"params": run.params[:2]}, {"params": run.params[2:], "lr": 0.5}])
    run.step()
    first, second = run.optimizer.param_groups
    first["max_iter"] = 3
    run.step()
    assert second["max_iter"] == 3
    second["max_iter"] = 4
    with pytest.raises(ValueError, match="LBFGS: max_iter: expected 3 in every group"):
        run.step()


# States ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("t", math.nan), ("t", -1.0), ("t", "1"), ("t", math.inf), ("func_evals", -1), ("func_evals", 2.0),
     ("n_iter", 1.5),
     ("n_iter", True), ("n_iter", "3"), ("first_grad_max", math.nan), ("first_grad_max", None), ("s", [1.0]),
     ("head", torch.tensor(100, dtype=torch.int32)), ("head", torch.tensor(-1, dtype=torch.int32)),
     ("count", torch.tensor(101, dtype=torch.int32)), ("count", torch.tensor(-3, dtype=torch.int32))],
)  # fmt: skip
def test_a_failed_load_changes_nothing(name, value):
    run = Run(LBFGS, *PROBLEMS["mlp"], max_iter=4).step(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][0][name] = value
    saved["param_groups"][0]["lr"] = 0.5
    before, x = copy.deepcopy(run.optimizer.state_dict()), run.x
    grads = [p.grad for p in run.params]
    with pytest.raises(ValueError, match=rf"load_state_dict: (state\['{name}'\]|{name}): expected "):
        run.optimizer.load_state_dict(saved)
    assert_same_state(run.optimizer.state_dict(), before)
    assert torch.equal(run.x, x)
    assert all(p.grad is g for p, g in zip(run.params, grads, strict=True))
    expected = Run(LBFGS, *PROBLEMS["mlp"], max_iter=4).step(3)
    assert torch.equal(run.step().x, expected.x)


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("max_iter", [1, 4])
def test_continues_from_a_state_of_torch(max_iter, line_search_fn):
    loss, start = PROBLEMS["mlp"]
    options = {"max_iter": max_iter, "line_search_fn": line_search_fn, "history_size": 5}
    theirs = Run(torch.optim.LBFGS, loss, start, **options).step(12 // max_iter)
    ours = Run(LBFGS, loss, [p.detach() for p in theirs.params])
    ours.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    ours.points, theirs.points = [], []
    theirs.step(8 // max_iter)
    ours.step(8 // max_iter)
    assert len(ours.points) == len(theirs.points)
    assert ours.state["func_evals"] == theirs.state["func_evals"]
    assert ours.state["n_iter"] == theirs.state["n_iter"]
    for a, b in zip(ours.points, theirs.points, strict=True):
        assert (a - b).norm() <= 1e-8 * (1.0 + b.norm())  # as in the trajectory tests


def test_states_of_torch_before_its_first_step():
    loss, start = PROBLEMS["mlp"]
    expected = Run(LBFGS, loss, start).step()
    for theirs in (Run(torch.optim.LBFGS, loss, start), Run(torch.optim.LBFGS, loss, start, tolerance_grad=1e9).step()):
        ours = Run(LBFGS, loss, start)
        ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
        ours.optimizer.param_groups[0]["tolerance_grad"] = 1e-7
        assert torch.equal(ours.step().x, expected.x)
    broken = Run(torch.optim.LBFGS, loss, start).step().optimizer.state_dict()
    broken["state"][0]["old_dirs"][0] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"LBFGS.load_state_dict: state\['old_dirs'\]: expected a tensor of shape"):
        Run(LBFGS, loss, start).optimizer.load_state_dict(broken)


# torch.compile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_step_under_compile(line_search_fn):
    loss, start = PROBLEMS["rosenbrock-2"]
    expected = Run(LBFGS, loss, start, line_search_fn=line_search_fn).step(2)
    run = Run(LBFGS, loss, start, line_search_fn=line_search_fn)
    step = torch.compile(run.optimizer.step, backend="eager")
    for _ in range(2):
        step(run.closure)
    assert torch.equal(run.x, expected.x)
    run = Run(LBFGS, loss, start, line_search_fn=line_search_fn)

    @torch.compile(backend="eager")
    def train():
        return run.optimizer.step(run.closure)

    assert train().item() == expected.losses[0]
    train()
    assert torch.equal(run.x, expected.x)


def test_every_option_is_documented():
    for name in LBFGS([torch.ones(1, requires_grad=True)]).defaults:
        assert f"\n        {name}: " in LBFGS.__doc__, name
    assert secant.optim.LBFGS is LBFGS


# Rounding -------------------------------------------------------------------------------------------------------------


def test_float32_searches_know_the_rounding_of_the_loss():
    """Rosenbrock from far away, down a valley where a step changes the loss by less than its rounding.

    Without that knowledge a third of such runs ends for good at losses of 100 and more.
    """

    def rosenbrock(params):
        (x,) = params
        return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2

    gen = torch.Generator().manual_seed(0)
    starts = [torch.tensor([300.0, 300.0]), *(800.0 * torch.rand(15, 2, generator=gen) - 400.0)]
    options = {"max_iter": 100, "line_search_fn": "strong_wolfe", "tolerance_change": 0.0, "tolerance_grad": 0.0}
    for start in starts:
        run = Run(LBFGS, rosenbrock, [start], **options).step(10)
        assert (run.x - 1.0).abs().max() <= 1e-3, start
        solved = len(run.points)
        run.step()
        assert len(run.points) - solved <= 40  # there is nothing left to find
