"""`block_function`: values, codes, derivatives at equal, close and distant eigenvalues; and `block_eigh` beside it."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import secant
from block_examples import F64, indefinite, spd, tolerance, vectors
from secant.ops import _blocks_functions as functions
from secant.ops import block_abs_inv, block_eigh, block_function, block_inv_root

EPS = torch.finfo(F64).eps
TANH = (torch.tanh, lambda w: 1 / torch.cosh(w) ** 2)
CUBE = (lambda w: w**3, lambda w: 3 * w**2, lambda w: 6 * w)
#: Name -> (f, the same for eigenvalues, whether the block may be indefinite).
KINDS = {
    "exp": ("exp", torch.exp, True),
    "log": ("log", torch.log, False),
    "sqrt": ("sqrt", torch.sqrt, False),
    "abs": ("abs", torch.abs, True),
    "cube": (("power", 3), lambda w: w**3, True),
    "constant": (("power", 0), torch.ones_like, True),
    "reciprocal square": (("power", -2.0), lambda w: w**-2, True),
    "power 1.5": (("power", 1.5), lambda w: w**1.5, False),
    "power -0.3": (("power", -0.3), lambda w: w**-0.3, False),
    "given": (TANH, torch.tanh, True),
    "given, twice": (CUBE, lambda w: w**3, True),
}
every = pytest.mark.parametrize("name", KINDS)
Q = torch.linalg.qr(vectors(3, 3))[0]


def symmetrised(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, *others: f((a + a.mT) / 2, *others)


def block(*values: float, rotated: bool = True, dtype: torch.dtype = F64) -> Tensor:
    w = torch.tensor(values, dtype=F64)
    a = (Q * w) @ Q.mT if rotated else torch.diag(w)
    return ((a + a.mT) / 2).to(dtype)


def of(name: str) -> Callable[[Tensor], Tensor]:
    return lambda a: block_function(a, KINDS[name][0])[0]


# -------------------------------------------------------------------------------------------------------- values, codes


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16], ids=str)
@every
def test_values(name, dtype):
    f, exact, any_sign = KINDS[name]
    for n in (1, 2, 5, 9):
        a = (indefinite if any_sign else spd)(2, 3, n=n, dtype=dtype) / (1 if any_sign else 4)
        x, info = block_function(a, f)
        assert x.shape == a.shape
        assert x.dtype is dtype
        assert not info.any()
        assert torch.equal(x, x.mT)
        w, v = torch.linalg.eigh(a.double().tril() + a.double().tril(-1).mT)
        want = (v * exact(w)[..., None, :]) @ v.mT
        # Eigenvalues lie in [0.25, 3] in magnitude, where |f'| <= 128 and |f| <= 28; eigenpairs err by 30 n eps ||A||.
        eps = torch.finfo(dtype if dtype in (torch.float32, F64) else torch.float32).eps
        bound = 30 * n * eps * 3 * 2 * 128 + torch.finfo(dtype).eps * 28
        assert (x.double() - want).abs().max() <= bound


def test_damping():
    a = spd(2, 3)
    for amount in (0.5, torch.tensor([0.5, 0.0, 2.0], dtype=F64)):
        for scaled in (False, True):
            shift = (amount * torch.ones(3, dtype=F64))[..., None]
            d = a.diagonal(dim1=-2, dim2=-1) * shift if scaled else shift.expand(2, 3, 3)
            x, _ = block_function(a, "log", damping=("scale", amount) if scaled else amount)
            assert torch.equal(x, block_function(a + torch.diag_embed(d), "log")[0])
    lam = vectors(2, 3).abs().requires_grad_()
    assert gradcheck(lambda d: block_function(a, "sqrt", damping=d)[0], (lam,), check_forward_ad=True)
    assert gradcheck(lambda d: block_function(a, "sqrt", damping=("scale", d))[0], (lam,), check_forward_ad=True)


def test_domains():
    """How many eigenvalues have no value; NaN in these blocks alone, in the gradient too."""
    good = block(1.0, 2.0, 4.0)
    nan = good.clone()
    nan[2, 0] = math.nan
    cases = [
        ("log", [good, block(-1.0, -2.0, 4.0), block(0.0, 1.0, 2.0, rotated=False), nan], [0, 2, 1, -1]),
        ("sqrt", [good, block(-1.0, -2.0, -4.0), block(0.0, 0.0, 2.0, rotated=False), nan], [0, 3, 2, -1]),
        (("power", 0.5), [good, -good, 0 * good, nan], [0, 3, 3, -1]),
        (("power", -1), [good, -good, block(0.0, 0.0, 2.0, rotated=False), nan], [0, 0, 2, -1]),
        ("exp", [good, -1e6 * good, 1e3 * good, nan], [0, 0, 3, -1]),
        (("power", 64), [good, -good, block(1.0, 1e5, 2e5, rotated=False), nan], [0, 0, 2, -1]),
        ((torch.rsqrt, lambda w: -0.5 * w**-1.5), [good, -good, 0 * good, nan], [0, 3, 3, -1]),
    ]
    for f, blocks, codes in cases:
        a = torch.stack(blocks).requires_grad_()
        x, info = block_function(a, f)
        assert info.tolist() == codes, f
        failed = info != 0
        assert x[failed].isnan().all()
        assert x[~failed].isfinite().all()
        (g,) = torch.autograd.grad(x, a, torch.ones_like(x))
        assert g[failed].isnan().all(), f
        assert g[~failed].isfinite().all(), f
        for i, one in enumerate(blocks):
            alone, code = block_function(one, f)
            assert code == codes[i]
            torch.testing.assert_close(alone, x[i].detach(), rtol=8 * EPS, atol=0, equal_nan=True)
    x, info = block_function(block(1.0, 2.0, 100.0, dtype=torch.float32), "exp")  # e^100 is not a float32
    assert info == 1
    assert x.isnan().all()


def test_exact_results():
    eye = torch.eye(4, dtype=F64)
    for f, want in (("log", 0.0), ("sqrt", 1.0), ("abs", 1.0), (("power", -7), 1.0), (("power", 2.5), 1.0)):
        assert torch.equal(block_function(eye, f)[0], want * eye)
    torch.testing.assert_close(block_function(eye, "exp")[0], math.e * eye, rtol=2 * EPS, atol=0)
    a = torch.diag(torch.tensor([-4.0, 9.0, 0.0, -0.25]))
    assert torch.equal(block_function(a, "abs")[0], a.abs())
    assert torch.equal(block_function(a, ("power", 2))[0], a @ a)
    spoilt = a + torch.full((4, 4), math.nan).triu(1)
    assert torch.equal(block_function(spoilt, "abs")[0], a.abs())
    assert block_function(torch.empty(0, 3, 3), "exp")[0].shape == (0, 3, 3)
    with secant.use_backend("reference"):
        assert torch.equal(block_function(a, "abs")[0], a.abs())


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (
            "sin",
            "f: expected 'exp', 'log', 'sqrt', 'abs', ('power', p) or callables (f, df) or (f, df, d2f), got 'sin'",
        ),
        (torch.exp, "f: expected 'exp'"),
        (("power", "2"), "f: expected a power from -64 to 64, got '2'"),
        (("power", True), "f: expected a power from -64 to 64, got True"),
        (("power", math.nan), "f: expected a power from -64 to 64, got nan"),
        (("power", 1e9), "f: expected a power from -64 to 64"),
        (("power",), "f: expected 'exp'"),
        ((torch.exp, 1.0), "f: expected 'exp'"),
        (None, "f: expected 'exp'"),
    ],
)
def test_errors_name_the_argument(f, message):
    with pytest.raises(ValueError, match=re.escape(f"block_function: {message}")):
        block_function(torch.eye(2), f)


def test_callables_that_return_something_else_are_refused():
    a = torch.eye(3)
    for f in ((lambda w: w.sum(), torch.cos), (lambda w: 1.0, torch.cos)):
        with pytest.raises(
            ValueError, match=r"block_function: f: expected callables that return a tensor of the shape"
        ):
            block_function(a, f)
    x, _ = block_function(a.requires_grad_(), (torch.sin, lambda w: w[..., :1]))
    with pytest.raises(ValueError, match=r"block_function: f: expected callables that return a tensor of the shape"):
        x.sum().backward()


# ---------------------------------------------------------------------------------------------------------- derivatives

PLACES = {
    "equal": (1.0, 1.0, 1.0),
    "a pair": (2.0, 2.0, 0.5),
    "nearly": (3.0, 1.0, 1.0 + 1e-13),
    "close": (1.0, 1.1, 1.25),
    "far": (0.1, 1.0, 3.0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "cube", "power -0.3", "given"])
def test_two_derivatives_in_both_modes(name, place):
    """Against differences in float64, entry by entry."""
    for rotated in (False, True):
        a = block(*PLACES[place], rotated=rotated).requires_grad_()
        assert gradcheck(symmetrised(of(name)), (a,), check_forward_ad=True, fast_mode=False)
        assert gradgradcheck(symmetrised(of(name)), (a,), fast_mode=False)


@pytest.mark.parametrize("name", ["abs_inv", "inv_root", "abs", "reciprocal square", "power 1.5", "given, twice"])
def test_two_derivatives_at_equal_eigenvalues(name):
    f = {
        "abs_inv": lambda a: block_abs_inv(a, floor=0.7)[0],
        "inv_root": lambda a: block_inv_root(a, 4)[0],
    }.get(name) or of(name)
    for values in ((1.0, 1.0, 1.0), (2.0, 2.0, 1.0)):
        a = block(*values).requires_grad_()
        assert gradcheck(symmetrised(f), (a,), check_forward_ad=True, fast_mode=False)
        assert gradgradcheck(symmetrised(f), (a,), fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_the_derivative_of_the_identity_is_the_identity(dtype):
    """f(w) = w at A = I and beside it: what V f(w) V^T of `block_eigh` cannot tell."""
    e = vectors(4, 4, dtype=dtype)
    e = e + e.mT
    for a in (torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype) + 1e-6 * e, torch.zeros(4, 4, dtype=dtype)):
        for f in (("power", 1), (lambda w: w, torch.ones_like)):
            run = functools.partial(lambda a, f: block_function(a, f)[0], f=f)
            bound = 64 * 4 * torch.finfo(dtype).eps * e.abs().max()
            assert (torch.func.jvp(run, (a,), (e,))[1] - e).abs().max() <= bound
            assert (torch.func.vjp(run, a)[1](e)[0] - e).abs().max() <= bound


@every
@pytest.mark.parametrize("place", ["equal", "a pair", "close"])
def test_derivatives_along_a_line(name, place):
    """jvp of jvp, reverse over forward and forward over reverse agree, and so do differences of f along the line.

    Where f is abs, on one side of its kink; differences of step h err by h^2 |f''''| / 12 and by 4 eps |f| / h^2.
    """
    a, e = block(*PLACES[place]), vectors(3, 3, seed=4)
    e = (e + e.mT) / 4
    f = of(name)

    def line(t: Tensor) -> Tensor:
        return f(a + t * e)

    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)

    def slope(t: Tensor) -> Tensor:
        return torch.func.jvp(line, (t,), (one,))[1]

    second = torch.func.jvp(slope, (zero,), (one,))[1]
    h = 1e-3
    values = [line(torch.tensor(k * h, dtype=F64)) for k in (-2, -1, 0, 1, 2)]
    first = (8 * (values[3] - values[1]) - (values[4] - values[0])) / (12 * h)
    torch.testing.assert_close(slope(zero), first, rtol=1e-7, atol=1e-7)
    differences = (16 * (values[3] + values[1]) - (values[4] + values[0]) - 30 * values[2]) / (12 * h * h)
    torch.testing.assert_close(second, differences, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacrev(line))(zero), second, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(line))(zero), second, rtol=1e-9, atol=1e-9)


@every
def test_vmap(name):
    f = KINDS[name][0]
    a = torch.stack([spd(4, seed=i) / 4 for i in range(3)])
    want = torch.stack([block_function(x, f)[0] for x in a])
    near = {"rtol": 8 * EPS, "atol": 8 * EPS}
    x, info = torch.func.vmap(lambda x: block_function(x, f))(a)
    torch.testing.assert_close(x, want, **near)
    assert info.shape == (3, 4)
    x, info = torch.func.vmap(lambda x: block_function(x, f), in_dims=1, out_dims=1)(a)
    torch.testing.assert_close(x, want, **near)
    shift = torch.tensor([0.0, 0.5], dtype=F64)
    x, _ = torch.func.vmap(lambda a, d: block_function(a, f, damping=d), in_dims=(None, 0))(a, shift)
    torch.testing.assert_close(x, torch.stack([want, block_function(a, f, damping=0.5)[0]]), **near)

    def slope(a: Tensor, e: Tensor) -> Tensor:
        return torch.func.jvp(lambda a: block_function(a, f)[0], (a,), (e,))[1]

    e = vectors(5, 3, 3)
    e = e + e.mT
    tangents = torch.func.vmap(slope, in_dims=(None, 0))(a[0, 0], e)
    torch.testing.assert_close(tangents, torch.stack([slope(a[0, 0], x) for x in e]), rtol=1e-12, atol=1e-12)


@every
def test_compiles_in_one_graph(name):
    f, _, _ = KINDS[name]
    a = spd(4, dtype=torch.float32) / 4
    torch.compiler.reset()
    compiled = torch.compile(lambda a: block_function(a, f, damping=0.5), fullgraph=True, backend="aot_eager")
    x, info = compiled(a)
    want, codes = block_function(a, f, damping=0.5)
    torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(info, codes)
    y, z = a.clone().requires_grad_(), a.clone().requires_grad_()
    compiled(y)[0].square().sum().backward()
    block_function(z, f, damping=0.5)[0].square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-5, atol=1e-5 * float(z.grad.abs().max()))


def test_lower_precision_is_differentiated_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        a = torch.eye(3, dtype=dtype).requires_grad_()
        (g,) = torch.autograd.grad(block_function(a, "exp")[0].sum(), a)
        assert g.dtype is dtype
        # d/dA of the sum of the entries of exp(A) at I in the direction E: e times the sum of the entries of E.
        torch.testing.assert_close(
            g.double(), torch.full((3, 3), math.e, dtype=F64), rtol=torch.finfo(dtype).eps, atol=0
        )


def test_graded_blocks():
    """Twelve decades: the entry ij of the derivative of the root is 1 / (sqrt w_i + sqrt w_j), whatever the gaps."""
    for dtype, w in ((torch.float32, [1.0, 2.0, 1e7]), (F64, [1.0, 2.0, 1e16]), (F64, [1e-150, 3e-150, 1e150])):
        w = torch.tensor(w, dtype=dtype)
        e = torch.ones(3, 3, dtype=dtype)
        got = torch.func.jvp(lambda a: block_function(a, "sqrt")[0], (torch.diag(w),), (e,))[1]
        root = w.double().sqrt()
        want = 1 / (root[:, None] + root)
        torch.testing.assert_close(got.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=0)


# ------------------------------------------------------------------------------------------------- divided differences

RULES = {
    "exp": (("exp",), lambda mp, x: mp.exp(x)),
    "log": (("log",), lambda mp, x: mp.log(x)),
    "sqrt": (("root", 0.5), lambda mp, x: mp.sqrt(x)),
    "power 10.5": (("root", 10.5), lambda mp, x: x ** mp.mpf(10.5)),
    "power -0.3": (("root", -0.3), lambda mp, x: x ** mp.mpf(-0.3)),
    "power 5": (("integer", 5), lambda mp, x: x**5),
    "power -3": (("integer", -3), lambda mp, x: x**-3),
    "given": (("given", *CUBE), lambda mp, x: x**3),
    "given exp(9 w)": (
        ("given", lambda w: torch.exp(9 * w), lambda w: 9 * torch.exp(9 * w), None),
        lambda mp, x: mp.exp(9 * x),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_divided_differences(name):
    """Against 100 digits, for gaps from none to many times the numbers: no gap is too small, none too large.

    64 eps is what two quotients of a quarter each and the sums of a series may lose; callables may do as promised.
    """
    mp = pytest.importorskip("mpmath")
    rule, f = RULES[name]
    rng = random.Random(name)
    with mp.workdps(100):
        for _ in range(150):
            size = 10 ** rng.uniform(-3, 1)
            points = [size]
            for _ in range(2):
                kind = rng.random()
                near = size * (1 + rng.choice([-1, 1]) * 10 ** rng.uniform(-16, -0.1))
                points.append(size if kind < 0.2 else near if kind < 0.8 else 10 ** rng.uniform(-3, 1))
            x, y, z = (torch.tensor([[p]], dtype=F64) for p in points)
            # Distinct beyond doubt, and nearer than any rounding of these numbers.
            apart = [mp.mpf(p) * (1 + i * mp.mpf(10) ** -30) for i, p in enumerate(points)]
            table = [f(mp, p) for p in apart]
            one = (table[1] - table[0]) / (apart[1] - apart[0])
            two = ((table[2] - table[1]) / (apart[2] - apart[1]) - one) / (apart[2] - apart[0])
            got, again = functions.first(rule, None, x, y).item(), functions.second(rule, None, x, y, z).item()
            given = name.startswith("given")
            assert abs(got - one) <= (1e-12 if given else 16 * EPS) * abs(one), points
            assert abs(again - two) <= (1e-10 if given else 64 * EPS) * abs(two), points


def test_divided_differences_do_not_overflow():
    def first(rule, x, y):
        return functions.first(rule, None, torch.tensor(x, dtype=F64), torch.tensor(y, dtype=F64)).item()

    assert first(("exp",), 709.0, -1e9) == pytest.approx(math.exp(709) / (1e9 + 709), rel=1e-12)
    assert first(("exp",), -1e9, -1e9) == 0
    assert first(("log",), 1e308, 1e-308) == pytest.approx(616 * math.log(10) / 1e308, rel=1e-12)
    assert first(("root", 0.5), 1e308, 1e-308) == pytest.approx(1e-154, rel=1e-12)
    assert first(("abs",), 3.0, -1.0) == 0.5
    assert first(("abs",), -2.0, -2.0) == -1
    assert first(("abs",), 0.0, 0.0) == 0


# ----------------------------------------------------------------------------------------------------------- block_eigh


def test_eigenvectors_of_equal_eigenvalues_have_no_derivative():
    """NaN, not a wrong number: V f(w) V^T is right where the eigenvalues differ, and `block_function` everywhere."""

    def composed(a: Tensor) -> Tensor:
        w, v, _ = block_eigh(a)
        return (v * w.exp()[..., None, :]) @ v.mT

    low_rank = vectors(4, 1) @ vectors(4, 1).mT  # three eigenvalues are zero to rounding
    pair = block(2.0, 2.0, 0.5)
    for a in (torch.eye(3, dtype=F64), pair, pair.float(), block(1.0, 1.0 + 1e-15, 4.0), low_rank):
        e = torch.ones_like(a) + torch.eye(len(a), dtype=a.dtype)
        assert torch.func.jvp(composed, (a,), (e,))[1].isnan().any()
        x = a.clone().requires_grad_()
        (g,) = torch.autograd.grad((composed(x) * e).sum(), x)
        assert g.isnan().any()
        right = torch.func.jvp(lambda a: block_function(a, "exp")[0], (a,), (e,))[1]
        # The derivative of exp at A along E is a block of the exponential of ((A, E), (0, A)).
        n = len(a)
        wide = torch.zeros(2 * n, 2 * n, dtype=F64)
        wide[:n, :n] = wide[n:, n:] = a
        wide[:n, n:] = e
        want = torch.linalg.matrix_exp(wide)[:n, n:]
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(right.double(), want, rtol=0, atol=300 * n * eps * float(want.abs().max()))


def test_eigenvalues_alone_have_derivatives_everywhere():
    a = torch.stack([torch.eye(3, dtype=F64), block(2.0, 2.0, 0.5), block(1.0, 2.0, 3.0)])
    x = a.clone().requires_grad_()
    (g,) = torch.autograd.grad(block_eigh(x)[0].exp().sum(), x)
    torch.testing.assert_close(g, torch.linalg.matrix_exp(a), rtol=1e-12, atol=1e-12)
    # The vectors of one block have a gradient; the others have none to spoil.
    w, v, _ = block_eigh(x)
    (g,) = torch.autograd.grad(w.exp().sum() + v[2, 0, 0].abs(), x)
    torch.testing.assert_close(g[:2], torch.linalg.matrix_exp(a[:2]), rtol=1e-12, atol=1e-12)
    assert g[2].isfinite().all()
    g = torch.func.jacrev(lambda a: block_eigh(a)[0].exp().sum())(a)
    torch.testing.assert_close(g, torch.linalg.matrix_exp(a), rtol=1e-12, atol=1e-12)
    tangent = torch.func.jvp(lambda a: block_eigh(a)[0].exp().sum(), (a,), (a,))[1]
    torch.testing.assert_close(tangent, (torch.linalg.matrix_exp(a) * a).sum(), rtol=1e-12, atol=1e-12)


def test_a_projector_onto_an_eigenspace():
    """By a step function: its divided differences are zero within the eigenspace and 1 / gap across."""
    step = (lambda w: (w > 1).double(), torch.zeros_like)
    for rotated in (False, True):
        a = block(0.5, 2.0, 2.0, rotated=rotated).requires_grad_()
        assert gradcheck(symmetrised(lambda a: block_function(a, step)[0]), (a,), check_forward_ad=True)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e7), (torch.float32, 1e30), (F64, 1e16), (F64, 1e200)], ids=str
)
def test_the_guard_is_relative_to_the_pair(dtype, largest):
    """1 and 2 differ in diag(1, 2, huge): dV = V (F * K) with F_12 = 1, in every order of the diagonal."""
    e = torch.ones(3, 3, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        w = torch.tensor([1.0, 2.0, largest], dtype=dtype)
        a = torch.diag(w[order])
        _, v, _ = block_eigh(a)
        gap = w.double()[None, :] - w.double()[:, None]
        inverse = torch.where(gap == 0, 0.0, 1 / torch.where(gap == 0, 1.0, gap))
        k = v.double().mT @ e.double() @ v.double()
        want = v.double() @ (inverse * k)
        got = torch.func.jvp(lambda a: block_eigh(a)[1], (a,), (e,))[1]
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=0)
        x = a.clone().requires_grad_()
        (g,) = torch.autograd.grad((block_eigh(x)[1] * e).sum(), x)
        turn = v.double().mT @ e.double()
        back = v.double() @ (inverse * (turn - turn.mT) / 2) @ v.double().mT
        torch.testing.assert_close(g.double(), (back + back.mT) / 2, rtol=8 * eps, atol=0)


def test_the_guard_knows_what_rounding_the_entries_does():
    """Rotated, 1 and 2 are below the rounding of the entries of 1e16: no vectors are theirs. D C D keeps them apart."""
    e = vectors(3, 3)
    e = e + e.mT
    a = block(1.0, 2.0, 1e16)
    assert torch.func.jvp(lambda a: block_eigh(a)[1], (a,), (e,))[1].isnan().any()
    d = torch.tensor([1.0, 1.5, 1e12], dtype=F64)
    c = torch.tensor([[2.0, 0.3, 0.2], [0.3, 2.0, 0.1], [0.2, 0.1, 2.0]], dtype=F64)
    graded = c * d[:, None] * d  # eigenvalues of about 2, 4 and 2e24
    tangent = e * d[:, None] * d
    got = torch.func.jvp(lambda a: block_eigh(a)[1], (graded,), (tangent,))[1]
    assert got.isfinite().all()
    # The two by two block that is left when the large entry is eliminated, and its tangent, have the small vectors.
    s = graded[:2, :2] - graded[:2, 2:] @ graded[2:, :2] / graded[2, 2]
    t = torch.stack([torch.eye(2, dtype=F64)[0], torch.eye(2, dtype=F64)[1]])
    lift = torch.cat([t, -(graded[2:, :2] / graded[2, 2])])
    ds = lift.mT @ tangent @ lift
    _, v = torch.linalg.eigh(s)
    want = torch.func.jvp(lambda s: torch.linalg.eigh(s)[1], (s,), (ds,))[1]
    _, mine, _ = block_eigh(graded)
    sign = (mine[:2, :2] * v).sum(0).sign()
    torch.testing.assert_close(got[:2, :2], want * sign, rtol=1e-10, atol=1e-10)


def test_tolerances_of_the_examples_hold():
    """`block_function` of the inverse is `block_inv`, within what either may err by."""
    a = spd(5, n=8)
    near = tolerance(8, F64)
    torch.testing.assert_close(block_function(a, ("power", -1))[0], secant.ops.block_inv(a)[0], **near)
    torch.testing.assert_close(block_function(a, ("power", -0.5))[0], block_inv_root(a, 2)[0], **near)
