"""Gradients that torch.autograd batches by itself, with tensors that are older than torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

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


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


torch.manual_seed(0)
a = random(2, 3, 3)
a = a @ a.mT + torch.eye(3)
b, lam = random(2, 3), torch.rand(2, dtype=torch.float64)
s = random(3, 5)
y = 2 * s + 0.1 * random(3, 5)
x, v, w = random(6, 4), random(4), torch.rand(6, dtype=torch.float64)
target, classes = (w > 0.5).double(), torch.randint(3, (6,))
coef, probs = random(4, 3), torch.softmax(random(6, 3), -1)
logits, u = random(5, 7), random(5, 7)


def value_and_grad(c: Tensor) -> Tensor:
    value, grad, _ = glm_value_grad(x, target, c, loss="logistic", l2=0.1)
    return torch.cat((value[None], grad))


FUNCTIONS = {
    "two_loop": (lambda g: two_loop(g, s, y), random(5)),
    "two_loop, batch": (lambda g: two_loop(g, s.expand(2, 3, 5), y.expand(2, 3, 5)), random(2, 5)),
    "block_inv": (lambda a: block_inv(symmetric(a))[0], a),
    "block_inv, general": (lambda a: block_inv(a, assume="general")[0], a),
    "block_solve by a": (lambda a: block_solve(symmetric(a), b)[0], a),
    "block_solve by b": (lambda b: block_solve(a, b)[0], b),
    "block_solve by damping": (lambda lam: block_solve(a, b, damping=lam)[0], lam),
    "block_eigh": (lambda a: block_eigh(symmetric(a))[0], a),
    "block_abs_inv": (lambda a: block_abs_inv(symmetric(a), floor=0.1)[0], a),
    "block_inv_root": (lambda a: block_inv_root(symmetric(a), 4, damping=0.1)[0], a),
    "glm_hvp by v": (lambda v: glm_hvp(x, v, w, l2=0.3), v),
    "glm_hvp by columns": (lambda v: glm_hvp(x, v, w, l2=0.3), coef),
    "glm_hvp by weight": (lambda w: glm_hvp(x, v, w), w),
    "glm_hvp by x": (lambda x: glm_hvp(x, v, w), x),
    "glm_value_grad": (value_and_grad, v),
    "softmax_hvp": (lambda v: softmax_hvp(x, v, probs), coef),
    "softmax_value_grad": (lambda c: softmax_value_grad(x, classes, c)[1], coef),
    "cross_entropy_hvp by u": (lambda u: cross_entropy_hvp(logits, u), u),
    "cross_entropy_hvp by logits": (lambda logits: cross_entropy_hvp(logits, u), logits),
    "gram": (lambda x: gram(x, weight=w), x),
    "gram by weight": (lambda w: gram(x, weight=w), w),
    "paired_matmul": (lambda a: paired_matmul(a, coef), random(5, 4)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians(name, strategy):
    function, at = FUNCTIONS[name]
    want = jacobian(function, at)
    torch.testing.assert_close(jacobian(function, at, vectorize=True, strategy=strategy), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectorized_hessians(name):
    function, at = FUNCTIONS[name]

    def scalar(z):
        return (function(z) ** 2).sum()

    torch.testing.assert_close(hessian(scalar, at, vectorize=True), hessian(scalar, at), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_gradients_agree_with_finite_differences_twice(name):
    function, at = FUNCTIONS[name]
    at = at.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        function, at, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(function, at, check_batched_grad=True, fast_mode=True)


def test_two_levels_of_batches():
    """two_loop is linear, so that its Jacobian is constant."""
    g = random(5).requires_grad_()
    want = jacobian(lambda g: two_loop(g, s, y), g.detach())
    d = two_loop(g, s, y)

    eye, scale = torch.eye(5, dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    vmap = torch._vmap_internals._vmap

    def row(e):
        return torch.autograd.grad(d, g, e, retain_graph=True)[0]

    def outer(c):
        return vmap(row, 0, 0)(eye), vmap(lambda e: row(c * e), 0, 0)(eye)

    one, scaled = vmap(outer, 0, 0)(scale)
    torch.testing.assert_close(one, want.expand(3, 5, 5), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(scaled, scale[:, None, None] * want, rtol=1e-12, atol=1e-14)


DIRECT = {name: FUNCTIONS[name] for name in FUNCTIONS if name not in ("glm_value_grad", "softmax_value_grad")}


@pytest.mark.parametrize("name", DIRECT)
def test_the_public_functions_take_such_batches_themselves(name):
    function, at = DIRECT[name]
    batch = torch.stack((at, 2 * at, 3 * at))
    want = torch.stack([function(z) for z in batch])
    torch.testing.assert_close(torch._vmap_internals._vmap(function, 0, 0)(batch), want, rtol=1e-11, atol=1e-13)
