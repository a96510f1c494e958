"""Derivatives of the `hvp` family, its registered ops, and the public functions under torch.compile and torch.vmap."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from secant.ops import (
    cross_entropy_hvp,
    glm_hvp,
    glm_value_grad,
    gram,
    paired_matmul,
    softmax_hvp,
    softmax_value_grad,
)

F64 = torch.float64
LOSSES = ("squared", "logistic", "poisson", "huber", "gamma", "tweedie")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def real(*shape, grad=True):
    return torch.randn(shape, dtype=F64, requires_grad=grad)


def rows(n, grad=True):
    return torch.rand(n, dtype=F64, requires_grad=grad)


def test_glm_hvp():
    x, v, w = real(9, 4), real(5, 2), rows(9)

    def f(x, v, w):
        return glm_hvp(x, v, w, l2=0.3, intercept=True)

    assert gradcheck(f, (x, v, w), check_forward_ad=True)
    assert gradcheck(f, (x.detach(), v, w.detach()), check_forward_ad=True)  # the path of the kernel
    assert gradgradcheck(f, (x, v, w))


@pytest.mark.parametrize("loss", LOSSES)
def test_glm_value_grad(loss):
    x, t, coef, c = real(9, 4), rows(9), real(5), rows(9)
    fixed_x, fixed_t, fixed_c = x.detach(), t.detach(), c.detach()

    def f(coef, x=fixed_x, t=fixed_t, c=fixed_c):
        return glm_value_grad(x, t, coef, loss=loss, sample_weight=c, l2=0.3, delta=0.7, intercept=True)

    assert gradcheck(lambda coef: f(coef)[:2], coef)  # the path of the kernel
    assert gradgradcheck(lambda coef: f(coef)[0], coef)
    assert gradcheck(f, (coef, x, t, c), check_forward_ad=True)
    at = coef.detach()
    torch.testing.assert_close(torch.func.grad(lambda b: f(b)[0])(at), f(at)[1])
    product = torch.vmap(lambda v: glm_hvp(x.detach(), v, f(at)[2], l2=0.3, intercept=True))(torch.eye(5, dtype=F64))
    torch.testing.assert_close(torch.func.hessian(lambda b: f(b)[0])(at), product)
    torch.testing.assert_close(torch.func.jacfwd(lambda b: f(b)[1])(at), product)


def test_the_weights_count_as_constants():
    coef = real(4)
    weight = glm_value_grad(real(9, 4, grad=False), rows(9, grad=False), coef, loss="poisson")[2]
    assert not weight.requires_grad


def test_softmax():
    x, coef, c, y = real(9, 4), real(5, 3), rows(9), torch.randint(3, (9,))
    fixed_x, fixed_c = x.detach(), c.detach()

    def f(coef, x=fixed_x, c=fixed_c):
        return softmax_value_grad(x, y, coef, sample_weight=c, l2=0.3, intercept=True)

    assert gradcheck(lambda coef: f(coef)[:2], coef)
    assert gradgradcheck(lambda coef: f(coef)[0], coef)
    assert gradcheck(f, (coef, x, c), check_forward_ad=True)
    fixed_probs, v = f(coef.detach())[2], real(5, 3)
    probs = fixed_probs.clone().requires_grad_()

    def product(v, x=fixed_x, probs=fixed_probs, c=fixed_c):
        return softmax_hvp(x, v, probs, sample_weight=c, l2=0.3, intercept=True)

    assert gradcheck(product, (v,), check_forward_ad=True)
    assert gradcheck(product, (v, x, probs, c), check_forward_ad=True)
    batch = torch.randn(4, 5, 3, dtype=F64)
    torch.testing.assert_close(torch.vmap(product)(batch), torch.stack([product(v) for v in batch]))


def test_sparse_rows():
    """By the vectors, in both modes; torch has no forward mode for products of sparse matrices."""
    x, w, c, y = real(9, 4, grad=False), rows(9), rows(9, grad=False), torch.randint(3, (9,))
    x = torch.where(x > 0, x, 0).to_sparse_csr()
    v, coef, fixed_w = real(5, 3), real(5), w.detach()
    assert gradcheck(lambda v: glm_hvp(x, v, fixed_w, l2=0.3, intercept=True), v, check_forward_ad=True)
    assert gradcheck(lambda v, w: glm_hvp(x, v, w, l2=0.3, intercept=True), (v, w))

    def value_grad(coef):
        return glm_value_grad(x, fixed_w, coef, loss="logistic", sample_weight=c, l2=0.3, intercept=True)

    def softmax_of(v):
        return softmax_value_grad(x, y, v, sample_weight=c, l2=0.3, intercept=True)

    for f, at in ((value_grad, coef), (softmax_of, v)):
        assert gradcheck(lambda at, f=f: f(at)[:2], at)
        assert gradgradcheck(lambda at, f=f: f(at)[0], at)
    fixed_probs = softmax_of(v.detach())[2]
    probs = fixed_probs.clone().requires_grad_()

    def product(v, probs=fixed_probs):
        return softmax_hvp(x, v, probs, sample_weight=c, l2=0.3, intercept=True)

    assert gradcheck(product, v, check_forward_ad=True)
    assert gradcheck(product, (v, probs))
    batch = torch.randn(4, 5, 3, dtype=F64)
    torch.testing.assert_close(torch.vmap(product)(batch), torch.stack([product(v) for v in batch]))


def test_cross_entropy_hvp():
    logits, u = real(3, 5), real(3, 5)
    assert gradcheck(cross_entropy_hvp, (logits, u), check_forward_ad=True)
    fixed = logits.detach()
    assert gradcheck(lambda u: cross_entropy_hvp(fixed, u, lse=fixed.logsumexp(-1)), (u,), check_forward_ad=True)
    assert gradcheck(lambda z: cross_entropy_hvp(z, u.detach(), lse=z.logsumexp(-1)), (logits,))
    batch = torch.randn(4, 3, 5, dtype=F64)
    products = torch.vmap(lambda u: cross_entropy_hvp(fixed, u))(batch)
    torch.testing.assert_close(products, torch.stack([cross_entropy_hvp(fixed, u) for u in batch]))


def test_paired_matmul():
    args = [real(3, 4), real(4, 2), real(3, 5), real(5, 2), real(2), real(3, 2), real(3, 2), real(3, 2)]

    def f(a, b, c, e, bias, scale, p, q):
        return paired_matmul(a, b, c, e, bias=bias, scale=scale, p=p, q=q)

    assert gradcheck(f, args, check_forward_ad=True)
    with torch.no_grad():
        torch.testing.assert_close(
            f(*args), args[5] * (args[0] @ args[1] + args[2] @ args[3] + args[4]) + args[6] * args[7]
        )


def test_gram():
    x, w = real(5, 3), (rows(5, grad=False) - 0.5).requires_grad_()

    def weighted(x, w):
        return gram(x, weight=w)

    assert gradcheck(gram, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(weighted, (x, w), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(weighted, (x, w))
    assert torch.equal(gram(x), gram(x.detach()))  # the kernel's bits, also where autograd looks on
    batch, fixed = torch.randn(4, 5, 3, dtype=F64), w.detach()
    expected = torch.stack([gram(z, weight=fixed) for z in batch])
    assert torch.equal(torch.vmap(weighted, (0, None))(batch, fixed), expected)


def test_gram_is_differentiated_through_what_it_was_added_to():
    x, out = real(5, 3), torch.randn(3, 3, dtype=F64)
    before = out.clone()
    gram(x, out=out, accumulate=True)
    assert torch.equal(out, out.mT)
    torch.testing.assert_close(out.tril(), (before + x.mT @ x).tril())
    out.sum().backward()
    torch.testing.assert_close(x.grad, x.detach() @ torch.full((3, 3), 2.0, dtype=F64))


def test_a_batch_of_vectors_is_one_call(monkeypatch):
    from secant.ops import _hvp_dispatch

    calls = []
    launch = _hvp_dispatch.call
    monkeypatch.setattr(_hvp_dispatch, "call", lambda name, *args: (calls.append(name), launch(name, *args)))
    x, w, batch = real(9, 4, grad=False), rows(9, grad=False), torch.randn(6, 4, dtype=F64)
    product = torch.vmap(lambda v: glm_hvp(x, v, w))(batch)
    assert calls == ["glm_hvp"]
    torch.testing.assert_close(product, torch.stack([glm_hvp(x, v, w) for v in batch]))


X, W, Y = torch.randn(9, 4), torch.rand(9), torch.randint(3, (9,))
COMPILED = {
    "glm_hvp": lambda v: glm_hvp(X, v, W, l2=0.1),
    "glm_hvp, one vector": lambda v: glm_hvp(X, v[:, 0], W),
    "glm_value_grad": lambda v: glm_value_grad(X, W, v[:, 0], loss="logistic"),
    "softmax_hvp": lambda v: softmax_hvp(X, v, torch.softmax(X[:, :3], -1)),
    "softmax_value_grad": lambda v: softmax_value_grad(X, Y, v),
    "cross_entropy_hvp": lambda v: cross_entropy_hvp(v, v * v),
    "cross_entropy_hvp, lse": lambda v: cross_entropy_hvp(v, v * v, lse=v.logsumexp(-1)),
    "gram": lambda v: gram(v, weight=W[:4]),
    "paired_matmul": lambda v: paired_matmul(X, v, scale=W[:, None].expand(9, 3)),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_compiles_in_one_graph(name, turned):
    f, v = COMPILED[name], torch.randn(4, 3)
    if turned:
        v = v.mT.contiguous().mT
    torch.compiler.reset()

    def g(v):
        result = f(v * 2)
        return tuple(x + 0 for x in (result if isinstance(result, tuple) else (result,)))

    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(v), g(v), strict=True):
        assert torch.equal(x, y)


def test_sparse_rows_stay_outside_of_compiled_graphs():
    x = torch.where(X > 0, X, 0).to_sparse_csr()

    def f(v):
        return softmax_value_grad(x, Y, v * 2)[1] + glm_hvp(x, v, W)

    v = torch.randn(4, 3)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(f, backend="aot_eager")(v), f(v))


def test_the_backward_pass_compiles():
    def f(v):
        return (glm_hvp(X, v, W) ** 2).sum() + (softmax_hvp(X, v, torch.softmax(X[:, :3], -1)) ** 2).sum()

    v = torch.randn(4, 3)
    a, b = v.clone().requires_grad_(), v.clone().requires_grad_()
    torch.compiler.reset()
    torch.compile(f, fullgraph=True, backend="aot_eager")(a).backward()
    f(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


OPS = torch.ops.secant
E4 = torch.empty(4, 3)
VALUE = torch.empty((), dtype=F64)
OPCHECKS = {
    "glm_hvp": (X, torch.randn(4, 3), W, 0.1, E4),
    "glm_value_grad": (
        X,
        W,
        torch.randn(4),
        "huber",
        1.0,
        W,
        0.1,
        torch.empty((), dtype=F64),
        E4[:, 0].clone(),
        W.clone(),
    ),
    "softmax_hvp": (X, torch.randn(4, 3), torch.softmax(X[:, :3], -1), None, 0.1, E4),
    "softmax_value_grad": (X, Y, torch.randn(4, 3), None, 0.1, VALUE, E4, torch.empty(9, 3)),
    "cross_entropy_hvp": (X, X * 2, None, torch.empty(9, 4)),
    "gram": (X, W, True, torch.zeros(4, 4)),
    "paired_matmul": (X, torch.randn(4, 3), None, None, torch.randn(3), None, None, None, torch.empty(9, 3)),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, OPCHECKS[name])
