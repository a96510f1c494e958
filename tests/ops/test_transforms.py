"""Every public op under torch.compile and the transforms of torch.func, together: what eager mode computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap

from secant import ops

F64 = torch.float64
_draw = torch.Generator().manual_seed(11)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_draw, dtype=F64)


S = randn(3, 5)
Y = 2 * S + 0.1 * randn(3, 5)
A = randn(2, 3, 3)
A = A @ A.mT + torch.eye(3, dtype=F64)
X, V, P = randn(9, 4), randn(4, 3), torch.softmax(randn(9, 3), -1)
W, T, C = randn(9).abs(), (randn(9) > 0).double(), torch.arange(9) % 3
L = randn(2, 4)
CUBE = (lambda w: w**3, lambda w: 3 * w**2, lambda w: 6 * w)

#: Of each op: a function of one tensor, and that tensor.
CASES = {
    "two_loop": (lambda g: ops.two_loop(g, S, Y), randn(5)),
    "two_loop, gamma": (lambda g: ops.two_loop(g, S, Y, gamma=0.5), randn(5)),
    "block_inv": (lambda a: ops.block_inv(a, damping=("scale", 0.1))[0], A),
    "block_inv, damping": (lambda lam: ops.block_inv(A, damping=lam)[0], randn(2).abs()),
    "block_solve": (lambda b: ops.block_solve(A, b, assume="general")[0], randn(2, 3)),
    "block_solve, matrix": (lambda a: ops.block_solve(a, L[:, :3])[0], A),
    "block_eigh": (lambda a: ops.block_eigh(a)[0], A),
    "block_abs_inv": (lambda a: ops.block_abs_inv(a, floor=0.1)[0], A - 2 * torch.eye(3, dtype=F64)),
    "block_inv_root": (lambda a: ops.block_inv_root(a, 4)[0], A),
    "block_function": (lambda a: ops.block_function(a, "exp")[0], A),
    "block_function, given": (lambda a: ops.block_function(a, CUBE)[0], A),
    "glm_hvp": (lambda v: ops.glm_hvp(X, v, W, l2=0.5), randn(4)),
    "glm_hvp, weight": (lambda w: ops.glm_hvp(X, V, w), W),
    "glm_value_grad": (lambda c: ops.glm_value_grad(X, T, c, loss="logistic")[0], randn(4)),
    "glm_value_grad, gradient": (lambda c: ops.glm_value_grad(X, T, c, loss="poisson", l2=1.0)[1], randn(4) / 4),
    "softmax_hvp": (lambda v: ops.softmax_hvp(X, v, P), V),
    "softmax_value_grad": (lambda c: ops.softmax_value_grad(X, C, c)[0], V),
    "cross_entropy_hvp": (lambda u: ops.cross_entropy_hvp(L, u), randn(2, 4)),
    "gram": (lambda x: ops.gram(x), X),
    "gram, weighted": (lambda x: ops.gram(x, weight=T - 0.3), X),
    "gram, weight": (lambda w: ops.gram(X, weight=w), W),
    "newton_schulz": (lambda x: ops.newton_schulz(x, 2), randn(2, 4, 3)),
    "newton_inv_root": (lambda a: ops.newton_inv_root(a, 4, damping=0.1)[0], A),
    "paired_matmul": (lambda a: ops.paired_matmul(a, V, bias=V[0]), X),
}


#: Through expressions of torch, of which torch itself cannot compile a batch of tangents: vmap(jvp) of X.mT @ w fails
#: ("Tensor device mismatch", 2.13 and 2.14).
WITHOUT_BATCHES_OF_TANGENTS = {"glm_hvp, weight", "softmax_value_grad"}


def test_every_op_is_there():
    public = {name for name in ops.__all__ if name[0].islower()}
    assert {name.partition(",")[0] for name in CASES} == public


def _score(f, x: Tensor) -> Tensor:
    y = f(x)
    return (y * torch.cos(torch.arange(y.numel(), dtype=F64)).view(y.shape)).sum() + (y**2).sum() / 7


def _transforms(f, x: Tensor, *, tangents: bool) -> tuple[Tensor, ...]:
    """Values, tangents, gradients, batches of each, and second derivatives by one mode over the other."""
    direction, batch = torch.ones_like(x), torch.stack((x, 1.25 * x))

    def slope(x: Tensor) -> Tensor:
        return jvp(f, (x,), (direction,))[1]

    def gradient(x: Tensor) -> Tensor:
        return grad(lambda x: _score(f, x))(x)

    results = [
        f(x),
        slope(x),
        gradient(x),
        vmap(f)(batch),
        vmap(gradient)(batch),
        jvp(gradient, (x,), (direction,))[1],
        jacfwd(lambda t: _score(f, x + t * direction))(torch.zeros((), dtype=F64)),
    ]
    return (*results, vmap(slope)(batch)) if tangents else tuple(results)


#: Of these the compiler takes most of a minute: a product after the other, each differentiated twice.
LONG = {"newton_inv_root"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LONG else ()) for x in CASES])
def test_transforms_inside_of_a_compiled_function(name):
    """torch drops the derivative of an autograd function that it compiles under one: none of ours may be zero."""
    f, x = CASES[name]
    tangents = name not in WITHOUT_BATCHES_OF_TANGENTS
    torch.compiler.reset()
    compiled = torch.compile(lambda x: _transforms(f, x, tangents=tangents), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), _transforms(f, x, tangents=tangents), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_eager_transforms_agree(name):
    """The directional derivative by jvp is that by grad, and that by a central difference."""
    f, x = CASES[name]
    direction = torch.ones_like(x)
    by_forward = jvp(lambda x: _score(f, x), (x,), (direction,))[1]
    by_reverse = (grad(lambda x: _score(f, x))(x) * direction).sum()
    h = 1e-5
    difference = (_score(f, x + h * direction) - _score(f, x - h * direction)) / (2 * h)
    scale = float(by_reverse.abs()) + float(_score(f, x).abs())
    torch.testing.assert_close(by_forward, by_reverse, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(by_forward, difference, rtol=1e-7, atol=1e-8 * scale)


@pytest.mark.parametrize("name", CASES)
def test_backward_of_a_compiled_function(name):
    f, x = CASES[name]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.compiler.reset()
    torch.compile(lambda x: _score(f, x), fullgraph=True, backend="aot_eager")(ours).backward()
    _score(f, theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12 * float(theirs.grad.abs().max()))
