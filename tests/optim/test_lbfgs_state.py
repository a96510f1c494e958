"""state_dict: fixed shape, few tensors, and a run that continues bit for bit."""

import copy
import io

import pytest
import torch

from optimizer_problems import PROBLEMS, Run
from secant.optim import LBFGS

SEARCHES = [None, "strong_wolfe"]


def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def float32(problem):
    loss, start = PROBLEMS[problem]
    return lambda params: loss([p.double() for p in params]).float(), [x.float() for x in start]


@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("max_iter", [1, 4])
@pytest.mark.parametrize("options", [{}, {"history_dtype": torch.bfloat16}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continues_bit_for_bit(dtype, options, max_iter, line_search_fn):
    loss, start = float32("mlp") if dtype is torch.float32 else PROBLEMS["mlp"]
    signed = (lambda params: -loss(params)) if options.get("maximize") else loss
    options = {"history_size": 5, "max_iter": max_iter, "max_eval": 20, "line_search_fn": line_search_fn, **options}
    run = Run(LBFGS, signed, start, **options).step(8)  # by now the ring has wrapped
    saved = reloaded(run.optimizer.state_dict())
    other = Run(LBFGS, signed, [p.detach() for p in run.params], **options)
    other.optimizer.load_state_dict(saved)
    run.step(4)
    other.step(4)
    assert torch.equal(run.x, other.x)
    assert not torch.equal(run.ends[-1], run.ends[7])
    a, b = run.optimizer.state_dict(), other.optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for name, x in a["state"][0].items():
        y = b["state"][0][name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_shape_is_fixed(line_search_fn):
    run = Run(LBFGS, *PROBLEMS["mlp"], history_size=7, line_search_fn=line_search_fn, max_iter=1)
    assert run.optimizer.state_dict()["state"] == {}
    n = run.x.numel()
    shapes = {
        "s": (7, n), "y": (7, n), "sy": (7, 7), "yy": (7, 7), "head": (), "count": (),
        "direction": (n,), "prev_grad": (n,), "start": (n,),
    }  # fmt: skip
    for _ in range(10):
        state = run.step().optimizer.state_dict()["state"][0]
        assert {k: tuple(x.shape) for k, x in state.items() if isinstance(x, torch.Tensor)} == shapes
        assert {k for k in state if k not in shapes} == {"func_evals", "n_iter", "t", "first_grad_max"}
    assert state["count"] == 7
    assert state["sy"].dtype is torch.float64


def test_loading_copies():
    run = Run(LBFGS, *PROBLEMS["mlp"], max_iter=3).step()
    saved = run.optimizer.state_dict()
    other = Run(LBFGS, *PROBLEMS["mlp"], max_iter=3)
    other.optimizer.load_state_dict(saved)
    before = copy.deepcopy(saved)
    other.step(3)
    for name, x in before["state"][0].items():
        assert not isinstance(x, torch.Tensor) or torch.equal(x, saved["state"][0][name])


def test_an_empty_state_starts_anew():
    run = Run(LBFGS, *PROBLEMS["mlp"])
    empty = run.optimizer.state_dict()
    run.step()
    run.optimizer.load_state_dict(empty)
    fresh = Run(LBFGS, run.loss, [p.detach() for p in run.params]).step(2)
    assert torch.equal(run.step(2).x, fresh.x)
    run.optimizer.state.clear()  # the common way of resetting an optimizer
    fresh = Run(LBFGS, run.loss, [p.detach() for p in run.params]).step()
    assert torch.equal(run.step().x, fresh.x)


def test_a_deep_copy_continues():
    run = Run(LBFGS, *PROBLEMS["mlp"], line_search_fn="strong_wolfe", max_iter=4).step(2)
    other = Run(LBFGS, *PROBLEMS["mlp"])
    other.params, other.optimizer = copy.deepcopy((run.params, run.optimizer))
    assert torch.equal(run.step(3).x, other.step(3).x)


def test_load_hooks_may_change_the_state():
    run = Run(LBFGS, *PROBLEMS["mlp"]).step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = Run(LBFGS, *PROBLEMS["mlp"])

    def forget(optimizer, state_dict):
        return {**state_dict, "state": {}}

    other.optimizer.register_load_state_dict_pre_hook(forget)
    other.optimizer.load_state_dict(saved)
    assert torch.equal(other.step().x, run.ends[0])


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "adam"])
def test_states_of_something_else(change):
    run = Run(LBFGS, *PROBLEMS["mlp"]).step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    state = saved["state"][0]
    message = r"LBFGS.load_state_dict: state\['s'\]: expected"
    if change == "missing":
        del state["s"]
        message = "LBFGS.load_state_dict: state: expected keys"
    elif change == "unknown":
        state["more"] = 1
        message = "LBFGS.load_state_dict: state: expected keys"
    elif change == "shape":
        state["s"] = state["s"][:, :-1]
    elif change == "dtype":
        state["s"] = state["s"].float()
    else:
        saved = Run(torch.optim.Adam, *PROBLEMS["mlp"]).step().optimizer.state_dict()
        message = "LBFGS.load_state_dict: state: expected keys"
    with pytest.raises(ValueError, match=message):
        Run(LBFGS, *PROBLEMS["mlp"]).optimizer.load_state_dict(saved)
