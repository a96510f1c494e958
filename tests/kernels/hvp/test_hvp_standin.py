"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h: every kernel, within the bounds of the oracle."""

from __future__ import annotations

import itertools
import os
from typing import Any

import hvp_checks as checks
import pytest
import torch
from hvp_oracle import BF16, F16, F32, F64, LOSSES, Problem
from secant.kernels._cuda_driver import Device
from secant.kernels.hvp import plan, reference

from reruns import under_address_sanitizer

DEVICE = Device(multiprocessors=3, shared=100_000)
TABLE = """
#define SECANT_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
#define SECANT_TILE(K, E, TAG, C, T) SECANT_ROW(SECANT_HVP_TILE_NAME(K, E, TAG), OfX)
#define SECANT_LINE(TAG, C, T) SECANT_ROW(SECANT_HVP_OTHER_NAME(cross_entropy, TAG), CrossEntropy)
#define SECANT_REST(TAG, C) \\
  SECANT_ROW(SECANT_HVP_OTHER_NAME(between, TAG), OfX) SECANT_ROW(SECANT_HVP_OTHER_NAME(finish, TAG), OfX) \\
  SECANT_ROW(SECANT_HVP_OTHER_NAME(product, TAG), Product) SECANT_ROW(SECANT_HVP_OTHER_NAME(sum, TAG), Product) \\
  SECANT_ROW(SECANT_HVP_OTHER_NAME(gram, TAG), Gram) SECANT_ROW(SECANT_HVP_OTHER_NAME(gram_sum, TAG), Gram)
static const secant_standin::Kernel kKernels[] = {
    SECANT_HVP_TILES(SECANT_TILE) SECANT_HVP_CROSS_ENTROPY(SECANT_LINE) SECANT_HVP_REST(SECANT_REST)};
SECANT_STANDIN_EXPORT(kKernels)
"""
SEEDS = range(3)
#: (k, d) of every shape of hvp_tile, for 4 and for 8 bytes a number.
SHAPES = {
    F32: {(1, 1): (1, 200), (1, 4): (1, 785), (1, 16): (1, 3000), (1, 64): (1, 5000), (4, 1): (3, 250),
          (4, 4): (4, 600), (4, 16): (2, 1100), (8, 1): (8, 100), (8, 4): (6, 500), (16, 1): (10, 200),
          (16, 4): (16, 700)},
    F64: {(1, 1): (1, 200), (1, 4): (1, 785), (1, 16): (1, 3000), (4, 1): (4, 100), (4, 4): (3, 600), (8, 1): (8, 100),
          (8, 4): (7, 500), (16, 1): (12, 99)},
}  # fmt: skip
SHAPES[BF16] = SHAPES[F16] = SHAPES[F32]


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("hvp", TABLE)


@pytest.fixture
def make(library, standin_driver):
    """make(seed, device): the launcher on the stand-in, with the threads in the order of that seed."""
    return lambda seed=0, device=DEVICE: plan.Launcher(standin_driver(library, device, seed))


@pytest.fixture(autouse=True)
def _workspaces_arrive_poisoned():
    """What torch allocates without a value is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def kernels_of(backend: Any) -> list[str]:
    return [item.kernel for item in backend.driver.log]


@pytest.mark.parametrize(
    ("dtype", "shape"), [(dtype, shape) for dtype, found in SHAPES.items() for shape in found], ids=str
)
def test_every_shape_of_the_tile(make, dtype, shape):
    k, d = SHAPES[dtype][shape]
    n = 5 if d > 2000 else 11
    tag, arithmetic = plan.TYPES[dtype][:2]
    for intercept in (False, True) if dtype in (F32, BF16) else (True,):
        backend = make(d % 3)
        checks.glm_hvp(backend, n, d, k, dtype, intercept)
        assert kernels_of(backend) == [f"hvp_tile_{shape[0]}x{shape[1]}_{tag}", f"hvp_finish_{arithmetic}"]
    if k == 1:
        checks.glm_value_grad(make(), n, d, dtype, LOSSES[(d + 2 * n) % len(LOSSES)], True)
    else:
        checks.softmax(make(), n, d, k, dtype, True)


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 1), (9, 16), (33, 100), (777, 17)])
def test_small_problems(make, n, d, dtype):
    checks.glm_hvp(make(1), n, d, 1, dtype)
    checks.glm_hvp(make(2), n, d, 5, dtype, True)
    for loss in LOSSES if n < 100 else LOSSES[:2]:
        checks.glm_value_grad(make(), n, d, dtype, loss, loss != "squared", loss != "huber")
    checks.softmax(make(), n, d, 3, dtype, d == 16, n == 33)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(20, 5, 33), (5, 40, 64)])
def test_groups_of_columns(make, n, d, k, dtype):
    """More columns of V than a block has: groups for glm_hvp, two launches for softmax."""
    backend = make(k % 3)
    checks.glm_hvp(backend, n, d, min(k, 64), dtype, True)
    assert len(backend.driver.log) == 2
    backend = make()
    checks.softmax(backend, n, d, k, dtype, True)
    assert len(backend.driver.log) == 8


@pytest.fixture
def narrow(monkeypatch):
    """A planner whose blocks hold no more than a slab of columns."""
    plan.plan_of_x.cache_clear()
    monkeypatch.setattr(plan, "SHAPES", {1: (1, 4), 4: (1, 4), 8: (1, 4), 16: (1, 4)})
    yield
    plan.plan_of_x.cache_clear()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_slabs_of_columns(make, narrow, dtype):
    """Rows that are too long for a block."""
    backend = make(1)
    checks.glm_hvp(backend, 7, 1500, 1, dtype)
    assert [name.split("_")[1] for name in kernels_of(backend)] == ["tile", "between", "tile", "finish"]
    checks.glm_value_grad(make(), 7, 1500, dtype, "logistic", True)
    checks.glm_hvp(make(2), 5, 1100, 9, dtype, True)
    checks.softmax(make(), 5, 1100, 5, dtype, True)


def test_a_slab_of_the_intercept_alone(make, narrow):
    checks.glm_hvp(make(), 5, 2 * plan.SLAB, 1, F32, True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_long_rows(make, dtype):
    checks.glm_hvp(make(), 7, 17000, 1, dtype, True)
    checks.softmax(make(), 9, 2048, 12, dtype, True)


@pytest.mark.parametrize("workspace", [200, 2000])
def test_chunks_of_rows(make, narrow, monkeypatch, workspace):
    """A small workspace: X V of a few rows at a time, and few blocks share the rows."""
    monkeypatch.setattr(plan, "WORKSPACE", workspace)
    backend = make()
    checks.glm_hvp(backend, 150, 1100, 1, F64, True)
    assert len(backend.driver.log) > 4 or workspace > 200
    checks.glm_value_grad(make(), 150, 1100, F32, "poisson", True)
    checks.softmax(make(), 100, 30, 20, F32, True)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (2, 17), (5, 1000), (3, 4096), (1, 20000), (2, 30000)])
def test_cross_entropy(make, rows, size, dtype):
    """Aligned rows and others; rows that fit in shared memory, and a row of which a part is read twice."""
    for pad, given in itertools.product((0, 3), (False, True)):
        checks.cross_entropy(make(size % 3), rows, size, dtype, given, pad)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n", "k1", "k2"), [(1, 1, 1, 1), (5, 7, 3, None), (130, 65, 40, 33), (70, 129, 9, None)])
def test_paired_matmul(make, m, n, k1, k2, dtype):
    backend = make(m % 3)
    checks.paired_matmul(backend, m, n, k1, k2, dtype)
    assert kernels_of(backend) == [f"hvp_product_{plan.TYPES[dtype][0]}"] * 4


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_products_of_many_terms_are_split(make, monkeypatch, dtype):
    monkeypatch.setattr(plan, "FEWEST_TERMS", 32)
    for k2 in (None, 20, 300):
        backend = make()
        checks.paired_matmul(backend, 20, 30, 200, k2, dtype)
        assert kernels_of(backend)[:2] == [f"hvp_{kind}_{plan.TYPES[dtype][0]}" for kind in ("product", "sum")]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 7), (530, 65), (9, 129), (20, 260)])
def test_gram(make, m, n, dtype):
    for i, layout in enumerate(("rows", "columns", "spread")):
        backend = make(i)
        checks.gram(backend, m, n, dtype, layout, i != 1, i > 0, run=512)
        assert kernels_of(backend) == [f"hvp_gram_{plan.TYPES[dtype][0]}"]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gram_of_many_rows_is_split(make, monkeypatch, dtype):
    monkeypatch.setattr(plan, "FEWEST_TERMS", 32)
    for accumulate in (False, True):
        backend = make()
        checks.gram(backend, 200, 33, dtype, weighted=True, accumulate=accumulate, run=512)
        assert kernels_of(backend) == [f"hvp_{kind}_{plan.TYPES[dtype][0]}" for kind in ("gram", "gram_sum")]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gram_of_odd_entries(make, dtype):
    checks.gram_of_odd_entries(make(), dtype)


def test_the_error_of_gram_does_not_grow_with_the_rows(make):
    checks.gram_of_many_rows(make(), 50_000, run=512)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("d", "k"), [(5, 1), (33, 3), (785, 1), (300, 10)])
def test_rows_may_be_strided_and_repeated(make, d, k, dtype):
    """The alignment of rows changes the copies alone, as long as tiles hold as many rows."""
    checks.strides(make(), 9, d, k, dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_extremes(make, dtype):
    checks.large_logits(make(), dtype)
    checks.not_a_number(make())
    checks.tails(make(), dtype)
    checks.not_finite(make(), dtype)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_classes_out_of_range(make, dtype):
    checks.classes_out_of_range(make(), dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_half(make, dtype):
    bits = torch.arange(-(2**15), 2**15, 211, dtype=torch.int32).to(torch.int16).view(dtype)
    checks.rounding_to_half(make(), dtype, bits[bits.isfinite()].float())


def test_the_error_does_not_grow_with_the_rows(make):
    checks.many_rows(make(), 200_000)


@pytest.mark.parametrize("k", [1, 3])
def test_the_order_of_threads_changes_nothing(make, k):
    for d in (7, 300):
        problem = Problem(150, d, F32, k)
        args, shapes = (problem.x, problem.v, problem.weight, 0.1), [(problem.v.shape, F32)]
        first, *others = (checks.run(make(seed), "glm_hvp", args, shapes)[0] for seed in SEEDS)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_the_planner_keeps_its_promises(dtype, shared):
    """Shared memory, sums and X V within their limits, float32 runs of at most 256 rows, every row taken once."""
    device, known = Device(132, shared), set(plan.kernels())
    tag, _, stored, size, _ = plan.TYPES[dtype]
    for n, d, k in itertools.product(
        (1, 1000, 10**6 + 7, 2 * 10**9), (1, 10, 256, 784, 1024, 4097, 16384, 10**5), (1, 2, 8, 10, 64, 1000)
    ):
        for coupled, flat, extra in itertools.product((False, True), repeat=3):
            if k > 64 and not coupled:
                continue
            length = d + extra
            shape, splits, chunk = plan.plan_of_x(device, tag, stored, size, n, d, length, k, coupled, flat)
            assert f"hvp_tile_{shape.k}x{shape.e}_{tag}" in known
            assert shape.shared <= shared
            assert shape.shared <= shared // shape.blocks
            assert 1 <= shape.rows <= plan.BLOCK
            assert shape.width <= plan.BLOCK * shape.e
            assert shape.slabs * shape.width >= length
            assert shape.groups * shape.k >= k
            assert splits == 1 or splits * k * length * 8 <= plan.WORKSPACE
            assert splits * shape.slabs * shape.groups <= max(
                device.multiprocessors * shape.blocks, shape.slabs * shape.groups
            )
            apart = shape.slabs > 1 or (coupled and shape.groups > 1)
            assert chunk == n or shape.slabs * chunk * k * size <= plan.WORKSPACE or chunk == shape.rows
            assert apart or chunk == n
            each = plan._each(chunk, splits, shape.rows)
            assert (splits - 1) * each < chunk <= splits * each
            run = max(1, plan.RUN // -(-shape.rows // shape.slices))
            assert run * -(-shape.rows // shape.slices) <= plan.RUN


def detected(make: Any, call: Any, seed: int) -> bool:
    """Whether a mutated kernel misses the bounds, is stopped by the stand-in, or crashes."""
    child = os.fork()
    if child == 0:
        found = 1
        try:
            torch.set_num_threads(1)
            call(make(seed))
            found = 0
        finally:
            os._exit(found)
    return os.waitpid(child, 0)[1] != 0


CALLS = {
    "tile": lambda backend: checks.glm_value_grad(backend, 600, 40, F32, "logistic", True),
    "product": lambda backend: checks.paired_matmul(backend, 30, 30, 60, 20, F32),
    "row": lambda backend: checks.cross_entropy(backend, 3, 900, F32, False),
}
MUTATIONS = {
    "the tile in hand": ("tile", "    __syncthreads();  // the tile is here, and the other one has been used\n", ""),
    "X V": ("tile", "rows, width, z);\n      __syncthreads();\n", "rows, width, z);\n"),
    "f of X V": ("tile", "    if (!a.gather) continue;\n    __syncthreads();\n", "    if (!a.gather) continue;\n"),
    "sums of threads that share a column": ("tile", "      __syncthreads();  // z has been read\n", ""),
    "all sums of a column": ("tile", "+ c] = acc[c];\n      __syncthreads();\n", "+ c] = acc[c];\n"),
    "splits of the result": ("tile", ".x] = total;\n  __syncthreads();\n", ".x] = total;\n"),
    "terms in use": ("product", "    __syncthreads();  // the terms before have been used\n", ""),
    "terms to come": ("product", "from_right.along, w);\n    __syncthreads();\n", "from_right.along, w);\n"),
    "largest logit": ("row", "board[thread / 32] = most;\n      __syncthreads();\n", "board[thread / 32] = most;\n"),
    "sums of warps": ("row", "board[threadIdx.x / 32u] = x;\n  __syncthreads();\n", "board[threadIdx.x / 32u] = x;\n"),
}  # fmt: skip
FEW = """
#define SECANT_HVP_TILES(X) X(1, 1, f32, float, float)
#define SECANT_HVP_CROSS_ENTROPY(X) X(f32, float, float)
#define SECANT_HVP_REST(X) X(f32, float)
"""


#: Each compiles the source: two of them every time, all of them with the long proofs.
SOME_MUTATIONS = [pytest.param(name, marks=[pytest.mark.slow] * (i > 1)) for i, name in enumerate(MUTATIONS)]


@pytest.mark.parametrize("name", SOME_MUTATIONS)
def test_mutations_are_found(build_standin, standin_driver, name):
    """One barrier less, and every one of three orders of threads shows it."""
    call, old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert text.count(old) == 1
        return text.replace(old, new)

    library = build_standin("hvp", TABLE, edit, FEW)

    def make(seed: int) -> plan.Launcher:
        return plan.Launcher(standin_driver(library, DEVICE, seed))

    assert [detected(make, CALLS[call], seed) for seed in SEEDS] == [True] * 3


@pytest.mark.parametrize("name", CALLS)
def test_without_mutation_nothing_is_found(make, name):
    assert not any(detected(make, CALLS[name], seed) for seed in SEEDS)


def test_reference_is_what_the_planner_answers_for():
    """The same functions, so that no op is without a kernel."""
    names = {name for name in vars(plan.Launcher) if not name.startswith("_")}
    assert names == {name for name in ("glm_hvp", "glm_value_grad", "softmax_hvp", "softmax_value_grad",
                                       "cross_entropy_hvp", "paired_matmul", "gram")
                     if hasattr(reference, name)}  # fmt: skip


@pytest.mark.slow
def test_address_sanitizer():
    names = ["test_every_shape_of_the_tile", "test_small_problems", "test_groups_of_columns", "test_cross_entropy",
             "test_paired_matmul", "test_gram", "test_rows_may_be_strided_and_repeated"]  # fmt: skip
    under_address_sanitizer(__file__, names)


def test_a_block_alone_has_all_of_the_memory():
    """With a byte less than one row, its vector and its sums need there is no such shape; nothing is kept back."""

    def shape(shared):
        return plan._shape(Device(132, shared), "f32", 4, 4, 9000, 9000, 1, 9000, 1, False)

    least = next(shared for shared in range(100_000, 120_000, 16) if shape(shared) is not None)
    assert (shape(least).shared, shape(least).blocks, shape(least).rows) == (least, 1, 1)
