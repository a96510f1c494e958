"""The float64 definition of the `blocks` family against LAPACK's test ratios, exact answers and torch's codes."""

from __future__ import annotations

import math

import pytest
import torch
from secant.kernels.blocks import reference

import block_matrices as bm

SIZES = [1, 2, 3, 7, 16, 64]
EVERY = [pytest.param(n, marks=[] if n in SIZES else pytest.mark.slow) for n in range(1, 65)]
real = pytest.mark.parametrize("dtype", bm.REAL, ids=str)


@real
@pytest.mark.parametrize("n", EVERY)
def test_spd_ratios(n, dtype):
    for name, a in bm.spd_families(n, dtype).items():
        x, info = bm.run_inv(reference, a)
        assert not info.any(), name
        assert torch.equal(x, x.mT), name
        assert bm.inverse_ratio(a, x) < bm.THRESHOLD, name
        b = torch.randn(len(a), n, 3, generator=bm.generator("b", n), dtype=torch.float64).to(dtype)
        x, info = bm.run_solve(reference, a, b)
        assert not info.any(), name
        assert bm.solve_ratio(a, x, b) < bm.THRESHOLD, name


@real
@pytest.mark.parametrize("n", EVERY)
def test_general_ratios(n, dtype):
    for name, a in bm.general_families(n, dtype).items():
        x, info = bm.run_inv(reference, a, spd=False)
        assert not info.any(), name
        assert bm.inverse_ratio(a, x) < bm.THRESHOLD, name
        b = torch.randn(len(a), n, 1, generator=bm.generator("b", n), dtype=torch.float64).to(dtype)
        x, info = bm.run_solve(reference, a, b, spd=False)
        assert not info.any(), name
        assert bm.solve_ratio(a, x, b) < bm.THRESHOLD, name


@real
@pytest.mark.parametrize("n", EVERY)
def test_eigen_ratios(n, dtype):
    a = torch.cat(list(bm.symmetric_families(n, dtype).values()))
    w, v, info = bm.run_eigh(reference, a)
    assert not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    assert bm.eigen_ratio(a, w, v) < bm.THRESHOLD
    assert bm.orthogonality_ratio(v) < bm.THRESHOLD


@real
def test_badly_scaled_blocks_are_right_in_every_row(dtype):
    """The ratio of D C D says nothing of its small rows; that of C says all. Scaling by powers of two keeps it."""
    for n in (2, 3, 8, 32):
        for low, high in ((-5.0, math.log10(2e3)), (-20.0, 18.0)):
            a, d = bm.badly_scaled(n, torch.float64, low, high)
            x, info = bm.run_inv(reference, a.to(dtype).double())
            assert not info.any()
            scaled = a.to(dtype).double() / (d[:, None] * d)
            assert bm.inverse_ratio(scaled, x * (d[:, None] * d)) < bm.THRESHOLD


@real
def test_hilbert(dtype):
    for n in bm.hilbert_sizes(dtype):
        a, inverse = bm.hilbert(n)
        assert torch.equal(a.to(dtype).double(), a)
        condition = bm.norm1(a) * bm.norm1(inverse)
        for spd in (True, False):
            x, info = bm.run_inv(reference, a.to(dtype)[None], spd=spd)
            assert not info.any()
            # X - A^-1 = -A^-1 (I - A X), and the last factor is bounded by the ratio of the inverse.
            bound = bm.THRESHOLD * n * torch.finfo(dtype).eps * condition * bm.norm1(inverse)
            assert bm.norm1(x[0].double() - inverse) <= bound


@pytest.mark.parametrize("dtype", bm.DTYPES, ids=str)
def test_exact_inverses(dtype):
    eye = torch.eye(4, dtype=dtype)[None]
    swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=dtype)
    assert torch.equal(bm.run_inv(reference, swap, spd=False)[0], swap)
    for n in (1, 2, 5, 17, 64):
        p = bm.permutations(n, dtype)
        assert torch.equal(bm.run_inv(reference, p, spd=False)[0], p.mT)
    for spd in (True, False):
        assert torch.equal(bm.run_inv(reference, 4 * eye, spd=spd)[0], eye / 4)


@real
def test_no_jitter(dtype):
    x, info = bm.run_inv(reference, torch.eye(6, dtype=dtype)[None] * 1e-8)
    assert not info.any()
    assert (x - 1e8 * torch.eye(6, dtype=dtype)).abs().max() <= 4 * torch.finfo(dtype).eps * 1e8  # 4 ulp


@real
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_bad_blocks(n, dtype):
    cases = [
        (bm.bad_spd(n, dtype), lambda a: bm.run_inv(reference, a), bm.random_spd(n, dtype, 2)),
        (bm.bad_spd(n, dtype), lambda a: bm.run_solve(reference, a, a), bm.random_spd(n, dtype, 2)),
        (bm.bad_general(n, dtype), lambda a: bm.run_inv(reference, a, spd=False), bm.random_general(n, dtype, 2)),
        (bm.bad_general(n, dtype), lambda a: bm.run_solve(reference, a, a, spd=False), bm.random_general(n, dtype, 2)),
        (bm.bad_symmetric(n, dtype), lambda a: bm.run_eigh(reference, a)[1:], bm.random_symmetric(n, dtype, 2)),
        (bm.bad_symmetric(n, dtype), lambda a: bm.run_abs_inv(reference, a, 1e-3), bm.random_symmetric(n, dtype, 2)),
        (bm.bad_symmetric(n, dtype), lambda a: bm.run_inv_root(reference, a, 2), bm.random_spd(n, dtype, 2)),
    ]
    for bad, run, good in cases:
        clean, codes = run(good)
        assert not codes.any()
        mixed, codes = run(torch.stack([good[0], *(case.block for case in bad), good[1]]))
        assert codes.tolist() == [0, *(case.info for case in bad), 0], [case.name for case in bad]
        assert mixed[1:-1].isnan().all()
        assert torch.equal(mixed[[0, -1]], clean)


@pytest.mark.parametrize("n", [3, 6, 17])
def test_the_cap_on_sweeps(n, monkeypatch):
    """One sweep is too few: the count of what is left, the best effort from eigh, NaN from functions."""
    monkeypatch.setattr(reference, "SWEEPS", 1)
    a = bm.random_symmetric(n, torch.float64, 2, 3.0)
    a[1] = torch.eye(n)
    w, v, info = bm.run_eigh(reference, a)
    assert 0 < info[0] <= n * (n - 1) // 2
    assert info[1] == 0
    assert bm.orthogonality_ratio(v) < bm.THRESHOLD
    rest = v[0].mT @ a[0] @ v[0]
    torch.testing.assert_close(rest.diagonal(), w[0], rtol=0, atol=bm.THRESHOLD * n * torch.finfo(w.dtype).eps)
    x, codes = bm.run_abs_inv(reference, a, 0.1)
    assert torch.equal(codes, info)
    assert x[0].isnan().all()
    assert torch.equal(x[1], torch.eye(n).double())


@real
def test_codes_are_those_of_torch(dtype):
    """Wherever the pivots are far from zero or zero in the block itself.

    In a block of ones the second pivot is 1 - 1, which is zero by IEEE's square root and division, but not by those of
    every BLAS (MKL's for SSE4.2 multiplies by an approximate reciprocal): that code is asserted, not compared.
    """
    for n in (1, 2, 3, 6, 20):
        for bad, good, spd, peer in (
            (bm.bad_spd, bm.random_spd, True, torch.linalg.cholesky_ex),
            (bm.bad_general, bm.random_general, False, torch.linalg.inv_ex),
        ):
            cases = [case for case in bad(n, dtype) if case.block.isfinite().all()]
            a = torch.stack([*[case.block for case in cases], *good(n, dtype, 2)])
            codes = bm.run_inv(reference, a, spd=spd)[1]
            assert codes.tolist() == [*[case.info for case in cases], 0, 0]
            compared = torch.tensor([case.name != "ones" for case in cases] + [True, True])
            assert torch.equal(codes[compared], peer(a).info[compared])


@pytest.mark.parametrize("dtype", bm.DTYPES, ids=str)
def test_the_upper_triangle_is_not_read(dtype):
    a = bm.random_spd(5, dtype, 3, 10.0)
    spoiled = a.clone()
    spoiled[:, *torch.triu_indices(5, 5, 1)] = math.nan
    for run in (
        lambda a: bm.run_inv(reference, a),
        lambda a: bm.run_solve(reference, a, torch.ones(3, 5, 2, dtype=dtype)),
        lambda a: bm.run_eigh(reference, a),
        lambda a: bm.run_abs_inv(reference, a, 0.1),
        lambda a: bm.run_inv_root(reference, a, 4),
    ):
        for one, other in zip(run(spoiled), run(a), strict=True):
            assert torch.equal(one, other)


RUNS = {
    "inv": lambda a, symmetric: bm.run_inv(reference, a, 0.5),
    "inv, general": lambda a, symmetric: bm.run_inv(reference, a + symmetric, spd=False),
    "solve": lambda a, symmetric: bm.run_solve(reference, a, symmetric, torch.ones(len(a), dtype=torch.float64), True),
    "solve, general": lambda a, symmetric: bm.run_solve(reference, a + symmetric, a, spd=False),
    "eigh": lambda a, symmetric: bm.run_eigh(reference, symmetric),
    "abs_inv": lambda a, symmetric: bm.run_abs_inv(reference, symmetric, 0.1),
    "inv_root": lambda a, symmetric: bm.run_inv_root(reference, a, 4, 0.5),
    "inv_root, clamped": lambda a, symmetric: bm.run_inv_root(reference, symmetric, 2, 0.5, clamped=True),
}

#: What IEEE 754 rounds to the last bit, and what moves, compares and selects: alike in every loop, on every processor.
EXACT = {
    "abs", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "floor_divide", "sqrt", "neg", "maximum",
    "minimum", "reciprocal", "frexp", "amax", "argmax", "any", "all", "bitwise_and", "bitwise_or", "bitwise_or_",
    "bitwise_not", "bitwise_xor", "bitwise_left_shift", "__lshift__", "clamp", "eq", "ge", "gt", "le", "lt", "ne",
    "isfinite", "where", "sort", "gather", "scatter_", "index", "index_put_", "index_select", "_to_copy", "alias",
    "arange", "cat", "clone", "copy_", "detach", "diagonal", "empty_like", "expand", "eye", "fill_", "flip", "full",
    "full_like", "ones", "permute", "scalar_tensor", "select", "slice", "transpose", "tril", "unsqueeze", "view",
    "zeros", "zeros_like", "lift_fresh", "_local_scalar_dense", "_unsafe_view", "unbind", "split", "squeeze",
    "new_zeros",
}  # fmt: skip


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations below autograd, sums of floating point numbers under a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.__name__.split(".")[0]
        counts = name == "sum" and not args[0].is_floating_point()
        self.names |= set() if counts else {name}
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_left_to_a_library(name):
    """A product or a decomposition of torch's has bits that depend on its BLAS, on addresses, on the processor."""
    a, symmetric = bm.random_spd(6, torch.float64, 4), bm.random_symmetric(6, torch.float64, 4)
    with Recorder() as recorder:
        RUNS[name](a, symmetric)
    assert recorder.names
    assert recorder.names <= EXACT, recorder.names - EXACT


@pytest.mark.parametrize("n", [1, 2, 5, 13])
@pytest.mark.parametrize("name", RUNS)
def test_bits_do_not_depend_on_where_a_block_lies(name, n):
    """Beside blocks that converge sooner and later, at any address, in any order, with eigenvalues that repeat."""
    q = bm.orthogonal(6, n, "places")
    few = (q * torch.arange(1, n + 1).double().div(3).ceil()) @ q.mT  # threes of equal eigenvalues
    a = torch.cat([bm.random_spd(n, torch.float64, 3, 30.0), torch.eye(n).double()[None], few])
    a[1] *= 2.0**-30
    a = bm.mirrored(a)
    symmetric = torch.cat([bm.random_symmetric(n, torch.float64, 5), torch.eye(n).double().expand(5, n, n)])
    together = RUNS[name](a, symmetric)
    memory = torch.zeros(2, n * n + 9, dtype=torch.float64)
    for i in range(10):
        one, other = (x[i : i + n * n].view(1, n, n) for x in memory)
        one.copy_(a[i])
        other.copy_(symmetric[i])
        for alone, every in zip(RUNS[name](one, other), together, strict=True):
            assert torch.equal(alone[0], every[i])
    order = torch.randperm(10, generator=bm.generator("order", n))
    for turned, every in zip(RUNS[name](a[order], symmetric[order]), together, strict=True):
        assert torch.equal(turned, every[order])


@pytest.mark.parametrize("n", [2, 3, 8, 33])
def test_small_eigenvalues_of_a_definite_block_are_relatively_right(n):
    """D C D with D over 20 decades: the errors are relative to each eigenvalue, times the condition of C, here 10.

    The exact ones are those of scaled pieces: 16 decades apart, what couples two of them is below the rounding.
    """
    q = bm.orthogonal(1, 2, "pieces")[0]
    low = bm.mirrored((q * torch.tensor([1.0, 3.0]).double()) @ q.mT)
    for scale in (1e-20, 1e-120):
        a = torch.zeros(1, n + 2, n + 2, dtype=torch.float64)
        a[0, :n, :n] = bm.random_spd(n, torch.float64, 1, 10.0)[0]
        a[0, n:, n:] = low * scale
        a[0, n:, :n] = 1e-3 * math.sqrt(scale)
        w, _, info = bm.run_eigh(reference, a)
        assert not info.any()
        # The Schur complement, to a relative 1e-20 or better in place of the small eigenvalues.
        x = torch.linalg.solve(a[0, :n, :n], a[0, n:, :n].mT)
        small = torch.linalg.eigvalsh((a[0, n:, n:] - a[0, n:, :n] @ x) / scale) * scale
        bound = 30 * (n + 2) * torch.finfo(torch.float64).eps * 10
        assert ((w[0, :2] - small).abs() <= bound * small).all()


@pytest.mark.parametrize("n", [1, 3, 8, 13])
def test_bits_do_not_depend_on_the_place_in_the_batch(n):
    a, general = bm.random_symmetric(n, torch.float64, 7), bm.random_general(n, torch.float64, 7)
    spd = bm.random_spd(n, torch.float64, 7)
    for run in (
        lambda s: bm.run_inv(reference, spd[s]),
        lambda s: bm.run_inv(reference, general[s], spd=False),
        lambda s: bm.run_solve(reference, spd[s], general[s]),
        lambda s: bm.run_solve(reference, general[s], spd[s], spd=False),
        lambda s: bm.run_eigh(reference, a[s]),
        lambda s: bm.run_abs_inv(reference, a[s], 0.1),
        lambda s: bm.run_inv_root(reference, spd[s], 4),
    ):
        together = run(slice(None))
        for i in range(7):
            for one, every in zip(run(slice(i, i + 1)), together, strict=True):
                assert torch.equal(one[0], every[i])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spd", [False, True])
def test_damping_is_that_of_the_damped_matrix(spd, scaled):
    a = bm.random_spd(4, torch.float64, 3)
    b = torch.randn(3, 4, 2, generator=bm.generator("b"), dtype=torch.float64)
    for amount in (0.25, torch.tensor([0.25, 0.0, 3.0], dtype=torch.float64)):
        shift = amount * torch.ones(3, dtype=torch.float64)
        diagonal = a.diagonal(dim1=-2, dim2=-1) if scaled else torch.ones(3, 4, dtype=torch.float64)
        damped = a + torch.diag_embed(diagonal * shift[:, None])
        near = {"rtol": 1e-12, "atol": 1e-12}  # condition 100: 1e4 eps
        x, _ = bm.run_inv(reference, a, amount, scaled, spd)
        torch.testing.assert_close(x, torch.linalg.inv(damped), **near)
        x, _ = bm.run_solve(reference, a, b, amount, scaled, spd)
        torch.testing.assert_close(x, torch.linalg.solve(damped, b), **near)
        for p in (1, 2, 4):
            x, _ = bm.run_inv_root(reference, a, p, amount, scaled)
            torch.testing.assert_close(
                torch.linalg.matrix_power(x, p) @ damped, torch.eye(4).double().expand(3, 4, 4), **near
            )


def test_functions_of_the_eigenvalues():
    values = torch.tensor([-2.0, -0.01, 0.0, 0.02, 3.0], dtype=torch.float64)
    q = bm.orthogonal(1, 5, "functions")
    a = (q * values) @ q.mT
    x, info = bm.run_abs_inv(reference, a, 0.05)
    assert info.tolist() == [0]
    want = (q * (1 / values.abs().clamp(min=0.05))) @ q.mT
    torch.testing.assert_close(x, want, rtol=1e-13, atol=1e-12)
    x, info = bm.run_abs_inv(reference, a, torch.tensor([0.015], dtype=torch.float64))
    want = (q * (1 / values.abs().clamp(min=0.015))) @ q.mT
    torch.testing.assert_close(x, want, rtol=1e-13, atol=1e-12)
    x, info = bm.run_inv_root(reference, a + 1e-3 * torch.eye(5), 2)
    assert info.tolist() == [2]  # -2, -0.009: two of them
    assert x.isnan().all()
    x, info = bm.run_inv_root(reference, torch.diag(torch.tensor([1.0, 0.0, 4.0]))[None], 2)
    assert info.tolist() == [1]


@real
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_clamped_roots(n, dtype):
    bm.check_clamped_roots(lambda a, p, d: bm.run_inv_root(reference, a, p, d, clamped=True), n, dtype)


def test_clamped_roots_that_did_not_converge(monkeypatch):
    monkeypatch.setattr(reference, "SWEEPS", 1)
    x, info = bm.run_inv_root(reference, bm.random_spd(6, torch.float64, 2, 10.0), 2, 0.1, clamped=True)
    assert info.tolist() == [-3, -3]
    assert x.isnan().all()


@pytest.mark.parametrize("dtype", bm.HALF, ids=str)
def test_half_precision_rounds_once(dtype):
    a = bm.random_spd(6, dtype, 3, 10.0)
    assert torch.equal(bm.run_inv(reference, a)[0], bm.run_inv(reference, a.double())[0].to(dtype))
    w, v, _ = bm.run_eigh(reference, a)
    w64, v64, _ = bm.run_eigh(reference, a.double())
    assert torch.equal(w, w64.to(dtype))
    assert torch.equal(v, v64.to(dtype))


def test_outputs_in_place_of_inputs():
    a, b = bm.random_spd(4, torch.float64, 3), bm.random_general(4, torch.float64, 3)
    info = bm.poisoned(3, dtype=torch.int32)
    for spd in (True, False):
        want, x = bm.run_inv(reference, a, spd=spd)[0], a.clone()
        reference.inv(x, None, False, spd, x, info)
        assert torch.equal(x, want)
        want, x = bm.run_solve(reference, a, b, spd=spd)[0], b.clone()
        reference.solve(a, x, None, False, spd, x, info)
        assert torch.equal(x, want)


def test_batch_strides():
    wide = bm.random_spd(4, torch.float64, 6)
    assert torch.equal(bm.run_inv(reference, wide[::2])[0], bm.run_inv(reference, wide)[0][::2])
    one = wide[:1].expand(3, 4, 4)
    assert torch.equal(bm.run_inv(reference, one)[0], bm.run_inv(reference, wide)[0][:1].expand(3, 4, 4))
