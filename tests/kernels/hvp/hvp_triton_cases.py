"""Cases that `test_hvp_triton.py` runs in a process of their own: see `triton_runner.py`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import hvp_checks as checks
from hvp_oracle import BF16, F16, F32, F64, LOSSES, Problem
from secant.kernels.hvp import triton as backend

from triton_runner import Cases, arguments

CASES = Cases()
case = CASES.case

device = torch.device("cpu")


@contextlib.contextmanager
def tuned(**values: int) -> Iterator[None]:
    """The backend with other constants."""
    backend._plan.cache_clear()
    try:
        with mock.patch.multiple(backend, **values):
            yield
    finally:
        backend._plan.cache_clear()


SHAPES = [(1, 1, 1), (7, 1, 3), (33, 31, 1), (70, 9, 5), (40, 130, 2)]


@case(*((*shape, t, i) for shape, t, i in zip(SHAPES, (F32, F64, BF16, F16, F32), (0, 1, 1, 0, 1), strict=True)))
@case((40, 130, 1, F32, 1), (9, 10, 64, F32, 0), (33, 31, 1, F64, 0), slow=True)
def products(n, d, k, dtype, intercept):
    checks.glm_hvp(backend, n, d, k, dtype, bool(intercept), device)


@case(*((n, d, t, loss) for (n, d, t) in ((33, 17, F32), (9, 3, F64)) for loss in LOSSES), (20, 40, BF16, "logistic"))
def values_and_gradients(n, d, dtype, loss):
    for intercept, weighted in ((False, True), (True, False)):
        checks.glm_value_grad(backend, n, d, dtype, loss, intercept, weighted, device)


@case((1, 1, 1, F32), (33, 17, 3, F32), (20, 5, 10, F64), (20, 40, 2, BF16))
@case((9, 3, 70, F32), slow=True)
def classes(n, d, k, dtype):
    for intercept, weighted in ((False, True), (True, False)):
        checks.softmax(backend, n, d, k, dtype, intercept, weighted, device)


@case((F32,), (F64,))
def slabs_of_columns(dtype):
    """Rows of X longer than a program holds; the last slab may be the intercept's neighbour alone."""
    with tuned(_ELEMENTS=64, _SLAB=32):
        for d in (70, 96):
            checks.glm_hvp(backend, 19, d, 1, dtype, True, device)
        checks.glm_hvp(backend, 19, 70, 6, dtype, False, device)
        checks.glm_value_grad(backend, 19, 70, dtype, "logistic", True, True, device)
        checks.softmax(backend, 19, 70, 5, dtype, True, True, device)


@case()
def runs_and_chunks():
    """Few rows to a tile, two tiles to a run, and a workspace that takes few rows at a time."""
    with tuned(_TILE=64, _RUN=2, _FEWEST_TILES=1):
        checks.glm_hvp(backend, 23, 13, 3, F32, True, device)
        with tuned(_WORKSPACE=300, _ELEMENTS=16, _SLAB=16):
            checks.glm_hvp(backend, 40, 20, 1, F32, True, device)
            checks.glm_value_grad(backend, 40, 20, F32, "huber", True, True, device)
            checks.softmax(backend, 11, 20, 2, F32, True, True, device)


@case(*((rows, size, t) for rows, size, t in ((1, 1, F32), (3, 17, F64), (2, 1000, BF16), (2, 500, F16))))
def rows_of_logits(rows, size, dtype):
    for given in (False, True):
        checks.cross_entropy(backend, rows, size, dtype, given, device=device)


@case((F32,), (F64,), (BF16,))
def long_rows_of_logits(dtype):
    """More entries than a program holds: read twice, in blocks."""
    with tuned(_ROW=64, _ROW_BLOCK=64):
        for size in (65, 128, 500):
            for given in (False, True):
                checks.cross_entropy(backend, 2, size, dtype, given, device=device)


@case((1, 1, 1, 1, F32), (5, 7, 3, None, F32), (70, 65, 40, 33, F32), (35, 40, 33, 9, F64))
def paired_products(m, n, k1, k2, dtype):
    checks.paired_matmul(backend, m, n, k1, k2, dtype, device)


@case((F32,), (F64,))
def products_of_many_terms(dtype):
    """Split over programs, one of which may find no term of the second product."""
    with tuned(_PRODUCT_TERMS=32):
        for k2 in (None, 20):
            checks.paired_matmul(backend, 20, 30, 200, k2, dtype, device)


@case((1, 1, F32), (5, 7, F64), (70, 65, F32), (40, 130, F32), (33, 70, F64))
def grams(m, n, dtype):
    for i, layout in enumerate(("rows", "columns", "spread")):
        checks.gram(backend, m, n, dtype, layout, i != 1, i > 0, run=512, device=device)


@case((F32,), (F64,))
def grams_of_many_rows(dtype):
    """Split over programs, and in runs."""
    with tuned(_PRODUCT_TERMS=32, _GRAM_RUN=64):
        for accumulate in (False, True):
            checks.gram(backend, 300, 20, dtype, "rows", True, accumulate, run=64, device=device)
    checks.gram_of_odd_entries(backend, dtype, device)


@case(slow=True)
def error_of_grams_does_not_grow_with_the_rows():
    checks.gram_of_many_rows(backend, 50_000, run=512, device=device)


@case((5, 1), (33, 3))
def rows_may_be_strided_and_repeated(d, k):
    checks.strides(backend, 9, d, k, F32, device)


@case((F32,), (F64,))
def extremes(dtype):
    checks.large_logits(backend, dtype, device)
    checks.not_a_number(backend, device)
    checks.tails(backend, dtype, device)
    checks.not_finite(backend, dtype, device)
    checks.classes_out_of_range(backend, dtype, device)


@case((BF16,), (F16,))
def halves(dtype):
    """Widened exactly and rounded to nearest even, subnormal numbers and the largest among them."""
    bits = torch.arange(-(2**15), 2**15, 1021 if device.type == "cpu" else 1, dtype=torch.int32)
    values = bits.to(torch.int16).view(dtype)
    checks.rounding_to_half(backend, dtype, values[values.isfinite()].float(), device)


@case()
def error_does_not_grow_with_the_rows():
    checks.many_rows(backend, 100_000, device)


@case(slow=True)
def more_rows_still():
    checks.many_rows(backend, 1_000_000, device)


# ------------------------------------------------------------------------------------------------------------------ GPU


@case((1,), (8,), (64,), gpu=True)
def large_problems(k):
    for d in (257, 1024, 5000, 20_000):
        for dtype in (F32, BF16, F64):
            checks.glm_hvp(backend, 3000, d, k, dtype, True, device)


@case((1, 300), (5, 300), (1, 20_000), gpu=True)
def captured_in_a_graph(k, d):
    problem = Problem(5000, d, F32, k)
    x, v, weight = (t.to(device) for t in (problem.x, problem.v, problem.weight))
    out = torch.empty_like(v)
    backend.glm_hvp(x, v, weight, 0.1, out)
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.glm_hvp(x, v, weight, 0.1, out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)


if __name__ == "__main__":
    device, names = arguments()
    torch.use_deterministic_algorithms(True)  # what torch allocates without a value is NaN
    CASES.run(device, names)
