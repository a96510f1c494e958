"""Cases that `test_blocks_triton.py` runs in a process of their own: see `triton_runner.py`."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from secant.kernels.blocks import reference
from secant.kernels.blocks import triton as backend

import block_matrices as blocks
import placed
import triton_runner
from triton_runner import Cases, arguments

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
REAL = (F32, F64)
#: Both schemes and every size of tile, full and padded, in sizes that an interpreter can bear; the others are slow.
INV, SOLVE, EIGH = (1, 2, 3, 6, 7, 9), (1, 4, 5, 9), (1, 2, 4, 5, 9)
LARGE = (8, 10, 16, 24, 31, 32, 33, 48, 63, 64)

CASES = Cases()
case = CASES.case

device = torch.device("cpu")
#: Whether the interpreter gets the programs of a GPU, and not few of many blocks, which it prefers.
as_launched = False


def sized(sizes: tuple[int, ...], *others: Any) -> list[tuple]:
    return [(n, *other) for n in sizes for other in others or ((),)]


#: Tensors on the device under test.
place = functools.partial(placed.place, device=device)
#: The backend with other constants, in a context.
tuned = functools.partial(mock.patch.multiple, backend)


def run(op: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """An op of the backend on poisoned outputs on the device under test."""
    placed = [place(x) for x in args]
    kwargs = {name: place(x) for name, x in kwargs.items()}
    call = getattr(blocks, f"run_{op}")
    if device.type == "cuda":
        with triton_runner.watched(device):
            out = call(backend, *placed, **kwargs)
        return tuple(x.cpu() for x in out)
    if as_launched:
        return call(backend, *placed, **kwargs)
    batch, n, _ = args[0].shape
    entries = min(16384, 1 << (batch - 1).bit_length() + 2 * (n - 1).bit_length())
    with tuned(_TILE_ENTRIES=entries, _EIGH_ENTRIES=entries):
        return call(backend, *placed, **kwargs)


def bits(x: Tensor) -> Tensor:
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def same(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(x, y, strict=True))


def check_ratio(family: dict[str, Tensor], ratio: Callable[[slice], float]) -> None:
    """LAPACK's threshold for every member of a family, which are stacked one behind the other."""
    first = 0
    for name, a in family.items():
        found = ratio(slice(first, first + len(a)))
        assert found < blocks.THRESHOLD, f"{name}: {found}"
        first += len(a)


# -------------------------------------------------------------------------------------------------- inverses and solves


def family_of(n: int, dtype: torch.dtype, spd: bool) -> dict[str, Tensor]:
    return (blocks.spd_families if spd else blocks.general_families)(n, dtype)


def inverse_ratios(n: int, dtype: torch.dtype, spd: bool) -> None:
    family = family_of(n, dtype, spd)
    a = torch.cat(list(family.values()))
    out, info = run("inv", a, spd=spd)
    assert not info.any()
    if spd:
        assert torch.equal(out, out.mT)
    check_ratio(family, lambda part: blocks.inverse_ratio(a[part], out[part]))


def solve_ratios(n: int, dtype: torch.dtype, spd: bool, k: int) -> None:
    family = family_of(n, dtype, spd)
    a = torch.cat(list(family.values()))
    b = torch.randn(len(a), n, k, generator=blocks.generator("b", n, k), dtype=F64).to(dtype)
    out, info = run("solve", a, b, spd=spd)
    assert not info.any()
    check_ratio(family, lambda part: blocks.solve_ratio(a[part], out[part], b[part]))


KINDS = [(t, s) for t in REAL for s in (True, False)]
case(*sized(INV, *KINDS), (17, F32, False))(inverse_ratios)
case(*sized((4, 5, *LARGE), *KINDS), slow=True)(inverse_ratios)
case(*sized(SOLVE, *((t, s, 1) for t, s in KINDS)))(solve_ratios)
case(*((n, F32, s, k) for s in (True, False) for n, k in ((3, 3), (4, 6), (7, 3), (9, 17))))(solve_ratios)
case(*sized(LARGE, *((t, s, k) for t, s in KINDS for k in (1, 3))), (3, F64, True, 9), slow=True)(solve_ratios)


def bad_blocks(n: int, dtype: torch.dtype, spd: bool) -> None:
    """Codes of LAPACK, NaN everywhere in a bad block, and neighbours that do not notice."""
    bad = (blocks.bad_spd if spd else blocks.bad_general)(n, dtype)
    good = blocks.random_spd(n, dtype, len(bad), 10.0)
    mixed = torch.stack([good, torch.stack([x.block for x in bad])], 1).flatten(0, 1)
    b = torch.ones(len(mixed), n, 2, dtype=dtype)
    for results, alone in (
        (run("inv", mixed, spd=spd), run("inv", good, spd=spd)),
        (run("solve", mixed, b, spd=spd), run("solve", good, b[::2].contiguous(), spd=spd)),
    ):
        out, info = results
        assert {x.name: code for x, code in zip(bad, info[1::2].tolist(), strict=True)} == {x.name: x.info for x in bad}
        assert out[1::2].isnan().all()
        assert not info[::2].any()
        assert same((out[::2].contiguous(),), alone[:1])


case(*((n, F32, s) for n in (1, 3, 9) for s in (True, False)), (7, F64, True), (7, F64, False))(bad_blocks)
case(*sized((16, 33), *KINDS), slow=True)(bad_blocks)


@case(*((n, s) for n in (2, 9) for s in (True, False)))
def identities_of_any_size(n, spd):
    eye = torch.eye(n)
    a = torch.stack([eye * 1e-8, eye * 1e-30, eye * 1e30])
    want = torch.stack([eye * 1e8, eye * 1e30, eye * 1e-30])
    out, info = run("inv", a, spd=spd)
    assert not info.any()
    ulp = torch.abs(bits(out) - bits(want)).where(want != 0, 0)
    assert (out == 0).equal(want == 0)
    assert ulp.max() <= 4
    x, _ = run("solve", a, torch.ones(3, n, 1), spd=spd)
    assert torch.abs(bits(x[..., 0]) - bits(want.diagonal(dim1=1, dim2=2).contiguous())).max() <= 4


@case((5,), (12,))
def far_apart_diagonal_entries(n):
    d = torch.logspace(-20, 18, n, dtype=F64).float()
    out, info = run("inv", torch.diag(d)[None])
    assert not info.any()
    # One division, rounded once.
    assert torch.equal(out[0], torch.diag(1 / d))


@case((2,), (4,), (9,), (16,))
def permutations_invert_to_their_transposes(n):
    a = blocks.permutations(n, F32)
    for scale in (1.0, 2.0**100, 2.0**-100):
        out, info = run("inv", a * scale, spd=False)
        assert not info.any()
        assert torch.equal(out, a.mT / scale)
        x, _ = run("solve", a * scale, a, spd=False)
        assert torch.equal(x, torch.eye(n).expand_as(x) / scale)


@case(*((t, s) for t in REAL for s in (True, False)))
def hilbert_matrices(dtype, spd):
    """Against the exact inverse: the forward error that the ratio of the residual allows, n 30 eps cond."""
    for n in blocks.hilbert_sizes(dtype):
        a, exact = blocks.hilbert(n)
        out, _ = run("inv", a[None].to(dtype), spd=spd)
        condition = float(blocks.norm1(a) * blocks.norm1(exact))
        error = float(blocks.norm1(out[0].double() - exact) / blocks.norm1(exact))
        assert error <= blocks.THRESHOLD * n * torch.finfo(dtype).eps * condition


@case((3,), (9,))
def first_of_equal_candidates_is_the_pivot(n):
    """Rows that differ by sign in the first column: LAPACK pivots on the first, and then nothing is rounded."""
    a = torch.eye(n)
    a[:, 0] = 1.0
    a[1::2, 0] = -1.0
    out, info = run("inv", a[None], spd=False)
    want = torch.eye(n)
    want[1:, 0] = -a[1:, 0]
    assert info.item() == 0
    assert torch.equal(out[0], want)


@case(*((n, d, s) for n in (3, 7) for d in (F32, F64) for s in (True, False)))
def damping_is_what_it_says(n, dtype, spd):
    """The damped matrix formed beforehand, in the arithmetic of the kernel, gives the same bits."""
    a, b = blocks.random_spd(n, dtype, 5), torch.ones(5, n, 2, dtype=dtype)
    shifts = torch.linspace(0.1, 0.5, 5, dtype=dtype)
    for damping in (0.3, shifts):
        shift = torch.as_tensor(damping, dtype=dtype).expand(5)[:, None]
        for scaled in (False, True):
            damped = a.clone()
            d = damped.diagonal(dim1=1, dim2=2)
            d.mul_(1 + shift) if scaled else d.add_(shift)
            kwargs = {"damping": damping, "scaled": scaled}
            assert same(run("inv", a, spd=spd, **kwargs), run("inv", damped, spd=spd))
            assert same(run("solve", a, b, spd=spd, **kwargs), run("solve", damped, b, spd=spd))
            if spd and n == 3:
                assert same(run("inv_root", a, 2, **kwargs), run("inv_root", damped, 2))


# --------------------------------------------------------------------------------------------- layouts, aliases, dtypes


def everything(a: Tensor, b: Tensor, eigen: bool = True) -> tuple[Tensor, ...]:
    """What every kernel makes of symmetric blocks, in every mode that handles its tiles in its own way."""
    return (
        *run("inv", a),
        *run("inv", a, spd=False),
        *run("solve", a, b),
        *run("solve", a, b, spd=False),
        *(run("eigh", a) if eigen else ()),
        *(run("abs_inv", a, 0.1) if eigen else ()),
    )


def blocks_are_independent(n: int, batch: int) -> None:
    """The same bits alone, in any order, and in batches that end within a program or with it."""
    global as_launched
    as_launched = True
    a, b = blocks.random_spd(n, F32, batch, 30.0), torch.randn(batch, n, 2, generator=blocks.generator("order", n))
    want = everything(a, b)
    order = torch.randperm(batch, generator=blocks.generator("order", n))
    assert same(everything(a[order], b[order]), tuple(x[order] for x in want))
    for first, last in ((batch - 1, batch), (2, 9)):
        assert same(everything(a[first:last], b[first:last]), tuple(x[first:last] for x in want))
    as_launched = False


case((1, 130), (3, 37), (5, 10))(blocks_are_independent)
case((7, 37), (9, 37), (17, 6), slow=True)(blocks_are_independent)


def strides_between_blocks(n: int, eigen: bool) -> None:
    a, b = blocks.random_spd(n, F32, 5), torch.randn(5, n, 2, generator=blocks.generator("strides", n))
    want = everything(a, b, eigen)
    wide_a, wide_b = torch.full((5, n * n + 3), math.nan), torch.full((5, 2 * n + 1), math.nan)
    wide_a[:, : n * n], wide_b[:, : 2 * n] = a.flatten(1), b.flatten(1)
    strided_a = wide_a.as_strided((5, n, n), (n * n + 3, n, 1))
    strided_b = wide_b.as_strided((5, n, 2), (2 * n + 1, 2, 1))
    assert same(everything(strided_a, strided_b, eigen), want)
    shared = everything(a[:1].expand(5, n, n), b[:1].expand(5, n, 2), eigen)
    assert same(shared, tuple(x[:1].expand_as(x).contiguous() for x in want))


case((3, True), (7, False))(strides_between_blocks)
case((5, True), (17, False), slow=True)(strides_between_blocks)


@case((2,), (7,))
def only_the_lower_triangle_is_read(n):
    a, b = blocks.random_spd(n, F32, 3), torch.randn(3, n, 1, generator=blocks.generator("lower", n))
    spoilt = torch.where(torch.ones(n, n).triu(1) > 0, math.nan, a)
    for op, args in (("inv", ()), ("solve", (b,)), ("abs_inv", (0.1,))):
        assert same(run(op, spoilt, *args), run(op, a, *args)), op


@case((3,), (7,))
def in_place(n):
    a, b = blocks.random_spd(n, F32, 5), torch.randn(5, n, n, generator=blocks.generator("place", n))
    info = place(torch.zeros(5, dtype=torch.int32))
    for spd in (True, False):
        x = place(a.clone())
        backend.inv(x, None, False, spd, x, info)
        assert torch.equal(x.cpu(), run("inv", a, spd=spd)[0])
        want = run("solve", a, b, spd=spd)[0]
        x, y = place(a.clone()), place(b.clone())
        backend.solve(x, y, None, False, spd, y, info)
        assert torch.equal(y.cpu(), want)
        y = place(b.clone())
        backend.solve(x, y, None, False, spd, x, info)
        assert torch.equal(x.cpu(), want)
    x = place(a.clone())
    backend.abs_inv(x, 0.1, x, info)
    assert torch.equal(x.cpu(), run("abs_inv", a, 0.1)[0])


def halves_are_widened_and_rounded_once(n: int, dtype: torch.dtype, eigen: bool) -> None:
    a = blocks.random_spd(n, dtype, 3, 10.0)
    b = torch.randn(3, n, 2, generator=blocks.generator("half", n)).to(dtype)
    for half, single in zip(everything(a, b, eigen), everything(a.float(), b.float(), eigen), strict=True):
        assert torch.equal(half, single.to(half.dtype))


case((3, BF16, True), (3, F16, True), (7, BF16, False))(halves_are_widened_and_rounded_once)
case((5, BF16, True), (5, F16, True), (17, F16, False), slow=True)(halves_are_widened_and_rounded_once)


# ---------------------------------------------------------------------------------------------------------- eigenvalues


def eigen_ratios(n: int, dtype: torch.dtype) -> None:
    family = blocks.symmetric_families(n, dtype)
    a = torch.cat(list(family.values()))
    values, vectors, info = run("eigh", a)
    assert not info.any()
    assert (values.diff(dim=-1) >= 0).all()
    check_ratio(family, lambda part: blocks.eigen_ratio(a[part], values[part], vectors[part]))
    check_ratio(family, lambda part: blocks.orthogonality_ratio(vectors[part]))


case(*sized(EIGH, (F32,)), (3, F64), (6, F64))(eigen_ratios)
case(*sized((7, 8, 16, 17, 32, 33, 64), (F32,), (F64,)), slow=True)(eigen_ratios)


def functions(n: int, dtype: torch.dtype) -> None:
    """f(A + E) - f(A) where |E| is what the eigenvalues may be wrong by: n 30 eps |A|, twice for the vectors.

    |f'| is at most f / (p w), and the smallest |w| is that of the family (or the floor).
    """
    condition = 20.0
    allowed = 3 * blocks.THRESHOLD * n * torch.finfo(dtype).eps * condition
    symmetric, positive = blocks.random_symmetric(n, dtype, 3, condition), blocks.random_spd(n, dtype, 3, condition)
    for op, a, argument in (
        ("abs_inv", symmetric, torch.tensor([0.3, 1e-3, 0.5], dtype=dtype)),
        ("inv_root", positive, 1),
        ("inv_root", positive, 2),
        ("inv_root", positive, 4),
    ):
        out, info = run(op, a, argument)
        want, _ = getattr(blocks, f"run_{op}")(reference, a.double(), argument)
        assert not info.any()
        assert torch.equal(out, out.mT)
        error = torch.linalg.matrix_norm(out.double() - want, 2) / torch.linalg.matrix_norm(want, 2)
        assert error.max() <= allowed, (op, argument)


case((1, F32), (3, F32), (3, F64), (5, F32))(functions)
case((5, F64), *sized((9, 16, 33, 64), (F32,), (F64,)), slow=True)(functions)


def functions_of_extreme_sizes(n: int) -> None:
    """Powers of 16 go through exactly: f(16 A) is f(A) / 16, / 4 or / 2."""
    a = blocks.random_spd(n, F32, 3, 10.0)
    for scale in (2.0**100, 2.0**-100):
        assert torch.equal(run("abs_inv", a * scale, 1e-30)[0], run("abs_inv", a, 1e-30 / scale)[0] / scale)
        for p in (1, 2, 4):
            assert torch.equal(run("inv_root", a * scale, p)[0], run("inv_root", a, p)[0] / scale ** (1 / p))
    tiny, huge = torch.zeros(1, n, n), torch.eye(n)[None] * 2.0**127
    assert torch.equal(run("abs_inv", tiny, 2.0**20)[0], torch.eye(n)[None] * 2.0**-20)
    assert torch.equal(run("abs_inv", huge, 2.0**-100)[0], torch.eye(n)[None] * 2.0**-127)


case((3,))(functions_of_extreme_sizes)
case((5,), slow=True)(functions_of_extreme_sizes)


@case((3,), (5,))
def blocks_without_eigenvalues(n):
    bad = blocks.bad_symmetric(n, F32)
    good = blocks.random_spd(n, F32, len(bad), 10.0)
    mixed = torch.stack([good, torch.stack([x.block for x in bad])], 1).flatten(0, 1)
    for op, args in (("eigh", ()), ("inv_root", (2,))):
        *outs, info = run(op, mixed, *args)
        assert info[1::2].tolist() == [x.info for x in bad]
        assert not info[::2].any()
        assert all(out[1::2].isnan().all() for out in outs)
        assert same(tuple(out[::2].contiguous() for out in outs), run(op, good, *args)[:-1])


@case((3,), (5,))
def roots_of_matrices_that_have_none(n):
    q = blocks.orthogonal(n, n, "indefinite")
    values = torch.stack([torch.where(torch.arange(n) < k, -1.0, 1.0) for k in range(n)]).double()
    a = ((q * values[:, None]) @ q.mT).float()
    a = (a + a.mT) / 2
    out, info = run("inv_root", a, 2)
    assert info.tolist() == list(range(n))
    assert out[1:].isnan().all()
    assert not out[0].isnan().any()
    # A zero eigenvalue has no inverse either.
    assert run("inv_root", torch.zeros(1, n, n), 1)[1].tolist() == [n]
    # Damping comes first.
    assert not run("inv_root", a, 2, damping=1.5)[1].any()


@case((3,), (6,))
def clamped_roots(n):
    blocks.check_clamped_roots(lambda a, p, d: run("inv_root", a, p, damping=d, clamped=True), n, F32)


@case((4,), (6,))
def sweeps_are_capped(n):
    a = blocks.random_symmetric(n, F32, 3)
    a[1] = torch.eye(n)
    with tuned(_SWEEPS=1):
        values, vectors, info = run("eigh", a)
        out, code = run("abs_inv", a, 0.1)
        root, codes = run("inv_root", a, 2, damping=0.1, clamped=True)
    assert (codes == -3).tolist() == root.isnan().all(-1).all(-1).tolist() == [True, False, True]
    assert (info > 0).tolist() == [True, False, True]
    assert (info <= n * (n - 1) // 2).all()
    assert torch.equal(info, code)
    assert values.isfinite().all()
    # The rotations are orthogonal even where they are too few.
    assert blocks.orthogonality_ratio(vectors) < blocks.THRESHOLD
    assert out[[0, 2]].isnan().all()
    assert torch.equal(out[1], torch.eye(n))


@case((3,), (6,))
def small_eigenvalues_of_graded_matrices(n):
    """The relative tolerance at work: eigenvalues of D C D, C well conditioned, D = 1 .. 1e-5, to n 30 eps cond(C)."""
    a, _ = blocks.badly_scaled(n, F32, -5.0, 0.0)
    values, _, _ = run("eigh", a)
    want = torch.linalg.eigvalsh(blocks.mirrored(a.double()))
    assert ((values.double() - want).abs() <= blocks.THRESHOLD * n * torch.finfo(F32).eps * 10 * want).all()


@case()
def public_functions_reach_the_backend():
    import secant

    a, b = blocks.random_spd(3, F32, 4), torch.ones(4, 3)
    with secant.use_backend("triton"):
        x, info = secant.ops.block_inv(place(a))
        y, _ = secant.ops.block_solve(place(a), place(b))
        w, v, _ = secant.ops.block_eigh(place(a))
        z, _ = secant.ops.block_abs_inv(place(a), floor=0.1)
        r, _ = secant.ops.block_inv_root(place(a), 2)
    assert not info.any()
    assert same((x.cpu(),), run("inv", a)[:1])
    assert same((y.cpu()[..., None],), run("solve", a, b[..., None])[:1])
    assert same((w.cpu(), v.cpu()), run("eigh", a)[:2])
    assert same((z.cpu(),), run("abs_inv", a, 0.1)[:1])
    assert same((r.cpu(),), run("inv_root", a, 2)[:1])


def large_batches(batch: int) -> None:
    a = torch.arange(1.0, batch + 1)[:, None, None]
    out, info = run("inv", a)
    assert not info.any()
    assert torch.equal(out, 1 / a)


case((65535,), (65536,), (65537,), slow=True)(large_batches)


# ------------------------------------------------------------------------------------------------------------------ GPU


@case((3,), (9,), (33,), gpu=True)
def captured_in_a_graph(n):
    a = place(blocks.random_spd(n, F32, 100))
    out, info = torch.empty_like(a), torch.empty(100, dtype=torch.int32, device=device)
    for call in (
        lambda: backend.inv(a, None, False, True, out, info),
        lambda: backend.solve(a, a, None, False, False, out, info),
        lambda: backend.abs_inv(a, 0.1, out, info),
    ):
        call()
        want = out.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, want)


@case((2,), (8,), gpu=True, slow=True)
def more_than_two_to_the_31_elements(n):
    batch = 2**31 // (n * n) + 100
    a = torch.eye(n, dtype=BF16, device=device).mul_(2).repeat(batch, 1, 1)
    info = torch.empty(batch, dtype=torch.int32, device=device)
    backend.inv(a, None, False, True, a, info)
    assert not info.any()
    assert torch.equal(a[-100:], torch.eye(n, dtype=BF16, device=device).div(2).expand(100, n, n))


if __name__ == "__main__":
    device, names = arguments()
    CASES.run(device, names)
