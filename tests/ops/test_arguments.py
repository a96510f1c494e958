"""Arguments that no kernel may see, in every place of every public function: one form of error, nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import secant
from secant.ops import (
    block_abs_inv,
    block_eigh,
    block_inv,
    block_inv_root,
    block_solve,
    cross_entropy_hvp,
    glm_hvp,
    glm_value_grad,
    gram,
    paired_matmul,
    softmax_hvp,
    softmax_value_grad,
    two_loop,
)

torch.manual_seed(0)
grad, s = torch.randn(5), torch.randn(3, 5)
x, v, w = torch.randn(6, 4), torch.randn(4), torch.rand(6)
a, b = torch.eye(2) + torch.zeros(3, 2, 2), torch.randn(3, 2)
coef, probs, classes = torch.randn(4, 3), torch.full((6, 3), 1 / 3), torch.randint(3, (6,))
logits = torch.randn(5, 7)


def step(t):
    return secant.LBFGSHistory(5, 3).step(grad.clone(), grad.clone(), grad.clone(), t)


# name -> function of a number that must be > 0 or >= 0
NUMBERS = {
    "two_loop: gamma": lambda z: two_loop(grad, s, s, gamma=z),
    "block_inv: damping": lambda z: block_inv(a, damping=z),
    "block_solve: damping": lambda z: block_solve(a, b, damping=("scale", z)),
    "block_inv_root: damping": lambda z: block_inv_root(a, 2, damping=z),
    "block_inv_root: p": lambda z: block_inv_root(a, z),
    "block_abs_inv: floor": lambda z: block_abs_inv(a, floor=z),
    "glm_hvp: l2": lambda z: glm_hvp(x, v, w, l2=z),
    "glm_value_grad: l2": lambda z: glm_value_grad(x, w, v, loss="logistic", l2=z),
    "glm_value_grad: delta": lambda z: glm_value_grad(x, w, v, loss="huber", delta=z),
    "glm_value_grad: loss": lambda z: glm_value_grad(x, w, v, loss=z),
    "softmax_hvp: l2": lambda z: softmax_hvp(x, coef, probs, l2=z),
    "softmax_value_grad: l2": lambda z: softmax_value_grad(x, classes, coef, l2=z),
    "LBFGSHistory: n": lambda z: secant.LBFGSHistory(z, 3),
    "LBFGSHistory: history_size": lambda z: secant.LBFGSHistory(5, z),
    "LBFGSHistory: batch": lambda z: secant.LBFGSHistory(5, 3, batch=z),
    "LBFGSHistory: curvature_tol": lambda z: secant.LBFGSHistory(5, 3, curvature_tol=z),
}
BAD = {
    "beyond float": 10**400,
    "beyond print": 10**5000,
    "fraction beyond float": Fraction(10**400),
    "text": "a",
    "bool": True,
    "numpy bool": np.bool_(True),
    "complex": 1j,
    "list": [1.0],
    "nan": float("nan"),
    "negative": -1.0,
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_named(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected .*, got"):
        NUMBERS[name](value)


@pytest.mark.parametrize("value", [10**400, "a", True, [1.0], None, torch.tensor(1.0)], ids=str)
def test_the_step_length_of_a_history(value):
    with pytest.raises(ValueError, match=r"step: t: expected a number or a float64 tensor.*, got"):
        step(value)


def test_a_step_length_that_is_not_finite_is_a_refused_pair():
    assert all(step(t).accepted == 0.0 for t in (float("nan"), float("inf")))


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=lambda z: type(z).__name__
)
def test_every_real_number_is_one(value):
    assert torch.equal(glm_hvp(x, v, w, l2=value), glm_hvp(x, v, w, l2=0.5))
    assert torch.equal(block_inv(a, damping=value)[0], block_inv(a, damping=0.5)[0])
    assert torch.equal(two_loop(grad, s, s, gamma=value), two_loop(grad, s, s, gamma=0.5))
    assert secant.LBFGSHistory(np.int64(5), np.int32(3)).s.shape == (3, 5)


def no_memory(x):
    return x.to("meta")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
    _nested = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)])
    _jagged = torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged)

CALLS = {
    "two_loop: grad": lambda f: two_loop(f(grad), s, s),
    "two_loop: s": lambda f: two_loop(grad, f(s), s),
    "two_loop: out": lambda f: two_loop(grad, s, s, out=f(grad)),
    "block_inv: a": lambda f: block_inv(f(a)),
    "block_inv: damping": lambda f: block_inv(a, damping=f(w[:3])),
    "block_inv: out": lambda f: block_inv(a, out=f(a)),
    "block_solve: b": lambda f: block_solve(a, f(b)),
    "block_eigh: a": lambda f: block_eigh(f(a)),
    "block_inv_root: a": lambda f: block_inv_root(f(a), 2),
    "block_abs_inv: floor": lambda f: block_abs_inv(a, floor=f(w[:3])),
    "glm_hvp: x": lambda f: glm_hvp(f(x), v, w),
    "glm_hvp: v": lambda f: glm_hvp(x, f(v), w),
    "glm_value_grad: x": lambda f: glm_value_grad(f(x), f(w), f(v), loss="logistic"),
    "glm_value_grad: target": lambda f: glm_value_grad(x, f(w), v, loss="logistic"),
    "glm_value_grad: coef": lambda f: glm_value_grad(x, w, f(v), loss="logistic"),
    "softmax_hvp: probs": lambda f: softmax_hvp(x, coef, f(probs)),
    "softmax_value_grad: target": lambda f: softmax_value_grad(x, f(classes), coef),
    "cross_entropy_hvp: logits": lambda f: cross_entropy_hvp(f(logits), f(logits)),
    "gram: x": lambda f: gram(f(x)),
    "gram: weight": lambda f: gram(x, weight=f(w)),
    "paired_matmul: a": lambda f: paired_matmul(f(x), coef),
    "direction: grad": lambda f: secant.LBFGSHistory(5, 3).direction(f(grad)),
    "append: s": lambda f: secant.LBFGSHistory(5, 3).append(f(grad), grad),
    "step: direction": lambda f: secant.LBFGSHistory(5, 3).step(grad, grad.clone(), f(grad), 1.0),
}


@pytest.mark.parametrize("kind", [no_memory, lambda x: _nested, lambda x: _jagged], ids=["meta", "nested", "jagged"])
@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_memory_of_their_own_are_named(name, kind):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected .*, got"):
        CALLS[name](kind)


def test_a_history_has_a_device_with_memory():
    with pytest.raises(ValueError, match="LBFGSHistory: device: expected a device with memory, got meta"):
        secant.LBFGSHistory(5, 3, device="meta")


@pytest.mark.parametrize(("value", "name"), [("", "auto"), ("reference", "reference")])
def test_a_backend_set_to_nothing_is_not_set(value, name, monkeypatch):
    monkeypatch.setenv("SECANT_BACKEND", value)
    code = "import secant.backends; print(secant.backends.current_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name


STATES = [("head", 3), ("head", -1), ("head", 2**31 - 1), ("count", 4), ("count", -1), ("count", -(2**31))]


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("key", "value"), STATES)
def test_places_in_the_ring_are_checked_when_a_state_is_loaded(key, value, batch):
    shape = (5,) if batch is None else (batch, 5)
    history = secant.LBFGSHistory(5, 3, batch=batch)
    history.append(torch.ones(shape), torch.ones(shape))
    before = {name: t.clone() for name, t in history.state_dict().items()}
    state = {name: torch.full_like(t, 2) for name, t in before.items()}
    state[key].view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"state\['{key}'\]: expected numbers in 0..\d, got values in"):
        history.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in history.state_dict().items())


def negated(x):
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def test_negated_views_are_read_as_what_they_stand_for_wherever_they_come_in():
    lam = torch.tensor([0.1, 0.2, 0.3])
    h, other = secant.LBFGSHistory(5, 3, batch=3), secant.LBFGSHistory(5, 3, batch=3)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    g = torch.randn(3, 5)
    for history, length in ((h, t), (other, negated(t))):
        history.step(g, torch.zeros(3, 5), torch.ones(3, 5), length)
    assert torch.equal(h.stats_tensor, other.stats_tensor)
    calls = [
        lambda f: block_inv(a, damping=f(lam)),
        lambda f: block_solve(f(a), f(b), damping=("scale", f(lam))),
        lambda f: block_inv_root(a, 2, damping=f(lam)),
        lambda f: block_abs_inv(a, floor=f(lam)),
        lambda f: glm_hvp(f(x), f(v), f(w)),
        lambda f: glm_value_grad(f(x), f(w), f(v), loss="logistic", sample_weight=f(w)),
        lambda f: softmax_hvp(f(x), f(coef), f(probs), sample_weight=f(w)),
        lambda f: softmax_value_grad(f(x), classes, f(coef), sample_weight=f(w)),
        lambda f: cross_entropy_hvp(f(logits), f(logits), lse=f(torch.logsumexp(logits, -1))),
        lambda f: gram(f(x), weight=f(w)),
        lambda f: paired_matmul(f(x), f(coef), bias=f(torch.ones(3))),
        lambda f: two_loop(f(grad), f(s), f(s)),
    ]
    for call in calls:
        plain, turned = call(lambda z: z), call(negated)
        for x1, x2 in zip(*[r if isinstance(r, tuple) else (r,) for r in (plain, turned)], strict=True):
            torch.testing.assert_close(x1, x2, rtol=1e-6, atol=1e-7)
