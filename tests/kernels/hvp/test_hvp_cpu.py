"""The CPU kernels of the `hvp` family against the float64 reference, on every path that they have."""

from __future__ import annotations

import functools
import math
import types

import hvp_checks
import pytest
import torch
from hvp_oracle import (
    BF16,
    F16,
    F32,
    F64,
    LOSSES,
    Problem,
    cross_entropy_bound,
    csr,
    product_bound,
    shape_of,
    softmax_bound,
    softmax_value_grad_bounds,
    unit,
    value_grad_bounds,
)
from secant.kernels.hvp import cpu, reference

DTYPES = [F32, F64, BF16, F16]
SHAPES = [(1, 1), (2, 3), (7, 1), (9, 16), (33, 31), (64, 100), (777, 17), (260, 1030)]
COLUMNS = [1, 2, 3, 4, 5, 8, 9, 16, 23, 64]
#: Classes, whether there is an intercept, whether there are weights.
CLASSES = [(1, False, True), (2, True, False), (3, False, True), (10, True, True), (70, False, False)]


def poison(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def close(result, expected, bound):
    """Componentwise within the bound; what is compared first is that everything was written."""
    assert not result.isnan().any()
    excess = ((result.double() - expected).abs() - bound).max()
    assert excess <= 0, f"beyond the bound by {float(excess):.3g}"


def answer(function, *args, shape):
    """In float64."""
    out = poison(*shape, dtype=F64)
    function(*args, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("intercept", [False, True])
def test_glm_hvp(n, d, intercept, dtype):
    for k in COLUMNS if n < 100 else (1, 4, 6, 13, 64):
        problem = Problem(n, d, dtype, k, intercept=intercept)
        args = (problem.x, problem.v, problem.weight, 0.7)
        expected, bound = answer(reference.glm_hvp, *args, shape=problem.v.shape), product_bound(*args, dtype)
        for threads in (0, 1, 2):
            out = torch.full_like(problem.v, math.nan)
            cpu.glm_hvp(*args, out, threads=threads)
            close(out, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_glm_value_grad(n, d, loss, dtype):
    for intercept, weighted, threads in ((False, False, 0), (True, True, 1), (True, False, 2)):
        problem = Problem(n, d, dtype, intercept=intercept)
        coef, c = problem.v[:, 0].contiguous(), problem.sample_weight if weighted else None
        args = (problem.x, problem.target(loss), coef, loss, shape_of(loss, 0.6), c, 0.3)
        results, expected = (
            (poison(dtype=F64), poison(len(coef), dtype=t), poison(n, dtype=t)) for t in (problem.compute, F64)
        )
        cpu.glm_value_grad(*args, *results, threads=threads)
        reference.glm_value_grad(*args, *expected)
        for result, right, bound in zip(results, expected, value_grad_bounds(*args, dtype), strict=True):
            close(result, right, bound)


def check_softmax(x, dense, problem, c, threads):
    """Both functions of rows that `dense` has too, against the reference."""
    dtype, v = x.dtype, problem.v
    args = (v, problem.probs, c, 0.3)
    out = torch.full_like(v, math.nan)
    cpu.softmax_hvp(x, *args, out, threads=threads)
    close(out, answer(reference.softmax_hvp, dense, *args, shape=v.shape), softmax_bound(dense, *args, dtype))

    args = (problem.classes, v, c, 0.3)
    results, expected = (
        (poison(dtype=F64), poison(*v.shape, dtype=t), poison(*problem.probs.shape, dtype=t))
        for t in (problem.compute, F64)
    )
    cpu.softmax_value_grad(x, *args, *results, threads=threads)
    reference.softmax_value_grad(dense, *args, *expected)
    bounds = softmax_value_grad_bounds(dense, v, c, 0.3, dtype)
    for result, right, bound in zip(results, expected, bounds, strict=True):
        close(result, right, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_softmax(n, d, dtype):
    for k, intercept, weighted in CLASSES:
        problem = Problem(n, d, dtype, k, intercept=intercept)
        check_softmax(problem.x, problem.x, problem, problem.sample_weight if weighted else None, 1 + k % 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (2, 17), (5, 4095), (3, 4100), (1, 20000)])
def test_cross_entropy_hvp(rows, size, dtype):
    g = torch.Generator().manual_seed(size)
    logits, u = ((torch.randn(rows, size + 3, generator=g) * s).to(dtype)[:, :size] for s in (6, 1))
    out = poison(rows, size, dtype=F64)
    reference.cross_entropy_hvp(logits, u, None, out)
    bound = cross_entropy_bound(logits, u, dtype)
    compute = F64 if dtype is F64 else F32
    for lse in (None, logits.double().logsumexp(-1).to(compute)):
        result = poison(rows, size, dtype=dtype)
        cpu.cross_entropy_hvp(logits, u, lse, result, threads=2)
        # A log-sum-exp is rounded to the dtype of the arithmetic: relative to p, half its last place.
        rounded = 0 if lse is None else 2 * unit(dtype) * lse.double().abs()[:, None]
        close(result, out, bound * (1 + 8 * rounded / unit(dtype)))


@pytest.mark.parametrize("size", [1e4, 3e38, -1e4])
def test_cross_entropy_of_large_logits(size):
    logits = torch.zeros(2, 300)
    logits[0, 7], logits[1, :] = size, size
    u, out = torch.randn(2, 300), poison(2, 300, dtype=F32)
    cpu.cross_entropy_hvp(logits, u, None, out)
    assert out.isfinite().all()
    if size > 0:
        assert torch.equal(out[0], torch.zeros(300))  # one class has it all
    torch.testing.assert_close(out[1], (u[1] - u[1].mean()) / 300)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_logistic_loss_of_large_logits(dtype):
    x = torch.tensor([[1e4], [-1e4], [0.0], [700.0], [-700.0]], dtype=dtype)
    target = torch.tensor([0, 0, 1, 1, 1], dtype=dtype)
    value, grad, weight = poison(dtype=F64), poison(1, dtype=dtype), poison(5, dtype=dtype)
    cpu.glm_value_grad(x, target, torch.ones(1, dtype=dtype), "logistic", 1.0, None, 0.0, value, grad, weight)
    torch.testing.assert_close(float(value), 1e4 + math.log(2) + 700)
    torch.testing.assert_close(float(grad), 1e4 + 700.0)
    assert weight.tolist()[:3] == [0.0, 0.0, 0.25]
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_extremes(dtype):
    hvp_checks.large_logits(cpu, dtype)
    hvp_checks.not_a_number(cpu)
    hvp_checks.tails(cpu, dtype)
    hvp_checks.not_finite(cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_out_of_range(dtype):
    hvp_checks.classes_out_of_range(cpu, dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_exponential(dtype):
    """e^z through the Poisson loss, over the whole range, within 3 ulp; its limits as those of exp."""
    high = {F32: 88.7, F64: 709.7}[dtype]
    z = torch.cat((torch.linspace(-high * 1.2, high, 20001, dtype=F64), torch.randn(5000, dtype=F64))).to(dtype)
    n = len(z)
    value, grad, weight = poison(dtype=F64), poison(1, dtype=dtype), poison(n, dtype=dtype)
    zero = torch.zeros(n, dtype=dtype)
    cpu.glm_value_grad(z[:, None], zero, torch.ones(1, dtype=dtype), "poisson", 1.0, None, 0.0, value, grad, weight)
    expected = torch.exp(z.double())
    if dtype is F64:
        expected = torch.exp(z)
    finfo = torch.finfo(dtype)
    error = (weight.double() - expected).abs()
    assert (error <= 3 * finfo.eps / 2 * expected + finfo.smallest_normal * finfo.eps).all()
    ends = torch.tensor([[1000.0], [-1000.0], [math.inf], [-math.inf], [math.nan]], dtype=dtype)
    weight = poison(5, dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    cpu.glm_value_grad(ends, zero[:5], one, "poisson", 1.0, None, 0.0, value, grad, weight)
    assert weight.tolist()[:4] == [math.inf, 0.0, math.inf, 0.0]
    assert math.isnan(weight[4])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_half_is_widened_exactly(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()][None]
    d = x.shape[1]
    value, grad, weight = poison(dtype=F64), poison(d, dtype=F32), poison(1, dtype=F32)
    # z = 0 and t = -1: the gradient is the row itself.
    cpu.glm_value_grad(x, torch.tensor([-1.0]), torch.zeros(d), "squared", 1.0, None, 0.0, value, grad, weight)
    assert torch.equal(grad, x[0].float())


def test_results_in_half_precision_are_rounded_to_nearest():
    """Through cross entropy of two equal logits: out = (u - mean) / 2 for rows (u, -u) is u / 2."""
    u = torch.cat((torch.linspace(-3, 3, 4001), torch.logspace(-9, 4, 4000), torch.tensor([1e-8, 6e-8, 0.0])))
    for dtype in (BF16, F16):
        pairs = torch.stack((u, -u), 1).to(dtype)
        out = poison(len(u), 2, dtype=dtype)
        cpu.cross_entropy_hvp(torch.zeros_like(pairs), pairs, None, out)
        assert torch.equal(out, (pairs.float() / 2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_strided_and_repeated(dtype):
    problem = Problem(50, 13, dtype, 3)
    wide = torch.full((50, 29), math.nan, dtype=dtype)
    wide[:, 5:18] = problem.x
    one = problem.x[:1].expand(50, 13)
    for x in (wide[:, 5:18], one):
        a, b = (torch.full_like(problem.v, math.nan) for _ in range(2))
        cpu.glm_hvp(x, problem.v, problem.weight, 0.0, a)
        cpu.glm_hvp(x.contiguous(), problem.v, problem.weight, 0.0, b)
        assert torch.equal(a, b)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_same_input_gives_the_same_bits(k):
    problem = Problem(5000, 61, F32, k)
    outs = []
    for _ in range(5):
        outs.append(torch.full_like(problem.v, math.nan))
        cpu.glm_hvp(problem.x, problem.v, problem.weight, 0.1, outs[-1], threads=2)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_error_does_not_grow_with_the_rows():
    """A million rows that are all alike: the sum in float32 alone would be off by about 1e-3."""
    n = 1_000_000
    x, weight = torch.full((n, 1), 0.1), torch.full((n,), 0.3)
    out = poison(1, 1, dtype=F32)
    cpu.glm_hvp(x, torch.ones(1, 1), weight, 0.0, out)
    expected = n * float(weight[0]) * float(x[0]) ** 2
    assert abs(float(out) / expected - 1) < 600 * unit(F32)


def some_entries(x, density):
    """Zeros in the place of most entries, in whole rows and in whole columns."""
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < density
    if density < 1:
        kept[len(x) // 2 :: 7] = False
        kept[:, x.shape[1] // 2 :: 5] = False
    return torch.where(kept, x, 0)


SPARSE = [(torch.int32, 0.3), (torch.int64, 1.0), (torch.int64, 0.0)]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("index", "density"), SPARSE)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_sparse_rows(n, d, index, density, dtype):
    for k, intercept in ((1, True), (1, False), (3, True), (20, False)):
        problem = Problem(n, d, dtype, k, intercept=intercept)
        dense = some_entries(problem.x, density)
        sparse = csr(dense, index)
        args = (problem.v, problem.weight, 0.4)
        expected = answer(reference.glm_hvp, dense, *args, shape=problem.v.shape)
        for threads in (1, 2):
            out = torch.full_like(problem.v, math.nan)
            cpu.glm_hvp(sparse, *args, out, threads=threads)
            close(out, expected, product_bound(dense, *args, dtype))
        if k > 1:
            continue
        for loss in LOSSES:
            number = shape_of(loss, 0.6)
            args = (problem.target(loss), problem.v[:, 0].contiguous(), loss, number, problem.sample_weight, 0.3)
            results, right = (
                (poison(dtype=F64), poison(len(problem.v), dtype=t), poison(n, dtype=t)) for t in (dtype, F64)
            )
            cpu.glm_value_grad(sparse, *args, *results, threads=2)
            reference.glm_value_grad(dense, *args, *right)
            for result, y, bound in zip(results, right, value_grad_bounds(dense, *args, dtype), strict=True):
                close(result, y, bound)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("index", "density"), SPARSE)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_softmax_of_sparse_rows(n, d, index, density, dtype):
    for k, intercept, weighted in CLASSES:
        problem = Problem(n, d, dtype, k, intercept=intercept)
        dense = some_entries(problem.x, density)
        check_softmax(csr(dense, index), dense, problem, problem.sample_weight if weighted else None, 1 + (n + k) % 3)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_sparse_rows_of_large_logits(dtype):
    x = csr(torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0]], dtype=dtype))
    coef = torch.tensor([[5.0, 5.0, 5.0], [1e4, 0.0, -1e4]], dtype=dtype)
    value, grad, probs = poison(dtype=F64), poison(2, 3, dtype=dtype), poison(3, 3, dtype=dtype)
    cpu.softmax_value_grad(x, torch.tensor([2, 2, 1]), coef, None, 0.0, value, grad, probs)
    torch.testing.assert_close(float(value), 2e4 + math.log(3))
    assert probs[:2].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert grad.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]
    out = poison(2, 3, dtype=dtype)
    cpu.softmax_hvp(x, coef, probs, None, 0.5, out)
    assert torch.equal(out, 0.5 * coef)  # a certain class has no curvature, and the last row has no entry


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sparse_rows_give_the_same_bits(k, threads):
    """Wherever the entries lie, on every call."""
    problem = Problem(3000, 61, F32, k)
    sparse = csr(some_entries(problem.x, 0.2), torch.int32)
    parts = (sparse.crow_indices(), sparse.col_indices(), sparse.values())
    moved = [torch.cat((y[:3], y))[3:] for y in parts]
    apart = [torch.stack((y, y), 1)[:, 0] for y in parts]
    results = []
    for form in (parts, moved, apart, parts, parts):
        x = torch.sparse_csr_tensor(*form, sparse.shape, check_invariants=False)
        out, grad, probs = (torch.full_like(y, math.nan) for y in (problem.v, problem.v, problem.probs))
        value = poison(dtype=F64)
        cpu.softmax_hvp(x, problem.v, problem.probs, None, 0.1, out, threads=threads)
        cpu.softmax_value_grad(x, problem.classes, problem.v, None, 0.1, value, grad, probs, threads=threads)
        results.append((out, value, grad, probs))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n", "k1", "k2"), [(1, 1, 1, None), (9, 11, 7, 5), (90, 211, 7, 40), (300, 77, 5, None)])
def test_paired_matmul(m, n, k1, k2, dtype):
    hvp_checks.paired_matmul(cpu, m, n, k1, k2, dtype)


LAYOUTS = ["rows", "wide rows", "columns", "long columns", "spread", "one row"]
#: Around the widths of registers, panels and groups of panels of every instruction set, and of runs of rows.
GRAMS = [(1, 1), (3, 2), (2, 7), (9, 8), (256, 12), (7, 23), (257, 24), (30, 25), (300, 47), (515, 48), (40, 97)]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n"), GRAMS)
def test_gram(m, n, dtype):
    for i, layout in enumerate(LAYOUTS):
        for weighted in (False, True):
            hvp_checks.gram(cpu, m, n, dtype, layout, weighted, accumulate=(i + weighted) % 2 == 0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(5000, 3), (1100, 30), (2600, 230), (300, 401), (1, 130)])
def test_gram_in_threads(m, n, dtype):
    """Parts of the rows, parts of the triangle, and both; the same call gives the same bits."""
    for layout in ("rows", "columns"):
        for threads in (1, 2, 3, 5):
            few = types.SimpleNamespace(gram=functools.partial(cpu.gram, threads=threads))
            results = [hvp_checks.gram(few, m, n, dtype, layout, layout == "rows") for _ in range(2)]
            assert torch.equal(*results)


def test_gram_of_few_rows_has_the_same_bits_whatever_the_threads():
    """Rows are split from 1,024 on; up to there only the triangle is shared out."""
    x = torch.randn(1023, 300)
    results = [torch.full((300, 300), math.nan) for _ in range(3)]
    for threads, out in enumerate(results, 1):
        cpu.gram(x, None, False, out, threads=threads)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gram_of_odd_entries(dtype):
    hvp_checks.gram_of_odd_entries(cpu, dtype)


def test_the_error_of_gram_does_not_grow_with_the_rows():
    hvp_checks.gram_of_many_rows(cpu, 1_000_000)
