"""Sparse rows of the `hvp` family: indices of any contents, indices of any width, and every derivative."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import secant
from secant.ops import glm_hvp, glm_value_grad, softmax_hvp, softmax_value_grad
from secant.ops.hvp import checked_rows

F64 = torch.float64
WIDTHS = [(a, b) for a in (torch.int32, torch.int64) for b in (torch.int32, torch.int64)]
#: Rows, columns: for one thread, and for several with more than a block of rows each.
SIZES = [(6, 4), (4000, 30)]


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        yield


def unchecked(crow, col, values, shape):
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


def some_rows(n, d, dtype=F64):
    """A dense matrix with zeros, an entry at least in each row."""
    x = torch.randn(n, d, dtype=dtype)
    x = torch.where(torch.rand(n, d) < 0.6, x, 0)
    x[:, 0] = 1
    return x


def calls(n, d):
    """The four functions of x, and some of their derivatives, by name."""
    v, coef, w = torch.randn(d, dtype=F64), torch.randn(d, 3, dtype=F64), torch.rand(n, dtype=F64)
    classes, probs = torch.randint(3, (n,)), torch.softmax(torch.randn(n, 3, dtype=F64), -1)
    binary = (w < 0.5).double()

    def tracked(t):
        return t.clone().requires_grad_()

    return {
        "glm_hvp": lambda x: glm_hvp(x, v, w, l2=0.1),
        "glm_hvp, columns": lambda x: glm_hvp(x, coef, w),
        "glm_hvp, out": lambda x: glm_hvp(x, coef, w, out=torch.zeros_like(coef)),
        "glm_hvp, by v": lambda x: glm_hvp(x, tracked(v), w),
        "glm_hvp, by weight": lambda x: glm_hvp(x, v, tracked(w)),
        "glm_value_grad": lambda x: glm_value_grad(x, binary, v, loss="logistic", l2=0.1),
        "glm_value_grad, weighted": lambda x: glm_value_grad(x, binary, v, loss="huber", sample_weight=w),
        "glm_value_grad, by coef": lambda x: glm_value_grad(x, binary, tracked(v), loss="poisson"),
        "glm_value_grad, by target": lambda x: glm_value_grad(x, tracked(binary), v, loss="squared"),
        "softmax_hvp": lambda x: softmax_hvp(x, coef, probs, l2=0.1),
        "softmax_hvp, by probs": lambda x: softmax_hvp(x, coef, tracked(probs)),
        "softmax_value_grad": lambda x: softmax_value_grad(x, classes, coef, sample_weight=w),
        "softmax_value_grad, by weight": lambda x: softmax_value_grad(x, classes, coef, sample_weight=tracked(w)),
    }


def wrong_rows(n, d):
    """(what was done, the row that is to be named, row pointers, columns)."""
    x = some_rows(n, d).to_sparse_csr()
    crow, col = x.crow_indices(), x.col_indices()
    entries = len(col)
    far = 2**31 - 1  # of either width
    for row in sorted({0, n // 2, n - 1}):
        at = int(crow[row])
        for name, value in (("a column = d", d), ("a far column", far), ("a column < 0", -1), ("-2^31", -(2**31))):
            bad = col.clone()
            bad[at] = value
            yield f"{name} in row {row}", row, crow, bad
    middle = n // 2
    changes = [
        ("a fall", middle + 1, 0, middle),
        ("a pointer beyond the entries", middle + 1, entries + 5, middle),
        ("a far pointer", middle + 1, far, middle),
        ("a pointer < 0", middle + 1, -3, middle),
        ("a first pointer that is not 0", 0, 1, 0),
        ("a first pointer < 0", 0, -1, 0),
        ("a last pointer below the entries", n, entries - 1, n - 1),
        ("a last pointer beyond the entries", n, entries + 1, n - 1),
        ("a far last pointer", n, far, n - 1),
    ]
    for name, place, value, row in changes:
        bad = crow.clone()
        bad[place] = value
        yield name, row, bad, col


@pytest.mark.parametrize(("crow_type", "col_type"), WIDTHS, ids=str)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wrong_row_is_named(n, d, crow_type, col_type, backend):
    functions = calls(n, d)
    with secant.use_backend(backend):
        for what, row, crow, col in wrong_rows(n, d):
            values = torch.ones(len(col), dtype=F64)
            x = unchecked(crow.to(crow_type), col.to(col_type), values, (n, d))
            for name, f in functions.items():
                if n > 100 and ("by" in name or backend == "reference") and "glm_hvp" not in name:
                    continue  # the path is the same, and long
                with pytest.raises(ValueError, match=rf"^{name.split(',')[0]}: x: expected .* row {row}\b") as found:
                    f(x)
                assert "got" in str(found.value), what


def test_nothing_is_written_for_a_wrong_row():
    n, d = SIZES[1]
    x = some_rows(n, d).to_sparse_csr()
    bad = x.col_indices().clone()
    bad[-1] = d
    out = torch.full((d, 3), 7.0, dtype=F64)
    with pytest.raises(ValueError, match=f"row {n - 1}"):
        glm_hvp(unchecked(x.crow_indices(), bad, x.values(), (n, d)), out.clone(), torch.ones(n, dtype=F64), out=out)
    assert torch.equal(out, torch.full_like(out, 7.0))


def test_indices_that_change_between_calls_are_seen():
    x = some_rows(6, 4).to_sparse_csr()
    functions = calls(6, 4)
    for f in functions.values():
        f(x)
    v = torch.randn(4, dtype=F64, requires_grad=True)
    w = torch.rand(6, dtype=F64, requires_grad=True)
    waiting = [
        glm_hvp(x, v, w).sum(),
        glm_hvp(x, v, w.detach()).sum(),
        glm_value_grad(x, w.detach(), v, loss="logistic")[1].sum(),
        glm_value_grad(x, w, v, loss="logistic")[0],
    ]
    x.col_indices()[-1] = 4
    for name, f in functions.items():
        with pytest.raises(ValueError, match=rf"^{name.split(',')[0]}: x: expected columns in 0..3, got 4 in row 5"):
            f(x)
    for result in waiting:
        with pytest.raises(ValueError, match=r"x: expected columns in 0..3, got 4 in row 5"):
            result.backward()


MALFORMED = {
    "pointers too few": (torch.tensor([0, 1]), torch.tensor([0]), 1, r"expected 4 row pointers, got shape \(2,\)"),
    "columns too few": (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1]), 3, "expected a column for every value"),
    "columns too many": (torch.tensor([0, 1, 2, 3]), torch.arange(4), 3, "expected a column for every value"),
    "narrow": (torch.tensor([0, 1, 2, 3]).short(), torch.arange(3).short(), 3, "of int32 or int64, got torch.int16"),
    "real": (torch.tensor([0.0, 1, 2, 3]), torch.arange(3).float(), 3, "of int32 or int64, got torch.float32"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_parts_that_do_not_fit(name, backend):
    crow, col, count, message = MALFORMED[name]
    x = unchecked(crow, col, torch.ones(count, dtype=F64), (3, 4))
    with secant.use_backend(backend):
        for f in calls(3, 4).values():
            with pytest.raises(ValueError, match=message):
                f(x)


@pytest.mark.parametrize(("crow_type", "col_type"), WIDTHS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_indices_of_any_width(crow_type, col_type, backend):
    for n, d in ((6, 4), (70, 9)):
        dense = some_rows(n, d)
        dense[n // 2, 0], dense[n // 2, 1:] = 0, 0  # a row without entries
        x = dense.to_sparse_csr()
        mixed = unchecked(x.crow_indices().to(crow_type), x.col_indices().to(col_type), x.values(), (n, d))
        with secant.use_backend(backend):
            for name, f in calls(n, d).items():
                torch.testing.assert_close(f(mixed), f(dense), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("crow_type", "col_type"), WIDTHS, ids=str)
def test_a_fit_of_sparse_rows(crow_type, col_type):
    n, d = 60, 4
    dense = some_rows(n, d)
    y = (torch.rand(n) < 0.5).double()
    x = dense.to_sparse_csr()
    crow, col = x.crow_indices().to(crow_type), x.col_indices().to(col_type)
    expected = secant.glm.fit(dense, y, l2=0.1)
    result = secant.glm.fit(unchecked(crow, col, x.values(), (n, d)), y, l2=0.1)
    torch.testing.assert_close(result.coef, expected.coef, rtol=1e-5, atol=1e-7)
    bad = col.clone()
    bad[-1] = d
    for solver in ("auto", "lbfgs"):
        with pytest.raises(ValueError, match=rf"X: expected columns in 0\.\.3, got 4 in row {n - 1}"):
            secant.glm.fit(unchecked(crow, bad, x.values(), (n, d)), y, l2=0.1, solver=solver)


def test_checked_rows():
    dense = some_rows(5, 3)
    assert checked_rows("f", "X", dense) is dense
    x = dense.to_sparse_csr()
    assert checked_rows("f", "X", x) is x
    mixed = unchecked(x.crow_indices(), x.col_indices().int(), x.values(), x.shape)
    one = checked_rows("f", "X", mixed)
    assert one.crow_indices().dtype is one.col_indices().dtype is torch.int64
    assert torch.equal(one.to_dense(), dense)
    with pytest.raises(ValueError, match=r"f: X: expected row pointers that rise from 0 to .*, got 1 to .* for row 0"):
        checked_rows("f", "X", unchecked(x.crow_indices() + 1, x.col_indices(), x.values(), x.shape))


# ------------------------------------------------------------------------------------------------------- derivatives

N, D, K = 7, 4, 3
DENSE = torch.where(torch.rand(N, D, generator=torch.Generator().manual_seed(1)) < 0.6, 1.0, 0.0).double()
DENSE = DENSE * torch.linspace(-1, 1, N * D, dtype=F64).view(N, D)


def arguments():
    """What the functions take besides x, all positive where that matters."""
    g = torch.Generator().manual_seed(2)

    def rand(*shape):
        return torch.rand(shape, generator=g, dtype=F64) + 0.1

    return {
        "v": rand(D + 1),
        "vs": rand(D + 1, K),
        "weight": rand(N),
        "target": rand(N),
        "c": rand(N),
        "probs": rand(N, K),
    }


CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
#: name: (function of x and the arguments, those that it is differentiated by)
FUNCTIONS = {
    "glm_hvp": (lambda x, a: glm_hvp(x, a["v"], a["weight"], l2=0.3, intercept=True), ("v", "weight")),
    "glm_hvp, columns": (lambda x, a: glm_hvp(x, a["vs"], a["weight"], l2=0.3, intercept=True), ("vs", "weight")),
    **{
        f"glm_value_grad, {loss}": (
            lambda x, a, loss=loss: glm_value_grad(
                x, a["target"], a["v"], loss=loss, sample_weight=a["c"], l2=0.3, intercept=True
            )[:2],
            ("v", "target", "c"),
        )
        for loss in ("logistic", "tweedie")
    },
    "softmax_hvp": (
        lambda x, a: softmax_hvp(x, a["vs"], a["probs"], sample_weight=a["c"], l2=0.3, intercept=True),
        ("vs", "probs", "c"),
    ),
    "softmax_value_grad": (
        lambda x, a: softmax_value_grad(x, CLASSES, a["vs"], sample_weight=a["c"], l2=0.3, intercept=True)[:2],
        ("vs", "c"),
    ),
}
CASES = [(name, by) for name, (_, names) in FUNCTIONS.items() for by in names]


def joined(results):
    """All results as one vector."""
    return torch.cat([r.reshape(-1) for r in (results if isinstance(results, tuple) else (results,))])


def dual(f, at, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(at, direction))).tangent


def tracked_gradient(f, at, direction):
    at = at.clone().requires_grad_()
    (g,) = torch.autograd.grad((f(at) ** 2).sum(), at)
    return g


def double_backward(f, at, direction):
    at = at.clone().requires_grad_()
    (g,) = torch.autograd.grad((f(at) ** 2).sum(), at, create_graph=True)
    return torch.autograd.grad((g * direction).sum(), at)[0]


def square(f):
    return lambda at: (f(at) ** 2).sum()


MODES = {
    "reverse": tracked_gradient,
    "double backward": double_backward,
    "forward": dual,
    "grad": lambda f, at, d: torch.func.grad(square(f))(at),
    "jvp": lambda f, at, d: torch.func.jvp(f, (at,), (d,))[1],
    "vjp": lambda f, at, d: torch.func.vjp(f, at)[1](torch.ones_like(f(at)))[0],
    "vmap": lambda f, at, d: torch.vmap(f)(torch.stack((at, at + d, at + 2 * d))),
    "vmap, last": lambda f, at, d: torch.vmap(f, in_dims=-1)(torch.stack((at, at + d), -1)),
    "jvp of grad": lambda f, at, d: torch.func.jvp(torch.func.grad(square(f)), (at,), (d,))[1],
    "vmap of grad": lambda f, at, d: torch.vmap(torch.func.grad(square(f)))(torch.stack((at, at + d))),
    "hessian": lambda f, at, d: torch.func.hessian(square(f))(at),
    "jacrev": lambda f, at, d: torch.func.jacrev(f)(at),
}


@pytest.mark.parametrize(("name", "by"), CASES)
def test_derivatives_are_those_of_the_dense_matrix(name, by):
    f, _ = FUNCTIONS[name]
    a = arguments()
    at, direction = a[by], torch.linspace(-0.04, 0.05, a[by].numel(), dtype=F64).view_as(a[by])
    sparse = DENSE.to_sparse_csr()
    for mode, transform in MODES.items():
        results = [transform(lambda t, x=x: joined(f(x, a | {by: t})), at, direction) for x in (sparse, DENSE)]
        assert results[1].abs().max() > 0
        torch.testing.assert_close(*results, msg=lambda m, mode=mode: f"{mode}: {m}")


def test_sparse_rows_that_require_a_derivative():
    """That of the products is dense, as torch has it; the objectives say that there is none."""
    a = arguments()
    x = DENSE.to_sparse_csr().requires_grad_()
    dense = DENSE.clone().requires_grad_()
    for name in ("glm_hvp", "glm_hvp, columns", "softmax_hvp"):
        for y in (x, dense):
            y.grad = None
            (joined(FUNCTIONS[name][0](y, a)) ** 2).sum().backward()
        torch.testing.assert_close(x.grad, dense.grad)
    for name in ("glm_value_grad, logistic", "softmax_value_grad"):
        op = name.split(",")[0]
        with pytest.raises(ValueError, match=rf"{op}: x: expected sparse rows that require no derivative"):
            FUNCTIONS[name][0](x, a)
        with torch.no_grad():
            torch.testing.assert_close(FUNCTIONS[name][0](x, a), FUNCTIONS[name][0](dense, a))


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
def test_a_kernel_without_memory_raises():
    """Buffers that no thread of a team can have: an exception here, and the next call works."""
    script = textwrap.dedent(
        """
        import resource, warnings
        import torch
        warnings.simplefilter("ignore")
        from secant.kernels.hvp import cpu
        rows, size = 2, 1 << 25
        logits, out = torch.zeros(rows, size), torch.empty(rows, size)
        d, k = 4, 1 << 21
        dense = torch.eye(d)
        v, product, weight = torch.zeros(d, k), torch.empty(d, k), torch.ones(d)
        probs = torch.zeros(d, k)
        sparse = dense.to_sparse_csr()
        small = torch.zeros(2, 3)
        cpu.cross_entropy_hvp(small, small, None, torch.empty(2, 3), threads=2)  # the threads exist
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        calls = [
            lambda: cpu.cross_entropy_hvp(logits, logits, None, out, threads=2),
            lambda: cpu.cross_entropy_hvp(logits, logits, None, out, threads=1),
            lambda: cpu.softmax_hvp(sparse, v, probs, None, 0.0, product, threads=2),
            lambda: cpu.softmax_hvp(dense, v, probs, None, 0.0, product, threads=2),
        ]
        for call in calls:
            try:
                call()
            except MemoryError:
                print("MemoryError")
            cpu.cross_entropy_hvp(small, small, None, torch.empty(2, 3), threads=2)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["MemoryError"] * 4
