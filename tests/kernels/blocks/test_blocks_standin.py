"""cuda.cu, run on the CPU by csrc/standin/cuda_on_cpu.h: every kernel, by LAPACK's ratios and bit for bit.

Each kernel is taken at the smallest and the largest n that the planner sends to it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from secant.kernels._cuda_driver import Device
from secant.kernels.blocks import plan, reference
from torch import Tensor

from block_matrices import (
    THRESHOLD,
    bad_general,
    bad_spd,
    bad_symmetric,
    check_clamped_roots,
    compute_dtype,
    eigen_ratio,
    general_families,
    generator,
    inverse_ratio,
    mirrored,
    orthogonality_ratio,
    permutations,
    poisoned,
    random_general,
    random_spd,
    random_symmetric,
    run_abs_inv,
    run_eigh,
    run_inv,
    run_inv_root,
    run_solve,
    solve_ratio,
    spd_families,
    symmetric_families,
)
from reruns import under_address_sanitizer

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEVICE = Device(multiprocessors=3, shared=100_000)
TABLE = """
#define SECANT_ROW(OP, KIND, N, TAG, C) SECANT_STANDIN_ROW(SECANT_BLOCKS_NAME(OP, KIND, N, TAG), Blocks)
#define SECANT_STANDIN_ROW(name, Params) SECANT_STANDIN_KERNEL(name, Params),
static const secant_standin::Kernel kKernels[] = {SECANT_BLOCKS_KERNELS(SECANT_ROW)};
SECANT_STANDIN_EXPORT(kKernels)
"""
#: One n of each mapping: a thread a matrix, three and two matrices a warp, one, two warps a matrix.
MAPPINGS = [3, 10, 14, 19, 37]
SEEDS = range(3)


def sizes(op: str) -> list[tuple[int, torch.dtype]]:
    """(n, dtype): every kernel of `op`, at its smallest and its largest n."""
    ends = [(n, n) for n in range(1, plan.THREAD_N[op] + 1)]
    below = plan.THREAD_N[op]
    for width in plan.WIDTHS[op]:
        ends.append((below + 1, width))
        below = width
    pairs = [((low, F32), (high, F64)) if i % 2 else ((low, F64), (high, F32)) for i, (low, high) in enumerate(ends)]
    return list(dict.fromkeys(x for pair in pairs for x in pair))


@pytest.fixture(scope="module")
def library(build_standin):
    return build_standin("blocks", TABLE)


@pytest.fixture
def make(library, standin_driver):
    """make(seed, **kw): the launcher on the stand-in, with the threads in the order of that seed."""
    return lambda seed=0, **kw: plan.Launcher(standin_driver(library, DEVICE, seed), **kw)


def first_of(families: dict[str, Tensor]) -> Tensor:
    """One block of every family; of large blocks, which take the stand-in long, every third, another third a size."""
    blocks = [x[0] for x in families.values()]
    n = blocks[0].shape[-1]
    return torch.stack(blocks if n <= 12 else blocks[n % 3 :: 3])


def same(x: Tensor, y: Tensor) -> bool:
    """Equal with NaN equal to NaN (whose payload is not promised)."""
    return torch.equal(torch.nan_to_num(x, nan=12345.0), torch.nan_to_num(y, nan=12345.0))


@pytest.mark.parametrize(("n", "dtype"), sizes("inv_spd"))
def test_inverse_spd(make, n, dtype):
    a = first_of(spd_families(n, dtype))
    backend = make(n % 3)
    x, info = run_inv(backend, a + torch.full_like(a, torch.nan).triu(1))
    assert not info.any()
    assert inverse_ratio(a, x) < THRESHOLD
    assert torch.equal(x, x.mT)
    assert [item.kernel.split("_")[3][0] for item in backend.driver.log] == ["t" if n <= 8 else "w" if n <= 32 else "b"]


@pytest.mark.parametrize(("n", "dtype"), sizes("inv_lu"))
def test_inverse_general(make, n, dtype):
    a = first_of(general_families(n, dtype))
    x, info = run_inv(make(n % 3), a, spd=False)
    assert not info.any()
    assert inverse_ratio(a, x) < THRESHOLD


@pytest.mark.parametrize("spd", [True, False])
@pytest.mark.parametrize(("n", "dtype"), sizes("solve_lu"))
def test_solve(make, n, dtype, spd):
    """One right-hand side, fewer than a chunk of columns, and several chunks with a tail."""
    a = first_of(spd_families(n, dtype) if spd else general_families(n, dtype))
    given = a + torch.full_like(a, torch.nan).triu(1) if spd else a
    for k in (1, 3, 11):
        b = torch.randn(len(a), n, k, generator=generator("b", n, k), dtype=F64).to(dtype)
        x, info = run_solve(make(n % 3), given, b, spd=spd)
        assert not info.any()
        assert solve_ratio(a, x, b) < THRESHOLD


@pytest.mark.parametrize(("n", "dtype"), sizes("eigen"))
def test_eigh(make, n, dtype):
    a = first_of(symmetric_families(n, dtype))
    w, v, info = run_eigh(make(n % 3), a.tril() + torch.full_like(a, torch.nan).triu(1))
    assert not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    assert orthogonality_ratio(v) < THRESHOLD
    assert eigen_ratio(a, w, v) < THRESHOLD


@pytest.mark.parametrize(("n", "dtype"), sizes("eigen"))
def test_functions_of_eigenvalues(make, n, dtype):
    """Against float64. With |f| <= F and condition 20 the function moves by a few n eps 20 F."""
    a = random_symmetric(n, dtype, 2, 20.0)
    positive = random_spd(n, dtype, 2, 20.0)
    eps = torch.finfo(dtype).eps
    for got, expected in (
        (run_abs_inv(make(1), a, 0.1), run_abs_inv(reference, a.double(), 0.1)),
        (run_inv_root(make(2), positive, 4), run_inv_root(reference, positive.double(), 4)),
        (run_inv_root(make(0), positive, 2, 0.5, True), run_inv_root(reference, positive.double(), 2, 0.5, True)),
        (run_inv_root(make(0), positive, 1, 0.5), run_inv_root(reference, positive.double(), 1, 0.5)),
    ):
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[0], got[0].mT)
        largest = torch.linalg.matrix_norm(expected[0], 2).max()
        assert (got[0] - expected[0]).abs().max() <= 64 * n * eps * largest


CALLS = {
    "inv, spd": lambda backend, a: run_inv(backend, a),
    "inv, general": lambda backend, a: run_inv(backend, a, spd=False),
    "solve, spd": lambda backend, a: run_solve(backend, a, a[:, :, :1].clone()),
    "solve, general": lambda backend, a: run_solve(backend, a, torch.cat([a, a], -1), spd=False),
    "eigh": run_eigh,
    "abs_inv": lambda backend, a: run_abs_inv(backend, a, 1e-3),
    "inv_root": lambda backend, a: run_inv_root(backend, a, 2),
}


def bad_blocks(name: str, n: int) -> list[tuple[Tensor, int]]:
    found = bad_spd(n, F32) if "spd" in name else (bad_general if "general" in name else bad_symmetric)(n, F32)
    return [(bad.block, bad.info) for bad in (found if n < 16 else found[:: n // 8])]


@pytest.mark.parametrize("n", MAPPINGS)
@pytest.mark.parametrize("name", CALLS)
def test_bad_blocks_spoil_themselves_alone(make, name, n):
    """Good and bad blocks in turn: the codes, NaN all over, and the good ones as they are alone, wherever they are."""
    call, bad = CALLS[name], bad_blocks(name, n)
    good = random_general(n, F32, 1) if "general" in name else random_spd(n, F32, 1)
    alone = call(make(2), good)
    mixed = torch.stack([x for block, _ in bad for x in (block, good[0])])
    results = call(make(1), mixed)
    assert results[-1][::2].tolist() == [info for _, info in bad]
    assert not results[-1][1::2].any()
    for got, expected in zip(results[:-1], alone[:-1], strict=True):
        assert got[::2].isnan().all()
        assert all(torch.equal(x, expected[0]) for x in got[1::2])


@pytest.mark.parametrize("n", MAPPINGS)
def test_nonpositive_eigenvalues(make, n):
    a = torch.diag(torch.linspace(-1.0, 1.0, n))[None].repeat(2, 1, 1)
    a[1] = torch.eye(n)
    x, info = run_inv_root(make(), a, 2)
    assert info.tolist() == [int((a[0].diagonal() <= 0).sum()), 0]
    assert x[0].isnan().all()
    assert torch.equal(x[1], a[1])


@pytest.mark.parametrize("n", MAPPINGS)
def test_clamped_roots(make, n):
    check_clamped_roots(lambda a, p, d: run_inv_root(make(n % 3), a, p, d, clamped=True), n, F32)
    x, info = run_inv_root(make(sweeps=1), random_spd(n, F32, 1, 10.0), 2, 0.1, clamped=True)
    assert info.tolist() == [-3]
    assert x.isnan().all()


@pytest.mark.parametrize("n", MAPPINGS)
@pytest.mark.parametrize("name", CALLS)
def test_order_of_threads_changes_nothing(make, name, n):
    a = random_spd(n, F32, 5)
    results = [CALLS[name](make(seed), a) for seed in SEEDS]
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("n", [3, 14])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision_is_float32_rounded_once(make, name, n, dtype):
    a = random_spd(n, dtype, 3, 10.0)
    a[2] = 0
    half, single = CALLS[name](make(), a), CALLS[name](make(), a.float())
    for x, y in zip(half, single, strict=True):
        assert same(x, y.to(x.dtype))


def test_every_half_precision_number(make):
    """Through the identity as the matrix: what goes in comes out, subnormal numbers and infinities included."""
    for dtype in (BF16, F16):
        b = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1, 1)
        x, _ = run_solve(make(), torch.ones_like(b[:1]).expand(b.shape), b, spd=False)
        assert same(x, b)


def test_rounding_to_half_precision(make):
    """Reciprocals are rounded to nearest even, by torch too."""
    for dtype in (BF16, F16):
        a = torch.arange(1, 2**15, 7, dtype=torch.int16).view(dtype).view(-1, 1, 1)
        x, _ = run_inv(make(), a, spd=False)
        assert same(x, (1 / a.float()).to(dtype).where(a.isfinite(), torch.nan))


@pytest.mark.parametrize("spd", [True, False])
@pytest.mark.parametrize("n", MAPPINGS)
def test_damping(make, n, spd):
    """Number, tensor and scaled: bit for bit the matrix with another diagonal."""
    a = random_spd(n, F32, 2)
    shift = torch.tensor([0.5, 1e-3])
    for damping in (0.25, shift):
        for scaled in (False, True):
            d = a.clone()
            diagonal = d.diagonal(dim1=1, dim2=2)
            amount = damping[:, None] if isinstance(damping, Tensor) else damping
            diagonal.mul_(1 + amount) if scaled else diagonal.add_(amount)
            got, expected = run_inv(make(), a, damping, scaled, spd), run_inv(make(), d, spd=spd)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
            b = a[:, :, :2].clone()
            got, expected = run_solve(make(), a, b, damping, scaled, spd), run_solve(make(), d, b, spd=spd)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    floor = torch.tensor([0.5, 1e-2])
    x, _ = run_abs_inv(make(), a, floor)
    for i in range(2):
        assert torch.equal(x[i : i + 1], run_abs_inv(make(), a[i : i + 1], float(floor[i]))[0])


@pytest.mark.parametrize("n", MAPPINGS)
def test_strides_between_blocks(make, n):
    """A block that all share, blocks apart, and more of them than fill a tile."""
    a = random_general(n, F32, 70 if n < 9 else 5)
    expected = run_inv(make(), a, spd=False)[0]
    apart = torch.full((len(a), 2, n, n), torch.nan)
    apart[:, 1] = a
    assert torch.equal(run_inv(make(1), apart[:, 1], spd=False)[0], expected)
    shared = a[:1].expand(len(a), n, n)
    assert torch.equal(run_inv(make(1), shared, spd=False)[0], expected[:1].expand(len(a), n, n))
    b = torch.randn(1, n, 3)
    x, _ = run_solve(make(), a, b.expand(len(a), n, 3), spd=False)
    assert torch.equal(x, run_solve(make(), a, b.repeat(len(a), 1, 1), spd=False)[0])


@pytest.mark.parametrize("n", MAPPINGS)
def test_in_place(make, n):
    a = random_spd(n, F32, 35 if n < 9 else 5)
    info = poisoned(len(a), dtype=torch.int32)
    for spd in (True, False):
        expected, out = run_inv(make(), a, spd=spd)[0], a.clone()
        make().inv(out, None, False, spd, out, info)
        assert torch.equal(out, expected)
        for k in (1, 12):
            b = torch.randn(len(a), n, k)
            expected, out = run_solve(make(), a, b, spd=spd)[0], b.clone()
            make().solve(a, out, None, False, spd, out, info)
            assert torch.equal(out, expected)
    out = a.clone()
    make().abs_inv(out, 0.1, out, info)
    assert torch.equal(out, run_abs_inv(make(), a, 0.1)[0])


@pytest.mark.parametrize("n", [1, 2, *MAPPINGS, 32, 64])
def test_exact_results(make, n):
    eye = torch.eye(n)
    p = permutations(n, F32)
    assert torch.equal(run_inv(make(), p, spd=False)[0], p.mT)
    for size in (1e-30, 1e-8, 1.0, 3.0, 1e30):
        a = (eye * size)[None]
        for spd in (True, False):
            x, info = run_inv(make(), a, spd=spd)
            exact = 1 / a[0, 0, 0].double()
            assert not info.any()
            assert (x[0].diagonal() - exact).abs().max() <= 4 * torch.finfo(F32).eps / 2 * exact
            assert not (x[0] - torch.diag(x[0].diagonal())).any()
    if n > 1:
        d = torch.logspace(-20, 18, n, dtype=F64)
        x, info = run_inv(make(), torch.diag(d).float()[None])
        assert not info.any()
        torch.testing.assert_close(x[0].diagonal().double(), 1 / d, rtol=4 * torch.finfo(F32).eps, atol=0)


@pytest.mark.parametrize("n", MAPPINGS)
def test_cap_on_sweeps(make, n):
    """One sweep is too few: a count of what is left, the best effort from eigh, NaN from functions."""
    a = random_symmetric(n, F32, 2, 3.0)
    a[1] = torch.eye(n)
    w, v, info = run_eigh(make(sweeps=1), a)
    assert 0 < info[0] <= n * (n - 1) // 2
    assert info[1] == 0
    assert orthogonality_ratio(v) < THRESHOLD
    product = v[0].mT @ mirrored(a)[0] @ v[0]
    left = product - torch.diag(w[0])
    assert left.norm() < 0.9 * (a[0] - torch.diag(a[0].diagonal())).norm()
    x, info = run_abs_inv(make(sweeps=1), a, 0.1)
    assert info[0] > 0
    assert x[0].isnan().all()
    assert torch.equal(x[1], a[1])


def test_choice_among_equal_pivots(make):
    """LAPACK's exchanges decide, not the places of the rows: a matrix where the two differ in the result's bits."""
    for n in (4, 12, 20, 40):
        a = torch.randint(-1, 2, (40, n, n), generator=generator("ties", n)).float()
        a[:, 0, 0] = 0
        x, info = run_inv(make(), a, spd=False)
        lu, pivots, expected = torch.linalg.lu_factor_ex(a)
        keep = (lu.diagonal(dim1=1, dim2=2).abs().amin(-1) > 1e-3) & (expected == 0)
        assert keep.sum() > 5
        assert not info[keep].any()
        identity = torch.eye(n).expand_as(a[keep])
        exact = torch.linalg.lu_solve(lu[keep].double(), pivots[keep], identity.double())
        assert inverse_ratio(a[keep], x[keep]) < THRESHOLD
        assert (x[keep] - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_the_planner_fits_the_smallest_device():
    """99 KiB of shared memory a block (compute capability 8.6, 8.9 and 12.0), for every n and every operation."""
    for op in plan.WIDTHS:
        for n in range(1, 65):
            for tag, size in (("f32", 4), ("f64", 8)):
                found = plan.plan(op, tag, n, size, plan.COLUMNS)
                assert found.shared <= 99 * 1024
                assert found.team_bytes % 16 == 0
                assert found.kernel in plan.kernels()


def detected(make: Any, call: Any, n: int, seed: int) -> bool:
    """Whether a mutated kernel gives another result than float64, is stopped by the stand-in, or crashes."""
    child = os.fork()
    if child == 0:
        found = 1
        try:
            torch.set_num_threads(1)
            a = random_spd(n, F32, 5, 4.0)
            result = call(make(seed), a)[0]
            expected = call(reference, a)[0]
            found = int(not (result - expected).abs().max() < 1e-3)
        finally:
            os._exit(found)
    return os.waitpid(child, 0)[1] != 0


MUTATIONS = {
    "posted column": (
        "inv, spd",
        "inv_spd, w, 12",
        10,
        "    }\n    sync<Warps>();\n    const C d = post[0]",
        "    }\n    const C d = post[0]",
    ),
    "posted rows": (
        "inv, general",
        "inv_lu, b, 48",
        37,
        "  sync<Warps>();\n  const C* post = posts;",
        "  const C* post = posts;",
    ),
    "read column": (
        "inv, general",
        "inv_lu, b, 48",
        37,
        "    sync<Warps>();  // column k has been read; its place takes row k of the inverse",
        "",
    ),
    "parity of the posts": ("inv, spd", "inv_spd, w, 12", 10, "posts + k % 2 * W;", "posts;"),
    "end of a round": (
        "abs_inv",
        "eigen, w, 12",
        10,
        "    if (Odd) v[0] = -v[0];\n  }\n  sync<Warps>();",
        "    if (Odd) v[0] = -v[0];\n  }",
    ),
    "posted rotations": ("abs_inv", "eigen, w, 12", 10, "  }\n  sync<Warps>();\n  if (player", "  }\n  if (player"),
    "sign of the first": ("abs_inv", "eigen, w, 12", 10, "      x[p * ld] = -x[p * ld];", ""),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(build_standin, standin_driver, name):
    """One barrier less, and every one of three orders of threads shows it."""
    call, kernel, n, old, new = MUTATIONS[name]

    def edit(text: str) -> str:
        assert text.count(old) == 1
        return text.replace(old, new)

    library = build_standin("blocks", TABLE, edit, f"#define SECANT_BLOCKS_KERNELS(X) X({kernel}, f32, float)")

    def make(seed: int) -> plan.Launcher:
        return plan.Launcher(standin_driver(library, DEVICE, seed))

    assert [detected(make, CALLS[call], n, seed) for seed in SEEDS] == [True] * 3


@pytest.mark.parametrize(("name", "n"), sorted({(call, n) for call, _, n, _, _ in MUTATIONS.values()}))
def test_without_mutation_nothing_is_found(make, name, n):
    assert not any(detected(make, CALLS[name], n, seed) for seed in SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", range(1, 65))
def test_every_size(make, n, dtype):
    """All blocks of all families, every n."""
    for a in spd_families(n, dtype).values():
        x, info = run_inv(make(n), a)
        assert not info.any()
        assert inverse_ratio(a, x) < THRESHOLD
    for a in general_families(n, dtype).values():
        x, info = run_inv(make(n), a, spd=False)
        assert not info.any()
        assert inverse_ratio(a, x) < THRESHOLD
        b = torch.randn(len(a), n, 3, dtype=compute_dtype(dtype))
        assert solve_ratio(a, run_solve(make(n), a, b, spd=False)[0], b) < THRESHOLD
    for a in symmetric_families(n, dtype).values():
        w, v, info = run_eigh(make(n), a)
        assert not info.any()
        assert orthogonality_ratio(v) < THRESHOLD
        assert eigen_ratio(a, w, v) < THRESHOLD


@pytest.mark.slow
def test_address_sanitizer():
    names = ["test_inverse_spd", "test_inverse_general", "test_solve", "test_eigh", "test_strides_between_blocks"]
    under_address_sanitizer(__file__, names)
