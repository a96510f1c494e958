"""`secant.ops.two_loop`: its mathematics against other people's code, its derivatives, and its refusals."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from secant.kernels.lbfgs import cpu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import secant
from secant.ops import two_loop


def problem(m: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Pairs of a random quadratic with eigenvalues in [0.1, 10], and a vector."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = (q * torch.logspace(-1, 1, n, dtype=torch.float64)) @ q.T
    s = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype), s.to(dtype), (s @ hessian).to(dtype)


def dense(s: torch.Tensor, y: torch.Tensor, gamma: float) -> torch.Tensor:
    """H by its definition: BFGS updates of gamma I, oldest pair first."""
    identity = torch.eye(s.shape[-1], dtype=s.dtype)
    h = gamma * identity
    for a, b in zip(s, y, strict=True):
        rho = 1 / (a @ b)
        v = identity - rho * torch.outer(b, a)
        h = v.T @ h @ v + rho * torch.outer(a, a)
    return h


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (3, 4), (7, 5), (5, 30)])
def test_equals_the_matrix_that_bfgs_updates_build(m, n):
    # m > n: the pairs are dependent, which the recursion does not mind.
    g, s, y = problem(m, n)
    gamma = float(s[-1] @ y[-1] / (y[-1] @ y[-1]))
    h = dense(s, y, gamma)
    scale = torch.linalg.cond(h) * torch.finfo(torch.float64).eps * m
    assert (two_loop(g, s, y) + h @ g).norm() <= 100 * scale * (h @ g).norm()


def test_equals_scipy():
    g, s, y = problem(6, 20)
    product = scipy.optimize.LbfgsInvHessProduct(s.numpy(), y.numpy())  # H_0 = I
    np.testing.assert_allclose(-two_loop(g, s, y, gamma=1.0).numpy(), product @ g.numpy(), rtol=1e-11)


def test_equals_the_direction_of_torch():
    """The pairs and the direction that torch.optim.LBFGS holds after some iterations of a real run."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    x = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], history_size=5, max_iter=9, line_search_fn="strong_wolfe", tolerance_grad=0)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.softplus(a @ x - 1).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[x]
    s, y = torch.stack(state["old_stps"]), torch.stack(state["old_dirs"])
    assert s.shape == (5, 12)
    d = two_loop(state["prev_flat_grad"], s, y)
    torch.testing.assert_close(d, state["d"], rtol=1e-10, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 40), seed=st.integers(0, 2**20), scale=st.floats(1e-6, 1e6))
def test_properties(m, n, seed, scale):
    g, s, y = problem(m, n, seed=seed)
    d = two_loop(g, s, y)
    eps = 1e6 * torch.finfo(torch.float64).eps  # eigenvalues of H span at most 100^2, squared by the factors
    # H is positive definite.
    assert g @ d < 0
    # Secant equation for the newest pair.
    assert (two_loop(y[-1], s, y) + s[-1]).norm() <= eps * s[-1].norm()
    # H is symmetric.
    u = torch.roll(g, 1) + 1
    size = u.norm() * d.norm() + g.norm() * two_loop(u, s, y).norm()
    assert abs(u @ d - g @ two_loop(u, s, y)) <= eps * size
    # Linear in g; unchanged when s and y are scaled together; scaled like s / y.
    assert (two_loop(scale * g, s, y) - scale * d).norm() <= eps * scale * d.norm()
    assert (two_loop(g, scale * s, scale * y) - d).norm() <= eps * d.norm()
    assert (two_loop(g, scale * s, y) - scale * d).norm() <= eps * scale * d.norm()


def test_shapes_batches_and_strides():
    g, s, y = problem(4, 6)
    want = two_loop(g, s, y)
    batch = two_loop(g.expand(3, -1), s.expand(3, -1, -1), y.expand(3, -1, -1))
    torch.testing.assert_close(batch, want.expand(3, -1), rtol=1e-14, atol=0)
    transposed = s.T.contiguous().T
    assert transposed.stride(-1) != 1
    torch.testing.assert_close(two_loop(g, transposed, y.flip(-1).flip(-1)), want, rtol=1e-14, atol=0)
    wide = torch.zeros(12, dtype=torch.float64)
    wide[::2] = g
    torch.testing.assert_close(two_loop(wide[::2], s, y), want, rtol=1e-14, atol=0)


def test_no_pairs_is_steepest_descent():
    g = torch.randn(5)
    none = torch.empty(0, 5)
    assert torch.equal(two_loop(g, none, none), -g)
    assert torch.equal(two_loop(g, none, none, gamma=0.5), -0.5 * g)
    assert two_loop(torch.empty(0), torch.empty(3, 0), torch.empty(3, 0)).shape == (0,)
    assert two_loop(torch.empty(0, 4), torch.empty(0, 3, 4), torch.empty(0, 3, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    g, s, y = (x.to(dtype) for x in problem(4, 30))
    out = two_loop(g, s, y)
    assert out.dtype is dtype
    want = two_loop(g.double(), s.double(), y.double())
    assert (out.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()  # one rounding, at the end


def test_out():
    g, s, y = problem(4, 30)
    want = two_loop(g, s, y)
    out = torch.full_like(g, torch.nan)
    assert two_loop(g, s, y, out=out) is out
    assert torch.equal(out, want)
    every_other = torch.full((60,), torch.nan, dtype=torch.float64)
    two_loop(g, s, y, out=every_other[::2])
    assert torch.equal(every_other[::2], want)
    assert every_other[1::2].isnan().all()
    two_loop(g, s, y, out=g)
    assert torch.equal(g, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_negated_views(backend):
    """torch.imag of a conjugate is a view that says "negated": no kernel may read its memory as it is."""
    g, s, y = torch.randn(64), torch.randn(3, 64), torch.randn(3, 64)
    y = s + 0.1 * y
    with secant.use_backend(backend):
        want = secant.ops.two_loop(g, s, y)  # the way that was taken is kept for tensors like these
        for args in ((torch._neg_view(-g), s, y), (g, torch._neg_view(-s), y), (g, s, torch._neg_view(-y))):
            for _ in range(2):
                assert torch.equal(secant.ops.two_loop(*args), want)
        wide = g.double()
        assert torch.equal(secant.ops.two_loop(wide, s, torch._neg_view(-y)), secant.ops.two_loop(wide, s, y))
        out = torch._neg_view(torch.empty(64))
        secant.ops.two_loop(g, s, y, out=out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results_without_memory(backend):
    """While torch only asks for shapes, what it allocates has no memory that a kernel could write to."""
    g, s = torch.randn(5), torch.randn(3, 5)
    with secant.use_backend(backend):
        two_loop(g, s, s)  # the way that was taken is kept for tensors like these
        with FakeTensorMode(allow_non_fake_inputs=True):
            results = two_loop(g, s, s), two_loop(g, s.half(), s.half()), two_loop(g, s, s, gamma=2.0)
    assert all(isinstance(result, FakeTensor) and result.shape == (5,) for result in results)


def test_a_non_finite_gradient_shows():
    g, s, y = problem(3, 10, torch.float32)
    for bad in (torch.nan, torch.inf):
        g[4] = bad
        assert not two_loop(g, s, y).isfinite().all()


def test_gradients():
    g, s, y = problem(3, 6)
    g.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: two_loop(x, s, y), g, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: two_loop(x, s, y) ** 2, g)


def test_transforms():
    g, s, y = problem(3, 6)
    many = torch.stack([g, 2 * g, g + 1])
    each = torch.stack([two_loop(x, s, y) for x in many])
    torch.testing.assert_close(torch.func.vmap(lambda x: two_loop(x, s, y))(many), each, rtol=1e-13, atol=0)
    _, tangent = torch.func.jvp(lambda x: two_loop(x, s, y), (g,), (many[2],))
    torch.testing.assert_close(tangent, each[2], rtol=1e-13, atol=0)
    pairs = torch.stack([s, 2 * s])
    scaled = torch.func.vmap(lambda p: two_loop(g, p, y))(pairs)
    torch.testing.assert_close(scaled[1], 2 * each[0], rtol=1e-13, atol=0)


def test_compiles_in_one_graph():
    g, s, y = problem(4, 30, torch.float32)

    def f(g, s, y):
        return two_loop(g * 2, s, y) + 1

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(g, s, y), f(g, s, y))


def test_opcheck():
    g, s, y = problem(4, 30, torch.float32)
    for gamma in (None, 0.5):
        torch.library.opcheck(torch.ops.secant.lbfgs_two_loop.default, (g, s, y, gamma, torch.empty_like(g)))


def bad_calls():
    g, s = torch.randn(5), torch.randn(3, 5)
    yield "grad of lists", ([1.0], s, s, {}), TypeError, "grad: expected a torch.Tensor, got list"
    yield "integers", (g.int(), s, s, {}), TypeError, "grad: expected dtype float32 or float64 or bfloat16 or float16"
    yield "complex", (g.cfloat(), s, s, {}), TypeError, "complex is not supported"
    yield "scalar", (g[0], s, s, {}), ValueError, "grad: expected shape (n,) or (B, n), got shape ()"
    yield "sparse", (g.to_sparse(), s, s, {}), ValueError, "grad: expected a dense (strided) tensor"
    yield "length", (g[:4], s, s, {}), ValueError, "s: expected shape (m, n) for grad of shape (4,), got shape (3, 5)"
    yield "batch", (g.expand(2, 5), s, s, {}), ValueError, "s: expected shape (B, m, n)"
    yield "y shape", (g, s, s[:2], {}), ValueError, "y: expected the shape of s, (3, 5), got shape (2, 5)"
    yield "y dtype", (g, s, s.double(), {}), TypeError, "y: expected the dtype of s, torch.float32"
    yield "device", (g, s.to("meta"), s, {}), ValueError, "s: expected device cpu"
    yield "many", (g, torch.ones(257, 5), torch.ones(257, 5), {}), ValueError, "at most 256 pairs"
    for gamma in (0.0, -1.0, float("nan"), float("inf"), "x"):
        yield f"gamma {gamma}", (g, s, s, {"gamma": gamma}), ValueError, "gamma: expected None or a positive finite"
    yield "out shape", (g, s, s, {"out": torch.empty(4)}), ValueError, "out: expected shape (5,)"
    yield "out dtype", (g, s, s, {"out": g.double()}), TypeError, "out: expected dtype float32"
    yield "out in s", (g, s, s.clone(), {"out": s[0]}), ValueError, "out: expected no overlap with s"
    long = torch.randn(6)
    yield "out shifted", (long[:5], s, s, {"out": long[1:]}), ValueError, "out: expected grad itself or no overlap"
    yield (
        "s grad",
        (g, s.clone().requires_grad_(), s, {}),
        ValueError,
        "s, y: expected tensors that do not require grad",
    )
    yield "out grad", (g.clone().requires_grad_(), s, s, {"out": torch.empty(5)}), ValueError, "out: expected None"


@pytest.mark.parametrize(("arguments", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_errors_name_the_argument(arguments, error, message):
    *tensors, options = arguments
    with pytest.raises(error, match=re.escape(message)):
        two_loop(*tensors, **options)


def test_a_plan_does_not_outlive_the_backend_that_made_it():
    g, s, y = problem(4, 30)
    want = two_loop(g, s, y)
    with secant.use_backend("reference"):
        torch.testing.assert_close(two_loop(g, s, y), want, rtol=1e-12, atol=0)
    with secant.use_backend("cuda"), pytest.raises(secant.BackendError, match="backend 'cuda' was chosen"):
        two_loop(g, s, y)
    assert torch.equal(two_loop(g, s, y), want)


shortcut = pytest.mark.skipif(cpu.two_loop_plain is None, reason="torch before 2.10 has no DLPack exchange table")


@shortcut
@pytest.mark.parametrize("ring", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_shortcut_takes_plain_tensors_and_gives_the_same_bits(batch, ring):
    g = torch.randn(*batch, 33)
    s = torch.randn(*batch, 5, 40).to(ring)[..., 3:36]
    y = 1.5 * s
    d = torch.full_like(g, math.nan)
    want = torch.full_like(g, math.nan)
    assert cpu.two_loop_plain(g, s, y, d)
    cpu.two_loop(g, s, y, None, want)
    assert torch.equal(d, want)
    assert torch.equal(secant.ops.two_loop(g, s, y), want)


@shortcut
def test_the_shortcut_leaves_everything_else_to_the_gate():
    g, s, y = torch.randn(8), torch.randn(3, 8), torch.randn(3, 8)
    wide = torch.randn(16)
    for name, call in {
        "float16": (g.half(), s, y, torch.empty(8).half()),
        "mixed vectors": (g, s, y, torch.empty(8, dtype=torch.float64)),
        "mixed pairs": (g, s, y.double(), torch.empty(8)),
        "integers": (g.int(), s, y, torch.empty(8).int()),
        "another length": (g, s[:, :7], y[:, :7], torch.empty(8)),
        "another m": (g, s, y[:2], torch.empty(8)),
        "no pair": (g, s[:0], y[:0], torch.empty(8)),
        "a vector for a matrix": (g, s[0], y[0], torch.empty(8)),
        "columns": (g, s.T.contiguous().T, y, torch.empty(8)),
        "strides in grad": (wide[::2], s, y, torch.empty(8)),
        "strides in out": (g, s, y, wide[::2]),
        "out over grad": (wide[:8], s, y, wide[4:12]),
        "out over a pair": (g, s, y, s[1]),
        "sparse": (g.to_sparse(), s, y, torch.empty(8)),
        "no tensor": ([1.0] * 8, s, y, torch.empty(8)),
    }.items():
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in call]
        assert not cpu.two_loop_plain(*call), name
        for x, was in zip(call[:3], before[:3], strict=True):
            assert not isinstance(x, torch.Tensor) or x.is_sparse or torch.equal(x, was), name
