"""The CPU kernels of the `blocks` family: LAPACK's test ratios for every n, codes, bits, tails, strides, threads."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from secant.kernels.blocks import cpu, reference

import block_matrices as bm

WIDEST = 16  # lanes of a vector, at most
#: Every path: nothing to eliminate, unrolled, one panel and a rest of each length, more rows than a panel has, columns
#: of two to four vectors, full and not.
SIZES = [1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 16, 17, 32, 33]
#: The other instruction sets run the same sources: there, these sizes do.
every_size = pytest.mark.parametrize("n", SIZES if os.environ.get("SECANT_ISA") else range(1, 65))
some_sizes = pytest.mark.parametrize("n", SIZES)
real = pytest.mark.parametrize("dtype", bm.REAL, ids=str)
kinds = pytest.mark.parametrize("spd", [True, False], ids=["spd", "general"])


@pytest.fixture(autouse=True)
def one_thread():
    """Small products and decompositions of torch, which make and judge the blocks, wait for threads more than they use.

    The kernels take their number of threads from there too; the tests of threads say how many they want.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def families(n, dtype, spd):
    return (bm.spd_families if spd else bm.general_families)(n, dtype)


def stacked(blocks):
    """All families in one batch: blocks of every kind beside each other in the lanes."""
    return torch.cat(list(blocks.values()))


def with_threads(threads):
    """The module with its number of threads chosen."""

    def bind(function):
        return lambda *args: function(*args, threads=threads)

    return SimpleNamespace(**{f: bind(getattr(cpu, f)) for f in ("inv", "solve", "eigh", "abs_inv", "inv_root")})


def rhs(a, k, *key):
    return torch.randn(len(a), a.shape[1], k, generator=bm.generator("b", *key), dtype=torch.float64).to(a.dtype)


@real
@kinds
@every_size
def test_ratios_of_inverse_and_solution(n, spd, dtype):
    a = stacked(families(n, dtype, spd))
    x, info = bm.run_inv(cpu, a, spd=spd)
    assert not info.any()
    assert bm.inverse_ratio(a, x) < bm.THRESHOLD
    if spd:
        assert torch.equal(x, x.mT)
    for k in (1, 3) if n > 8 else (1, 2, 5, 17, 35):
        b = rhs(a, k, n)
        x, info = bm.run_solve(cpu, a, b, spd=spd)
        assert not info.any()
        assert bm.solve_ratio(a, x, b) < bm.THRESHOLD


@real
@kinds
@some_sizes
def test_solve_of_many_columns_is_the_solve_of_each(n, spd, dtype):
    a = families(n, dtype, spd)["geometric, middle"]
    b = rhs(a, 50, n)
    x, _ = bm.run_solve(cpu, a, b, spd=spd)
    for k in (1, 3, 16, 17, 33):
        part, _ = bm.run_solve(cpu, a, b[:, :, :k].contiguous(), spd=spd)
        assert torch.equal(part, x[:, :, :k])


@real
@every_size
def test_eigen_ratios(n, dtype):
    a = stacked(bm.symmetric_families(n, dtype))
    w, v, info = bm.run_eigh(cpu, a)
    assert not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    assert bm.eigen_ratio(a, w, v) < bm.THRESHOLD
    assert bm.orthogonality_ratio(v) < bm.THRESHOLD


#: Beyond what the other functions take: a vector more than 64, odd, between, and the largest.
LARGE = [65, 79, 96, 127, 128]


@real
@pytest.mark.parametrize("n", LARGE)
def test_larger_eigenproblems(n, dtype):
    """LAPACK's ratios; functions against those of torch's eigenvalues; graded blocks, which Jacobi takes, too."""
    a = stacked(bm.symmetric_families(n, dtype))
    w, v, info = bm.run_eigh(cpu, a)
    assert not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    assert bm.eigen_ratio(a, w, v) < bm.THRESHOLD
    assert bm.orthogonality_ratio(v) < bm.THRESHOLD
    graded, _ = bm.badly_scaled(n, dtype)
    w, v, info = bm.run_eigh(cpu, graded)
    assert not info.any()
    assert bm.eigen_ratio(graded, w, v) < bm.THRESHOLD
    spd = bm.random_spd(n, dtype, 5, 100.0)
    w, v = torch.linalg.eigh(spd.double())
    eps = torch.finfo(dtype).eps
    for x, f in (
        (bm.run_abs_inv(cpu, spd, 0.1), 1 / w.abs().clamp(min=0.1)),
        (bm.run_inv_root(cpu, spd, 2), w.rsqrt()),
        (bm.run_inv_root(cpu, spd, 4, 1e-2, clamped=True), (w + 1e-2 * w[:, -1:]).pow(-0.25)),
    ):
        want = (v * f[:, None, :]) @ v.mT
        assert not x[1].any()
        assert torch.equal(x[0], x[0].mT)
        # An eigenvalue is off by at most 30 n eps ||A||, and |f'| is at most f / w.
        limit = 30 * n * eps * float((w[:, -1:] / w).max() * f.max()) + 30 * eps * float(f.max())
        assert (x[0].double() - want).abs().max() <= limit


@some_sizes
def test_small_eigenvalues_of_a_definite_block_are_relatively_right(n):
    """Jacobi's privilege (Demmel and Veselic, 1992): the error is eps times the condition of the scaled matrix.

    Eigenvalues over eight decades, in float32: an error of eps ||A|| would be larger than the smallest. The exact ones
    come from float64, where eps ||A|| is small enough.
    """
    a, d = bm.badly_scaled(n, torch.float64, -2.0, 2.0)
    a = a.float()
    w, _, _ = bm.run_eigh(cpu, a)
    exact = torch.linalg.eigvalsh(a.double())
    bound = 30 * n * torch.finfo(torch.float32).eps * torch.linalg.cond(a.double() / (d[:, None] * d))[:, None]
    assert ((w.double() - exact).abs() <= bound * exact).all()


@real
@some_sizes
def test_matrix_functions(n, dtype):
    """|A|^-1 and A^(-1/p) against eigenvectors in float64, within the error of the eigenvalues they are made of."""
    eps = torch.finfo(dtype).eps
    a = bm.random_symmetric(n, dtype, WIDEST + 3, 50.0)
    floor = 0.1
    x, info = bm.run_abs_inv(cpu, a, floor)
    want, _ = bm.run_abs_inv(reference, a.double(), floor)
    assert not info.any()
    assert torch.equal(x, x.mT)
    # |f(w + e) - f(w)| <= |e| / floor^2 with |e| <= 30 n eps ||A||, twice for the vectors; norms of A are 1 here.
    assert ((x.double() - want).abs() <= 60 * n * eps / floor**2).all()
    a = bm.random_spd(n, dtype, WIDEST + 3, 50.0)
    for p in (1, 2, 4):
        x, info = bm.run_inv_root(cpu, a, p, 0.1)
        want, _ = bm.run_inv_root(reference, a.double(), p, 0.1)
        assert not info.any()
        assert torch.equal(x, x.mT)
        assert ((x.double() - want).abs() <= 60 * n * eps / floor ** (1 + 1 / p)).all()


@real
@some_sizes
def test_codes_of_bad_blocks(n, dtype):
    for run, bad in (
        (lambda a: bm.run_inv(cpu, a), bm.bad_spd(n, dtype)),
        (lambda a: bm.run_inv(cpu, a, spd=False), bm.bad_general(n, dtype)),
        (lambda a: bm.run_solve(cpu, a, rhs(a, 2)), bm.bad_spd(n, dtype)),
        (lambda a: bm.run_solve(cpu, a, rhs(a, 2), spd=False), bm.bad_general(n, dtype)),
        (lambda a: bm.run_abs_inv(cpu, a, 0.1), bm.bad_symmetric(n, dtype)),
        (lambda a: bm.run_inv_root(cpu, a, 2), bm.bad_symmetric(n, dtype)),
        (lambda a: bm.run_eigh(cpu, a)[1:], bm.bad_symmetric(n, dtype)),
    ):
        out, info = run(torch.stack([case.block for case in bad]))
        assert torch.isnan(out).all()
        assert info.tolist() == [case.info for case in bad], [case.name for case in bad]


@real
@some_sizes
def test_codes_are_those_of_lapack(n, dtype):
    a = bm.random_symmetric(n, dtype, 40, 10.0) + 0.3 * torch.eye(n, dtype=dtype)
    assert torch.equal(bm.run_inv(cpu, a)[1], torch.linalg.cholesky_ex(a)[1])
    g = torch.randint(-1, 2, (60, n, n), generator=bm.generator("small integers", n)).to(dtype)
    exact = torch.linalg.inv_ex(g)[1]
    if n < 4:  # elimination of so small integers is exact: the same pivots are zero
        assert torch.equal(bm.run_inv(cpu, g, spd=False)[1], exact)


@real
@some_sizes
def test_how_many_eigenvalues_are_not_positive(n, dtype):
    d = torch.arange(n, dtype=torch.float64) - n // 2 + 0.5
    q = bm.orthogonal(5, n, "roots")
    a = ((q * d) @ q.mT).to(dtype)
    a = bm.mirrored(a)
    x, info = bm.run_inv_root(cpu, a, 2)
    assert info.tolist() == [n // 2] * 5
    assert torch.isnan(x).all() if n > 1 else torch.isfinite(x).all()
    assert not bm.run_inv_root(cpu, a, 2, float(n))[1].any()


@real
@some_sizes
def test_the_cap_on_sweeps_is_far(n, dtype):
    """Random, graded and nearly diagonal blocks all converge: a code above 0 would mean the cap."""
    a = bm.random_symmetric(n, dtype, 20, 1e6)
    tiny = torch.eye(n, dtype=dtype) + torch.finfo(dtype).eps * bm.mirrored(a)
    for x in (a, tiny, tiny * bm.scales(dtype)[0] ** 1.1):
        assert not bm.run_eigh(cpu, x)[2].any()


@real
@some_sizes
def test_an_earlier_basis_changes_nothing_but_rounding(n, dtype):
    """Eigenvectors of a block nearby, each time those of the step before: the ratios of a start from nothing."""
    a = bm.random_symmetric(n, dtype, WIDEST + 3, 50.0)
    step = 1e-3 * bm.random_symmetric(n, dtype, WIDEST + 3, 2.0)
    w, v, _ = bm.run_eigh(cpu, a)
    for _ in range(40):
        a = bm.mirrored(a + step)
        basis = v
        w, v, info = bm.run_eigh(cpu, a, basis)
        assert not info.any()
        assert (w.diff(dim=-1) >= 0).all()
        assert bm.eigen_ratio(a, w, v) < bm.THRESHOLD
        assert bm.orthogonality_ratio(v) < bm.THRESHOLD
    # Each is within 60 n eps / floor^2 of the exact one, as in the test of matrix functions.
    near = {"rtol": 0, "atol": 120 * n * torch.finfo(dtype).eps / 0.1**2}
    torch.testing.assert_close(bm.run_abs_inv(cpu, a, 0.1, basis)[0], bm.run_abs_inv(cpu, a, 0.1)[0], **near)
    warm, cold = (bm.run_inv_root(cpu, a, 2, 0.1, clamped=True, basis=x)[0] for x in (basis, None))
    torch.testing.assert_close(warm, cold, **near)


@real
@some_sizes
def test_what_is_no_basis_is_not_used(n, dtype):
    """Bit for bit, in every lane for itself."""
    a = bm.random_symmetric(n, dtype, WIDEST + 3, 50.0)
    _, v, _ = cold = bm.run_eigh(cpu, a)
    eye = torch.eye(n, dtype=dtype)
    for basis in (torch.zeros(n, n), torch.full((n, n), math.nan), torch.full((n, n), 1e30), 1.001 * eye):
        assert same_bits(bm.run_eigh(cpu, a, basis.to(dtype).expand_as(a)), cold)
    mixed, good = v.clone(), torch.arange(len(a)) % 2 == 0
    mixed[~good, 0, 0] = math.inf
    warm, both = bm.run_eigh(cpu, a, v), bm.run_eigh(cpu, a, mixed)
    assert all(
        same_bits([b[good]], [x[good]]) and same_bits([b[~good]], [y[~good]])
        for b, x, y in zip(both, warm, cold, strict=True)
    )


@real
@some_sizes
def test_clamped_roots(n, dtype):
    bm.check_clamped_roots(lambda a, p, d: bm.run_inv_root(cpu, a, p, d, clamped=True), n, dtype)


CALLS = {
    "inv spd": lambda m, a, b, s: m.inv(a, s, False, True, *outs(a)),
    "inv general": lambda m, a, b, s: m.inv(a, s, True, False, *outs(a)),
    "solve spd": lambda m, a, b, s: m.solve(a, b, s, True, True, *outs(b)),
    "solve general": lambda m, a, b, s: m.solve(a, b, s, False, False, *outs(b)),
    "eigh": lambda m, a, b, s: m.eigh(a, *outs(a[:, 0], a)),
    "abs_inv": lambda m, a, b, s: m.abs_inv(a, s, *outs(a)),
    "inv_root": lambda m, a, b, s: m.inv_root(a, 4, s, False, *outs(a)),
    "eigh, basis": lambda m, a, b, s: m.eigh(a, *outs(a[:, 0], a), a / a.abs().amax()),
    "inv_root, clamped": lambda m, a, b, s: m.inv_root(a, 2, s, False, *outs(a), True),
}
calls = pytest.mark.parametrize("call", CALLS)


def outs(*like):
    """Poisoned outputs and info; kept where `results` finds them."""
    made = [bm.poisoned(*x.shape, dtype=x.dtype) for x in like]
    made.append(bm.poisoned(len(like[0]), dtype=torch.int32))
    outs.last = made
    return made


def results(call, module, a, b, shift):
    CALLS[call](module, a, b, shift)
    return outs.last


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(mine, want):
    return all(torch.equal(bits(m), bits(w)) for m, w in zip(mine, want, strict=True))


def mixed_batch(n, dtype, batch):
    """Blocks that converge at different speeds and pivot differently, symmetric, with a shift for each."""
    a = torch.cat([bm.random_spd(n, dtype, 5, 30.0), bm.random_spd(n, dtype, 5, 2.0), torch.eye(n, dtype=dtype)[None]])
    a = a.repeat(batch // len(a) + 1, 1, 1)[:batch] * torch.linspace(0.5, 2, batch, dtype=dtype)[:, None, None]
    shift = torch.linspace(0.01, 0.3, batch, dtype=bm.compute_dtype(dtype))
    return a.contiguous(), rhs(a, 3, n, batch), shift


@real
@calls
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 14, 16, 32])
def test_the_bits_of_a_block_do_not_depend_on_its_place(n, call, dtype):
    """Tails of every length, permutations, and bad neighbours."""
    batch = 2 * WIDEST + 1
    a, b, shift = mixed_batch(n, dtype, batch)
    want = results(call, cpu, a, b, shift)
    assert not want[-1].any()
    for size in range(1, batch):
        part = slice(batch - size, batch)
        assert same_bits(results(call, cpu, a[part], b[part], shift[part]), [w[part] for w in want]), size
    order = torch.randperm(batch, generator=bm.generator("order"))
    assert same_bits(results(call, cpu, a[order], b[order], shift[order]), [w[order] for w in want])
    good = torch.arange(batch) % 3 != 0
    spoilt = a.clone()
    spoilt[~good] = math.nan
    mine = results(call, cpu, spoilt, b, shift)
    assert same_bits([m[good] for m in mine], [w[good] for w in want])
    assert mine[-1][~good].all()
    assert all(torch.isnan(m[~good]).all() for m in mine[:-1])


@real
@calls
@pytest.mark.parametrize("n", [2, 9])
def test_threads_change_no_bit(n, call, dtype):
    a, b, shift = mixed_batch(n, dtype, 5 * WIDEST + 3)
    one = results(call, with_threads(1), a, b, shift)
    for threads in (2, 3, 50):
        assert same_bits(results(call, with_threads(threads), a, b, shift), one)


def test_the_number_of_threads_chosen_by_size_changes_no_bit():
    a, b, shift = mixed_batch(4, torch.float32, 20_000)
    for call in CALLS:
        one = results(call, with_threads(1), a, b, shift)
        torch.set_num_threads(2)
        assert same_bits(results(call, cpu, a, b, shift), one)
        torch.set_num_threads(1)


@real
@calls
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 12, 16, 32])
def test_strides_between_blocks(n, call, dtype):
    batch = WIDEST + 3
    a, b, shift = mixed_batch(n, dtype, batch)
    want = results(call, cpu, a, b, shift)
    wide_a = torch.full((batch, n * n + 3), math.nan, dtype=dtype)
    wide_b = torch.full((batch, 3 * n + 1), math.nan, dtype=dtype)
    wide_a[:, : n * n], wide_b[:, : 3 * n] = a.flatten(1), b.flatten(1)
    far = wide_a.as_strided((batch, n, n), (n * n + 3, n, 1)), wide_b.as_strided((batch, n, 3), (3 * n + 1, 3, 1))
    assert same_bits(results(call, cpu, *far, shift), want)
    once = a[4:5].expand(batch, n, n), b[4:5].expand(batch, n, 3)
    assert same_bits(
        results(call, cpu, *once, shift), results(call, cpu, once[0].contiguous(), once[1].contiguous(), shift)
    )


@real
@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 16, 20, 32])
def test_in_place(n, dtype):
    a, b, shift = mixed_batch(n, dtype, WIDEST + 3)
    wide = rhs(a, 40, "wide")
    info = torch.empty(len(a), dtype=torch.int32)
    for spd in (True, False):
        want, x = bm.run_inv(cpu, a, shift, spd=spd)[0], a.clone()
        cpu.inv(x, shift, False, spd, x, info)
        assert torch.equal(x, want)
        for right in (b, wide):
            want, x = bm.run_solve(cpu, a, right, spd=spd)[0], right.clone()
            cpu.solve(a, x, None, False, spd, x, info)
            assert torch.equal(x, want)
    want, x = bm.run_inv_root(cpu, a, 2)[0], a.clone()
    cpu.inv_root(x, 2, None, False, x, info)
    assert torch.equal(x, want)
    want, x = bm.run_abs_inv(cpu, a, shift)[0], a.clone()
    cpu.abs_inv(x, shift, x, info)
    assert torch.equal(x, want)


@real
@kinds
@some_sizes
def test_damping(n, spd, dtype):
    """Fused, as if the diagonal had been changed first."""
    a = families(n, dtype, spd)["well conditioned"]
    shift = torch.tensor([0.25, 0.5, 1.0], dtype=dtype)  # 1 + shift is exact
    for damping in (0.25, shift):
        for scaled in (False, True):
            changed = a.clone()
            d = changed.diagonal(dim1=1, dim2=2)
            each = damping[:, None] if isinstance(damping, torch.Tensor) else damping
            d.mul_(1 + each) if scaled else d.add_(each)
            assert torch.equal(bm.run_inv(cpu, a, damping, scaled, spd)[0], bm.run_inv(cpu, changed, spd=spd)[0])
            b = rhs(a, 2)
            mine = bm.run_solve(cpu, a, b, damping, scaled, spd)[0]
            assert torch.equal(mine, bm.run_solve(cpu, changed, b, spd=spd)[0])
            if spd:
                mine = bm.run_inv_root(cpu, a, 2, damping, scaled)[0]
                assert torch.equal(mine, bm.run_inv_root(cpu, changed, 2)[0])


@real
@kinds
@every_size
def test_multiples_of_the_identity(n, spd, dtype):
    eps = torch.finfo(dtype).eps
    for size in (1e-8, 1e-30, 1e30, 1.0):
        a = size * torch.eye(n, dtype=dtype)[None]
        x, info = bm.run_inv(cpu, a, spd=spd)
        assert not info.any()
        want = torch.eye(n, dtype=torch.float64) / float(a[0, 0, 0])
        assert ((x[0].double() - want).abs() <= 2 * eps * want).all()  # 4 ulp at most; zeros are exact


@real
def test_a_permutation_inverts_to_its_transpose(dtype):
    for n in range(1, 65):
        p = bm.permutations(n, dtype, 20)
        x, info = bm.run_inv(cpu, p, spd=False)
        assert not info.any()
        assert torch.equal(x, p.mT)
    swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=dtype)
    assert torch.equal(bm.run_inv(cpu, swap, spd=False)[0], swap)


@real
@pytest.mark.parametrize("n", [2, 3, 8, 9, 33])
def test_badly_scaled_blocks_are_right_in_every_row(n, dtype):
    """D C D over 38 decades: the ratio of D C D says nothing of its small rows, that of C says all."""
    a, d = bm.badly_scaled(n, torch.float64, -20.0, 18.0)
    if dtype is torch.float32:
        a, d = bm.badly_scaled(n, torch.float64, -10.0, 9.0)
    x, info = bm.run_inv(cpu, a.to(dtype))
    assert not info.any()
    scaled = a.to(dtype).double() / (d[:, None] * d)
    assert bm.inverse_ratio(scaled, x.double() * (d[:, None] * d), dtype) < bm.THRESHOLD


@some_sizes
def test_only_the_lower_triangle_is_read(n):
    a = bm.random_spd(n, torch.float32, 5, 10.0)
    upper = a + torch.full((n, n), math.nan).triu(1)
    b = rhs(a, 2)
    for run in (
        lambda x: bm.run_inv(cpu, x),
        lambda x: bm.run_solve(cpu, x, b),
        lambda x: bm.run_eigh(cpu, x),
        lambda x: bm.run_abs_inv(cpu, x, 0.1),
        lambda x: bm.run_inv_root(cpu, x, 1),
    ):
        assert same_bits(run(upper), run(a))


@pytest.mark.parametrize("dtype", bm.HALF, ids=str)
def test_half_precision_is_float32_rounded_once(dtype):
    a, b, shift = mixed_batch(6, dtype, 20)
    for call in CALLS:
        want = results(call, cpu, a.float(), b.float(), shift)
        mine = results(call, cpu, a, b, shift)
        assert all(torch.equal(m, w.to(m.dtype)) for m, w in zip(mine, want, strict=True))


def test_a_symmetric_eigenproblem_of_repeated_values_is_exact():
    """Blocks that are diagonal already come back untouched, sorted, with unit vectors."""
    d = torch.tensor([[3.0, -1.0, 3.0, 0.0, 2.0]])
    w, v, info = bm.run_eigh(cpu, torch.diag_embed(d))
    assert not info.any()
    assert torch.equal(w, d.sort().values)
    assert torch.equal(v, torch.eye(5)[:, [1, 3, 4, 0, 2]][None])
