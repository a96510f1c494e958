"""Derivatives of the `blocks` family: forward and reverse mode, twice, repeated eigenvalues, bad blocks, transforms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from block_examples import F64, general, indefinite, spd, tolerance, vectors
from secant.ops import block_abs_inv, block_eigh, block_inv, block_inv_root, block_solve


def symmetrised(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """f of (A + A^T) / 2: a function that reads one triangle has a derivative along symmetric matrices only."""
    return lambda a, *others: f((a + a.mT) / 2, *others)


def matrix_exponential(a: Tensor) -> Tensor:
    """exp(A / 4), a function of eigenvectors that does not depend on their signs."""
    w, v, _ = block_eigh(a)
    return (v * (w / 4).exp()[..., None, :]) @ v.mT


def upper_projector(a: Tensor) -> Tensor:
    """The orthogonal projector onto the eigenvectors of the two largest eigenvalues."""
    v = block_eigh(a)[1][..., -2:]
    return v @ v.mT


def check(f: Callable[..., Tensor], *inputs: Tensor) -> None:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


lam = vectors(2).abs()
damped = pytest.mark.parametrize("scaled", [False, True], ids=["shift", "scale"])


def test_inverse():
    check(symmetrised(lambda a: block_inv(a)[0]), spd(2))
    check(lambda a: block_inv(a, assume="general")[0], general(2))
    assert gradcheck(lambda a: block_inv(a, assume="general")[0], general(2).requires_grad_(), check_forward_ad=True)


@damped
def test_damped_inverse(scaled):
    def damping(x):
        return ("scale", x) if scaled else x

    check(symmetrised(lambda a, d: block_inv(a, damping=damping(d))[0]), spd(2), lam)
    check(lambda a, d: block_inv(a, damping=damping(d), assume="general")[0], general(2), lam)
    check(symmetrised(lambda a: block_inv(a, damping=damping(0.5))[0]), spd(2))
    check(
        lambda d: block_inv(spd(2, 3), damping=damping(d))[0], vectors(1, 3).abs()
    )  # broadcast: the gradient is summed


@damped
def test_solve(scaled):
    def damping(x):
        return ("scale", x) if scaled else x

    for b in (vectors(2, 3, 2), vectors(3)):
        check(symmetrised(lambda a, d, b: block_solve(a, b, damping=damping(d))[0]), spd(2), lam, b)
        check(lambda a, d, b: block_solve(a, b, damping=damping(d), assume="general")[0], general(2), lam, b)
    check(lambda b: block_solve(spd(2), b, damping=damping(0.5))[0], vectors(2, 3))
    check(lambda a: block_solve(a, vectors(2, 3), assume="general")[0], general(2))


def test_solve_of_what_the_flag_says():
    """One matrix for as many blocks as it has rows, and vectors that broadcast."""
    a, b = spd(3), vectors(3, 3)
    for flag, blocks in ((False, a), (True, spd(2, 1)), (True, a)):
        check(symmetrised(lambda a, b, v=flag: block_solve(a, b, vector=v)[0]), blocks, b)
    one = torch.func.vmap(lambda a: block_solve(a, b, vector=False)[0])(spd(2, 3))
    torch.testing.assert_close(one, block_solve(spd(2, 3), b, vector=False)[0], rtol=1e-13, atol=1e-13)
    shared = torch.func.vmap(lambda b: block_solve(a, b, vector=True)[0], in_dims=1)(vectors(3, 4, 3))
    torch.testing.assert_close(
        shared,
        torch.stack([block_solve(a, x, vector=True)[0] for x in vectors(3, 4, 3).unbind(1)]),
        rtol=1e-13,
        atol=1e-13,
    )


def test_eigenvalues_and_functions_of_eigenvectors():
    check(symmetrised(lambda a: block_eigh(a)[0]), indefinite(2))
    check(symmetrised(matrix_exponential), indefinite(2))
    assert gradcheck(
        symmetrised(lambda a: block_eigh(a)[1].abs()), indefinite(2).requires_grad_(), check_forward_ad=True
    )


@damped
@pytest.mark.parametrize("p", [1, 2, 4])
def test_inverse_roots(p, scaled):
    def damping(x):
        return ("scale", x) if scaled else x

    check(symmetrised(lambda a, d: block_inv_root(a, p, damping=damping(d))[0]), spd(2), lam)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_clamped_inverse_roots(p):
    """Of blocks with a negative eigenvalue, in the block and in eps; and of a float32 block as eager calls give it."""

    def root(a, eps):
        return block_inv_root(a, p, damping=("max", eps))[0]

    check(symmetrised(root), indefinite(2), torch.tensor([0.3, 0.1], dtype=F64))
    a = indefinite(3, dtype=torch.float32)
    eager, transformed = root(a, 0.1), torch.func.vmap(lambda a: root(a, 0.1))(a)
    # 30 n eps ||A||_1 of the eigenvalues, ||A||_1 < 3 * 2, times the slope 1 / (p u^(1 + 1/p)), u > 0.1.
    torch.testing.assert_close(eager, transformed, rtol=0, atol=30 * 3 * 1.2e-7 * 6 * 100)


def test_clamped_inverse_roots_of_what_has_no_positive_eigenvalue():
    """Zeros, and no gradient; and codes, as in eager calls."""
    a = torch.stack([torch.zeros(3, 3), -torch.eye(3), torch.eye(3), torch.full((3, 3), math.nan)]).requires_grad_()
    eps = torch.tensor([0.5, 0.5, math.nan, 0.5])
    x, info = block_inv_root(a, 2, damping=("max", eps))
    assert info.tolist() == block_inv_root(a.detach(), 2, damping=("max", eps))[1].tolist() == [0, 3, -2, -1]
    assert not x[:2].any()
    assert x[2:].isnan().all()
    (g,) = torch.autograd.grad(x[:2].sum(), a)
    assert not g[:2].any()


def test_absolute_inverse():
    for floor in (0.1, 1.0, torch.tensor([0.1, 2.0], dtype=F64)):
        check(symmetrised(lambda a, f=floor: block_abs_inv(a, floor=f)[0]), indefinite(2, n=4))


@pytest.mark.parametrize(
    ("values", "rotated"),
    [
        pytest.param((1.0, 1.0, 1.0, 1.0), False, id="identity"),
        pytest.param((2.0, 2.0, 0.5, 0.5), True, id="pairs"),
        pytest.param((3.0, 1.0, 1.0, 1.0 + 1e-13), True, id="nearly"),
    ],
)
def test_repeated_eigenvalues(values, rotated):
    """Divided differences: the limit is as smooth as the function, where the gaps themselves would divide by zero."""
    q = torch.linalg.qr(vectors(4, 4))[0] if rotated else torch.eye(4, dtype=F64)
    a = (q * torch.tensor(values, dtype=F64)) @ q.mT
    a = ((a + a.mT) / 2)[None]
    for p in (1, 2, 4):
        check(symmetrised(lambda a, p=p: block_inv_root(a, p)[0]), a)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
    mixed = (q * (signs * torch.tensor(values, dtype=F64))) @ q.mT
    for other in (a, (mixed + mixed.mT) / 2):
        for floor in (0.7, 5.0):
            check(symmetrised(lambda a, f=floor: block_abs_inv(a, floor=f)[0]), other)


def test_eigenvectors_of_repeated_eigenvalues():
    """They have no derivative, and say so with NaN. Eigenvalues have one, and so have vectors of distinct ones."""
    q = torch.linalg.qr(vectors(4, 4))[0]
    pairs = (q * torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=F64)) @ q.mT
    for a in ((pairs + pairs.mT) / 2, torch.diag(torch.tensor([0.5, 0.5, 2.0, 2.0], dtype=F64))):
        (one,) = torch.autograd.grad(block_eigh(x := a.clone().requires_grad_())[0].exp().sum(), x)
        torch.testing.assert_close(one, torch.linalg.matrix_exp(a), rtol=1e-12, atol=1e-12)  # d tr exp(A)
        for f in (upper_projector, matrix_exponential):
            (one,) = torch.autograd.grad(f(x := a.clone().requires_grad_()).sum(), x)
            assert one.isnan().any()
            assert torch.func.jvp(f, (a,), (vectors(4, 4),))[1].isnan().any()
    distinct = (q * torch.tensor([0.25, 0.5, 2.0, 3.0], dtype=F64)) @ q.mT
    assert gradcheck(
        symmetrised(upper_projector), ((distinct + distinct.mT) / 2).requires_grad_(), check_forward_ad=True
    )


def test_against_the_derivatives_of_torch():
    a, b = spd(5, n=6), vectors(5, 6, 2)
    g = vectors(5, 6, 6, seed=3)
    for ours, theirs in (
        (lambda a: (block_inv(a)[0] * g).sum(), lambda a: (torch.cholesky_inverse(torch.linalg.cholesky(a)) * g).sum()),
        (lambda a: (block_inv(a, assume="general")[0] * g).sum(), lambda a: (torch.linalg.inv(a) * g).sum()),
        (
            lambda a: (block_solve(a, b, assume="general")[0] ** 2).sum(),
            lambda a: (torch.linalg.solve(a, b) ** 2).sum(),
        ),
        (lambda a: (block_eigh(a)[0] ** 3).sum(), lambda a: (torch.linalg.eigh(a)[0] ** 3).sum()),
        (
            lambda a: (matrix_exponential(a) * g).sum(),
            lambda a: (lambda w, v: ((v * (w / 4).exp()[..., None, :]) @ v.mT * g).sum())(*torch.linalg.eigh(a)),
        ),
    ):
        one = torch.autograd.grad(ours(x := a.clone().requires_grad_()), x)[0]
        two = torch.autograd.grad(theirs(y := a.clone().requires_grad_()), y)[0]
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(two.abs().max()))
    # For spd the gradient is the symmetric one, as that of torch.linalg.cholesky.
    one = torch.autograd.grad((block_solve(x := a.clone().requires_grad_(), b)[0] * b.roll(1)).sum(), x)[0]
    two = torch.autograd.grad(
        (torch.cholesky_solve(b, torch.linalg.cholesky(y := a.clone().requires_grad_())) * b.roll(1)).sum(), y
    )[0]
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert torch.equal(one, one.mT)


FUNCTIONS = {
    "inv": lambda a: block_inv(a, damping=0.1)[0],
    "inv, general": lambda a: block_inv(a, assume="general")[0],
    "solve": lambda a: block_solve(a, torch.ones(a.shape[:-1], dtype=a.dtype))[0],
    "solve, general": lambda a: block_solve(a, torch.ones(*a.shape[:-1], 2, dtype=a.dtype), assume="general")[0],
    "eigenvalues": lambda a: block_eigh(a)[0],
    "exponential": matrix_exponential,
    "abs_inv": lambda a: block_abs_inv(a, floor=2.0)[0],
    "inv_root": lambda a: block_inv_root(a, 4)[0],
}
every = pytest.mark.parametrize("name", FUNCTIONS)


@every
def test_a_bad_block_spoils_its_own_gradient_alone(name):
    f = FUNCTIONS[name]
    good = spd(4)
    a = good.clone()
    a[1, 2, 0] = a[1, 0, 2] = math.nan
    for x, y in ((a, good),):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        out, clean = f(x), f(y)
        g = vectors(*out.shape, seed=5)
        (one,), (two,) = torch.autograd.grad(out, x, g), torch.autograd.grad(clean, y, g)
        assert one[1].isnan().all()
        torch.testing.assert_close(one[[0, 2, 3]], two[[0, 2, 3]], rtol=1e-12, atol=1e-12)
        _, tangent = torch.func.jvp(f, (a,), (good,))
        _, want = torch.func.jvp(f, (good,), (good,))
        assert tangent[1].isnan().all()
        torch.testing.assert_close(tangent[[0, 2, 3]], want[[0, 2, 3]], rtol=1e-12, atol=1e-12)


@every
def test_transforms(name):
    f = FUNCTIONS[name]
    a = spd(2, 3)
    each = torch.stack([f(x) for x in a])
    torch.testing.assert_close(torch.func.vmap(f)(a), each, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.vmap(f, in_dims=1)(a).transpose(0, 1), each, rtol=1e-12, atol=1e-12)

    def g(x):
        return f((x + x.mT) / 2)

    forward, reverse = torch.func.jacfwd(g)(a[0, 0]), torch.func.jacrev(g)(a[0, 0])
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10)
    second = torch.func.jacfwd(torch.func.jacrev(g))(a[0, 0])
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(g))(a[0, 0]), second, rtol=1e-9, atol=1e-9)


def test_vmap_over_one_argument():
    a, b, d = spd(4), vectors(5, 4, 3), vectors(5, 4).abs()
    x = torch.func.vmap(lambda b: block_solve(a, b)[0])(b)
    torch.testing.assert_close(x, block_solve(a.expand(5, 4, 3, 3), b)[0], rtol=1e-13, atol=1e-13)
    x, info = torch.func.vmap(lambda d: block_inv(a, damping=d))(d)
    torch.testing.assert_close(x, block_inv(a.expand(5, 4, 3, 3), damping=d)[0], rtol=1e-13, atol=1e-13)
    assert info.shape == (5, 4)
    x, _ = torch.func.vmap(lambda f: block_abs_inv(a, floor=f))(d + 1)
    torch.testing.assert_close(x, block_abs_inv(a.expand(5, 4, 3, 3), floor=d + 1)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every
def test_lower_precision(name, dtype):
    """Differentiated in float32: the gradient errs by the rounding of the blocks and of itself."""
    f = FUNCTIONS[name]
    a = spd(3).to(dtype).requires_grad_()
    exact = a.detach().double().requires_grad_()
    out, want = f(a), f(exact)
    assert out.dtype is dtype
    g = vectors(*out.shape, seed=5).to(dtype)
    (one,), (two,) = torch.autograd.grad(out, a, g), torch.autograd.grad(want, exact, g.double())
    assert one.dtype is dtype
    # Two inverses of condition 10 each in float32 (the exponential amplifies by its own condition, 10), one rounding.
    eps = 100 * tolerance(3, torch.float32)["atol"] + 2 * torch.finfo(dtype).eps
    assert (one.double() - two).norm() <= eps * two.norm()


def test_results_do_not_depend_on_whether_they_are_differentiated():
    a = spd(5, n=4, dtype=torch.bfloat16)
    for f in FUNCTIONS.values():
        with torch.no_grad():
            want = f(a)
        if f is not matrix_exponential:
            assert torch.equal(f(a.clone().requires_grad_()).detach(), want)


def test_codes_carry_no_gradient():
    a = spd(2).requires_grad_()
    for result in (block_inv(a), block_solve(a, a), block_eigh(a), block_abs_inv(a, floor=1.0), block_inv_root(a, 2)):
        assert not result[-1].requires_grad
        assert all(x.requires_grad for x in result[:-1])


def test_the_kernels_run_once_in_the_forward_pass_and_once_for_a_backward_solve(monkeypatch):
    """What the derivatives keep: X for the inverse, nothing but A and x for the solve."""
    from secant.ops import _blocks_dispatch as dispatch

    calls = []
    for name in ("inv", "solve", "eigh"):
        original = getattr(dispatch, name)
        monkeypatch.setattr(dispatch, name, lambda *args, n=name, f=original: calls.append(n) or f(*args))
    a = spd(2).requires_grad_()
    block_inv(a)[0].sum().backward()
    assert calls == ["inv"]
    calls.clear()
    block_solve(a, vectors(2, 3))[0].sum().backward()
    assert calls == ["solve", "solve"]
