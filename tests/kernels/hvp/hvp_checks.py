"""What every GPU backend of the `hvp` family must do: one call of a backend on a device, against the reference.

Outputs arrive poisoned; what comes back is held to the bounds of `hvp_oracle.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hvp_oracle import (
    F32,
    F64,
    FUNCTION,
    Problem,
    arithmetic,
    cross_entropy_bound,
    gram_bound,
    product_bound,
    shape_of,
    softmax_bound,
    softmax_value_grad_bounds,
    unit,
    value_grad_bounds,
)
from secant.kernels.hvp import LOSSES, reference
from torch import Tensor

from placed import place


def run(backend: Any, name: str, args: tuple, shapes: list[tuple], device: str | torch.device = "cpu") -> list[Tensor]:
    """An op on a device, back on the CPU; `shapes` are (shape, dtype) of its outputs."""
    placed = [place(x, device) for x in args]
    outputs = [torch.full(shape, math.nan, dtype=dtype, device=device) for shape, dtype in shapes]
    getattr(backend, name)(*placed, *outputs)
    return [x.cpu() for x in outputs]


def compare(backend: Any, name: str, args: tuple, shapes: list[tuple], bounds: Any, device: Any) -> None:
    results = run(backend, name, args, shapes, device)
    expected = run(reference, name, args, [(shape, F64) for shape, _ in shapes])
    for result, right, bound in zip(results, expected, bounds, strict=True):
        assert not result.isnan().any()
        excess = ((result.double() - right).abs() - bound).max()
        assert excess <= 0, f"{name}: beyond the bound by {float(excess):.3g}"


def glm_hvp(backend: Any, n: int, d: int, k: int, dtype: Any, intercept: bool = False, device: Any = "cpu") -> None:
    problem = Problem(n, d, dtype, k, intercept=intercept)
    args = (problem.x, problem.v, problem.weight, 0.7)
    shapes = [(problem.v.shape, problem.compute)]
    compare(backend, "glm_hvp", args, shapes, [product_bound(*args, dtype)], device)


def glm_value_grad(
    backend: Any, n: int, d: int, dtype: Any, loss: str, intercept: bool = False, weighted: bool = True,
    device: Any = "cpu",
) -> None:  # fmt: skip
    problem = Problem(n, d, dtype, intercept=intercept)
    coef, c = problem.v[:, 0].contiguous(), problem.sample_weight if weighted else None
    args = (problem.x, problem.target(loss), coef, loss, shape_of(loss, 0.6), c, 0.3)
    shapes = [((), F64), (coef.shape, problem.compute), ((n,), problem.compute)]
    compare(backend, "glm_value_grad", args, shapes, value_grad_bounds(*args, dtype), device)


def softmax(
    backend: Any, n: int, d: int, k: int, dtype: Any, intercept: bool = False, weighted: bool = True,
    device: Any = "cpu",
) -> None:  # fmt: skip
    problem = Problem(n, d, dtype, k, intercept=intercept)
    c, v = problem.sample_weight if weighted else None, problem.v
    args = (problem.x, v, problem.probs, c, 0.3)
    compare(backend, "softmax_hvp", args, [(v.shape, problem.compute)], [softmax_bound(*args, dtype)], device)
    args = (problem.x, problem.classes, v, c, 0.3)
    shapes = [((), F64), (v.shape, problem.compute), ((n, k), problem.compute)]
    bounds = softmax_value_grad_bounds(problem.x, v, c, 0.3, dtype)
    compare(backend, "softmax_value_grad", args, shapes, bounds, device)


def cross_entropy(
    backend: Any, rows: int, size: int, dtype: Any, given: bool, pad: int = 3, device: Any = "cpu"
) -> None:
    """`pad`: entries between the rows."""
    g = torch.Generator().manual_seed(size)
    logits, u = ((torch.randn(rows, size + pad, generator=g) * s).to(dtype)[:, :size] for s in (6, 1))
    lse = logits.double().logsumexp(-1).to(arithmetic(dtype)) if given else None
    bound = cross_entropy_bound(logits, u, dtype)
    if lse is not None:
        # It is rounded to the dtype of the arithmetic: relative to p, half its last place.
        bound = bound * (1 + 16 * lse.double().abs()[:, None])
    compare(backend, "cross_entropy_hvp", (logits, u, lse), [((rows, size), dtype)], [bound], device)


def paired_matmul(backend: Any, m: int, n: int, k1: int, k2: int | None, dtype: Any, device: Any = "cpu") -> None:
    """All parts of the formula present, and none; both factors transposed views, and neither."""
    g = torch.Generator().manual_seed(m * n + k1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    a, b = normal(k1, m).mT, normal(k1, n)
    c, e = (None, None) if k2 is None else (normal(m, k2), normal(n, k2).mT)
    size = a.double().abs() @ b.double().abs()
    if c is not None:
        size = size + c.double().abs() @ e.double().abs()
    for bias, scale, p, q in (
        (normal(n), normal(m, n), normal(m, n), normal(m, n)),
        (None, None, normal(m, n), normal(m, n)),
        (normal(n), None, None, None),
        (None, None, None, None),
    ):
        bound = size + (0 if bias is None else bias.double().abs())
        bound = bound * (1 if scale is None else scale.double().abs())
        bound = (bound + (0 if p is None else (p * q).double().abs())) * (k1 + (k2 or 0) + 8) * unit(dtype)
        compare(backend, "paired_matmul", (a, b, c, e, bias, scale, p, q), [((m, n), dtype)], [bound], device)


def gram(
    backend: Any, m: int, n: int, dtype: Any, layout: str = "rows", weighted: bool = False, accumulate: bool = False,
    run: int = 256, device: Any = "cpu",
) -> Tensor:  # fmt: skip
    """Within the bound, symmetric bit for bit; of what it is added to, the upper triangle is never read."""
    g = torch.Generator().manual_seed(m * 31 + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    x = {
        "rows": lambda: normal(m, n),
        "wide rows": lambda: normal(m, n + 5)[:, 2 : n + 2],
        "columns": lambda: normal(n, m).mT,
        "long columns": lambda: normal(n, m + 3).mT[1 : m + 1],
        "spread": lambda: normal(m, 2 * n, 3)[:, ::2, 1],
        "one row": lambda: normal(1, n).expand(m, n),
    }[layout]()
    weight = normal(m) if weighted else None  # of either sign
    before = normal(n, n)
    lower = torch.tril(torch.ones(n, n, dtype=torch.bool))
    out = place(torch.where(lower, before if accumulate else math.nan * before, math.nan), device)
    backend.gram(*(place(t, device) for t in (x, weight)), accumulate, out)
    out = out.cpu()
    before = torch.where(lower, before, before.mT) if accumulate else torch.zeros_like(before)
    wide = x.double()
    expected = before.double() + wide.mT @ (wide if weight is None else weight.double()[:, None] * wide)
    assert torch.equal(out, out.mT)
    excess = ((out.double() - expected).abs() - gram_bound(x, weight, before, run)).max()
    assert excess <= 0, f"gram: beyond the bound by {float(excess):.3g}"
    return out


def gram_of_odd_entries(backend: Any, dtype: Any, device: Any = "cpu") -> None:
    """A NaN, or a weight that is one, reaches what its column or row reaches; infinities are what the formula makes."""

    def of(x: Tensor, weight: Tensor | None = None) -> Tensor:
        out = place(torch.full((x.shape[1],) * 2, math.nan, dtype=dtype), device)
        backend.gram(*(place(t, device) for t in (x, weight)), False, out)
        return out.cpu()

    for n, column in ((1, 0), (3, 1), (70, 65)):
        x = torch.randn(9, n, dtype=dtype)
        whole = of(x)
        x[4, column] = math.nan
        found, touched = of(x), torch.zeros(n, n, dtype=torch.bool)
        touched[column], touched[:, column] = True, True
        assert torch.equal(found.isnan(), touched)
        assert torch.equal(found[~touched], whole[~touched])
        x[4, column] = math.inf
        assert of(x)[column, column] == math.inf
        weight = torch.ones(9, dtype=dtype)
        weight[4] = 0
        assert of(x, weight)[column, column].isnan()  # zero times infinity
        x[4, column], weight[4] = 1, math.nan
        assert of(x, weight).isnan().all()


def gram_of_many_rows(backend: Any, m: int, run: int = 256, device: Any = "cpu") -> None:
    """Rows that are all alike, in float32: an error of a run and of the number of runs, or of a run alone."""
    x = torch.full((m, 3), 0.1)
    out = place(torch.full((3, 3), math.nan), device)
    backend.gram(place(x, device), None, False, out)
    error = (out.cpu().double() / (m * float(x[0, 0]) ** 2) - 1).abs().max()
    assert error <= (run + (0 if run == 256 else m / run) + 4) * unit(F32)


def strides(backend: Any, n: int, d: int, k: int, dtype: Any, device: Any = "cpu") -> None:
    """The same bits for rows anywhere, whatever their alignment, and for a row that all share."""
    problem = Problem(n, d, dtype, k)
    shapes = [(problem.v.shape, problem.compute)]
    wide = torch.full((n, 2 * d + 9), math.nan, dtype=dtype)
    for at in (0, 1, 4):
        wide[:, at : at + d] = problem.x
        apart, together = (
            run(backend, "glm_hvp", (x, problem.v, problem.weight, 0.1), shapes, device)[0]
            for x in (wide[:, at : at + d], problem.x)
        )
        assert torch.equal(apart, together)
    one = problem.x[:1].expand(n, d)
    shared, repeated = (
        run(backend, "glm_hvp", (x, problem.v, problem.weight, 0.1), shapes, device)[0] for x in (one, one.contiguous())
    )
    assert torch.equal(shared, repeated)


def large_logits(backend: Any, dtype: Any, device: Any = "cpu") -> None:
    """Predictions of 1e4: finite everywhere, and exact where they can be."""
    x = torch.tensor([[1e4], [-1e4], [0.0], [700.0], [-700.0]], dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    target = torch.tensor([0, 0, 1, 1, 1], dtype=dtype)
    shapes = [((), F64), ((1,), dtype), ((5,), dtype)]
    args = (x, target, one, "logistic", 1.0, None, 0.0)
    value, grad, weight = run(backend, "glm_value_grad", args, shapes, device)
    torch.testing.assert_close(float(value), 1e4 + math.log(2) + 700)
    torch.testing.assert_close(float(grad), 1e4 + 700.0)
    assert weight.tolist()[:3] == [0.0, 0.0, 0.25]
    assert weight.isfinite().all()
    # A certain and correct label costs log1p(e^-z), which float32 holds though 1 + e^-z is 1.
    args = (torch.full((1, 1), 40.0, dtype=dtype), one, one, "logistic", 1.0, None, 0.0)
    value, grad, weight = run(backend, "glm_value_grad", args, [((), F64), ((1,), dtype), ((1,), dtype)], device)
    torch.testing.assert_close(float(value), math.exp(-40), rtol=1e-5, atol=0)
    torch.testing.assert_close(float(grad), -40 * math.exp(-40), rtol=1e-5, atol=0)
    torch.testing.assert_close(float(weight), math.exp(-40), rtol=1e-5, atol=0)
    # poisson overflows as exp does.
    args = (torch.full((1, 1), 1e4, dtype=dtype), one, one, "poisson", 1.0, None, 0.0)
    value, _, weight = run(backend, "glm_value_grad", args, [((), F64), ((1,), dtype), ((1,), dtype)], device)
    assert float(value) == float(weight) == math.inf
    coef = torch.tensor([[1e4, 0.0, -1e4]], dtype=dtype)
    args = (torch.tensor([[1.0], [-1.0]], dtype=dtype), torch.tensor([2, 2]), coef, None, 0.0)
    value, grad, probs = run(backend, "softmax_value_grad", args, [((), F64), ((1, 3), dtype), ((2, 3), dtype)], device)
    assert float(value) == 2e4
    assert probs.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert grad.tolist() == [[1.0, 0.0, -1.0]]
    for size in (1e4, 3e38, -1e4):
        logits = torch.zeros(2, 300, dtype=dtype)
        logits[0, 7], logits[1, :] = size, size
        u = torch.linspace(-1, 2, 600, dtype=dtype).view(2, 300)
        (out,) = run(backend, "cross_entropy_hvp", (logits, u, None), [((2, 300), dtype)], device)
        assert out.isfinite().all()
        if size > 0:
            assert not out[0].any()  # one class has it all
        torch.testing.assert_close(out[1], (u[1] - u[1].mean()) / 300, rtol=1e-5, atol=1e-8)


def not_a_number(backend: Any, device: Any = "cpu") -> None:
    """A NaN in a row reaches what that row reaches; -inf among the logits is a probability of zero."""
    problem = Problem(20, 6, F32)
    problem.x[3, 2] = math.nan
    (out,) = run(backend, "glm_hvp", (problem.x, problem.v, problem.weight, 0.0), [((6, 1), F32)], device)
    assert out.isnan().all()
    for loss in LOSSES:
        args = (problem.x, problem.binary, problem.v[:, 0].contiguous(), loss, shape_of(loss, 0.5), None, 0.0)
        value, grad, _ = run(backend, "glm_value_grad", args, [((), F64), ((6,), F32), ((20,), F32)], device)
        assert value.isnan()
        assert grad.isnan().all()
    logits, u = torch.randn(3, 90), torch.randn(3, 90)
    logits[0, :70], logits[1, 5] = -math.inf, math.nan
    expected = run(reference, "cross_entropy_hvp", (logits, u, None), [((3, 90), F64)])[0]
    (out,) = run(backend, "cross_entropy_hvp", (logits, u, None), [((3, 90), F32)], device)
    assert out[1].isnan().all()
    assert not out[0, :70].any()
    torch.testing.assert_close(out[::2].double(), expected[::2], rtol=1e-5, atol=1e-6)


def tails(backend: Any, dtype: Any, device: Any = "cpu") -> None:
    """A row's results keep their digits where the loss has almost none left: relative errors of a few roundings."""
    few = FUNCTION * unit(dtype)
    most = 80.0 if dtype is F32 else 700.0
    sizes = [0.0, 0.5, 5.0, 25.0, 40.0, most]
    # Rows of a diagonal matrix: each has an entry of the gradient to itself.
    z = torch.tensor([s for size in sizes for s in (size, -size)], dtype=F64)
    e = torch.exp(-z.abs())
    for t in (0.0, 1.0, 0.25):
        # sigmoid(z) - t, in terms of the smaller of sigmoid(z) and sigmoid(-z) alone.
        small = e / (1 + e)
        slope = torch.where(z > 0, (1 - t) - small, small - t)
        for scale in (None, 0.5):
            c = None if scale is None else torch.full((len(z),), scale, dtype=dtype)
            args = (z.diag().to(dtype), torch.full((len(z),), t, dtype=dtype), torch.ones(len(z), dtype=dtype))
            shapes = [((), F64), (z.shape, dtype), (z.shape, dtype)]
            _, grad, weight = run(backend, "glm_value_grad", (*args, "logistic", 1.0, c, 0.0), shapes, device)
            torch.testing.assert_close(grad.double(), (scale or 1) * z * slope, rtol=few, atol=0)
            torch.testing.assert_close(weight.double(), (scale or 1) * small / (1 + e), rtol=few, atol=0)
    one, shapes = torch.ones(1, dtype=dtype), [((), F64), ((1,), dtype), ((1,), dtype)]
    for size in sizes:
        for sign in (1, -1):
            args = (torch.full((1, 1), sign * size, dtype=dtype), one * (sign > 0), one, "logistic", 1.0, None, 0.0)
            value = run(backend, "glm_value_grad", args, shapes, device)[0]
            torch.testing.assert_close(float(value), math.log1p(math.exp(-size)), rtol=few, atol=0)
    # The target is the likeliest of three classes: p - 1 is minus what the others have.
    for size in sizes[1:]:
        for target in (0, 1):
            coef = torch.tensor([[0.0, -size, -size - 1]], dtype=dtype)
            order = [0, 1, 2] if target == 0 else [1, 0, 2]
            args = (torch.ones(1, 1, dtype=dtype), torch.tensor([target]), coef[:, order].contiguous(), None, 0.0)
            shapes = [((), F64), ((1, 3), dtype), ((1, 3), dtype)]
            value, grad, probs = run(backend, "softmax_value_grad", args, shapes, device)
            low = torch.exp(-torch.tensor([size, size + 1], dtype=F64))
            torch.testing.assert_close(float(value), math.log1p(float(low.sum())), rtol=few, atol=0)
            p = torch.tensor([1.0, *low], dtype=F64) / (1 + low.sum())
            torch.testing.assert_close(probs[0, order].double(), p, rtol=few, atol=1e-300)
            p[0] = -(p[1] + p[2])
            torch.testing.assert_close(grad[0, order].double(), p, rtol=few, atol=torch.finfo(dtype).tiny)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0, 1.0, -2.0)


def not_finite(backend: Any, dtype: Any, device: Any = "cpu") -> None:
    """NaN and infinity among predictions, targets, logits and vectors: what the reference makes of them."""

    def same(name: str, args: tuple, shapes: list[tuple]) -> None:
        results = run(backend, name, args, shapes, device)
        expected = run(reference, name, args, [(shape, F64) for shape, _ in shapes])
        for i, (result, right) in enumerate(zip(results, expected, strict=True)):
            message = f"{name}, result {i}: {result.tolist()}, expected {right.tolist()} for {args}"
            torch.testing.assert_close(result.double(), right, rtol=1e-5, atol=1e-6, equal_nan=True, msg=message)

    def row(*entries: float) -> Tensor:
        return torch.tensor(entries, dtype=dtype)

    shapes = [((), F64), ((1,), dtype), ((1,), dtype)]
    for z, t, loss in itertools.product(SPECIAL, SPECIAL, LOSSES):
        same("glm_value_grad", (row(z)[:, None], row(t), row(1.0), loss, shape_of(loss, 1.5), None, 0.0), shapes)
    shapes = [((), F64), ((1, 3), dtype), ((1, 3), dtype)]
    for odd, target in itertools.product(SPECIAL[:3], range(3)):
        for logits in (row(odd, 1.0, 2.0), row(1.0, odd, odd), row(odd, odd, odd)):
            args = (torch.ones(1, 1, dtype=dtype), torch.tensor([target]), logits[None], None, 0.0)
            same("softmax_value_grad", args, shapes)
    for odd, u_odd in itertools.product(SPECIAL[:3], SPECIAL):
        for logits in (row(odd, 1.0, 2.0), row(1.0, odd, odd), row(odd, odd, odd), row(0.0, 0.0, 1.0)):
            for lse in (None, row(1.0), logits.logsumexp(0, keepdim=True)):
                same("cross_entropy_hvp", (logits[None], row(1.0, u_odd, 0.5)[None], lse), [((1, 3), dtype)])


def classes_out_of_range(backend: Any, dtype: Any, device: Any = "cpu") -> None:
    """A target that is no class: nothing is read or written for it, value and gradient are NaN, the rest is right."""
    for n, k in ((5, 3), (40, 20)):
        problem = Problem(n, 4, dtype, k)
        shapes = [((), F64), (problem.v.shape, problem.compute), ((n, k), problem.compute)]
        right = run(backend, "softmax_value_grad", (problem.x, problem.classes, problem.v, None, 0.0), shapes, device)
        for wrong in (-1, k, k + 13, 2**31, 2**32, 2**32 + 1, 2**62, -(2**32) + 1, -(2**63)):
            classes, c = problem.classes.clone(), torch.ones(n, dtype=problem.compute)
            classes[n // 2], c[n // 2] = wrong, 0
            for weights in (None, c):
                args = (problem.x, classes, problem.v, weights, 0.0)
                value, grad, probs = run(backend, "softmax_value_grad", args, shapes, device)
                assert value.isnan()
                assert grad.isnan().all()
                torch.testing.assert_close(probs, right[2], rtol=4 * FUNCTION * unit(dtype), atol=0)


def rounding_to_half(backend: Any, dtype: Any, values: Tensor, device: Any = "cpu") -> None:
    """Two equal logits and u = (h, -h) make (h / 2, -h / 2): every h widened exactly and h / 2 rounded to nearest."""
    pairs = torch.stack((values, -values), 1).to(dtype)
    args = (torch.zeros_like(pairs), pairs, None)
    (out,) = run(backend, "cross_entropy_hvp", args, [(pairs.shape, dtype)], device)
    assert torch.equal(out, (pairs.float() / 2).to(dtype))


def many_rows(backend: Any, n: int, device: Any = "cpu") -> None:
    """Rows that are all alike: a sum in float32 alone is off by about n / 1e9, runs of 512 by a unit each."""
    x, weight = torch.full((n, 1), 0.1), torch.full((n,), 0.3)
    (out,) = run(backend, "glm_hvp", (x, torch.ones(1, 1), weight, 0.0), [((1, 1), F32)], device)
    expected = n * float(weight[0]) * float(x[0]) ** 2
    assert abs(float(out) / expected - 1) < 520 * unit(F32)
